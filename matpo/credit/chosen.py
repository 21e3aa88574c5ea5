"""The credit schemes by name; a new one is a file beside this one and a line here."""

from __future__ import annotations

from typing import Annotated, Final, get_args

from pydantic import BeforeValidator, Field

from matpo.credit.agent_turn import AgentTurn
from matpo.credit.broadcast import Broadcast
from matpo.credit.counterfactual import Counterfactual
from matpo.credit.difference import Difference
from matpo.credit.hierarchical import Hierarchical
from matpo.credit.leave_one_out import LeaveOneOut
from matpo.credit.look_ahead import LookAhead
from matpo.credit.magrpo import Magrpo
from matpo.credit.multiplier import Multiplier
from matpo.credit.node_local import NodeLocal
from matpo.credit.orchestrator_only import OrchestratorOnly
from matpo.credit.role_baseline import RoleBaseline
from matpo.credit.role_group import RoleGroup
from matpo.credit.scheme import Scheme
from matpo.credit.tree_backup import TreeBackup


def _named(value: object) -> object:
    """A name alone means its defaults; options alone are those of the default scheme."""
    value = {"name": value} if isinstance(value, str) else value
    return {"name": Broadcast().name, **value} if isinstance(value, dict) else value


Credit = Annotated[
    Broadcast
    | LeaveOneOut
    | RoleGroup
    | RoleBaseline
    | OrchestratorOnly
    | Hierarchical
    | NodeLocal
    | Multiplier
    | TreeBackup
    | Counterfactual
    | Magrpo
    | AgentTurn
    | Difference
    | LookAhead,
    Field(discriminator="name"),
    BeforeValidator(_named),
]

SCHEMES: Final[tuple[type[Scheme], ...]] = get_args(get_args(Credit)[0])
"""In the order in which tables list them."""
