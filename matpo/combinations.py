"""Which topologies, credit schemes and objectives go together, and why the others do not.

One function answers for `matpo config --matrix` and for every config that is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from matpo.credit.chosen import SCHEMES
from matpo.credit.orchestrator_only import OrchestratorOnly
from matpo.credit.scheme import Evidence, Scheme
from matpo.objective_config import Terms, Topr
from matpo.workflow_config import (
    Debate,
    GenerateVerifyRefine,
    LeaderPeers,
    Magrpo,
    PlannerWorker,
    SimulatedUser,
    SingleAgent,
    Workflow,
)

MEANING: Final[Mapping[Evidence, str]] = {
    "several_roles": "several roles",
    "leader": "a role that leads the others",
    "delegation": "agents that are called by others",
    "earned": "a reward for every single act",
    "leaf_scores": "a score for each last act",
    "rounds": "several scored acts of an agent, one after another",
    "joints": "joint actions",
    "alternatives": "several acts of a role from the same state",
    "returns": "a scored future of every alternative",
    "counterfactuals": "what other choices at a decision led to",
}
REMEDY: Final[Mapping[Evidence, str]] = {
    "several_roles": "name more roles",
    "leader": "let the root delegate",
    "delegation": "let the root delegate",
    "earned": "set rewards.workers",
    "rounds": "play 2 or more turns or rounds",
    "alternatives": "draw 2 or more samples",
    "returns": 'set follow = "all"',
    "counterfactuals": "set episode.replay (or draw 2 or more samples and follow all, where a topology can)",
}
"""How a topology that can show it comes to do so."""

Kind = Literal[
    "single_agent",
    "planner_worker",
    "magrpo",
    "debate",
    "generate_verify_refine",
    "leader_peers",
    "simulated_user",
]
AT_MOST: Final[Mapping[Kind, frozenset[Evidence]]] = {
    "single_agent": frozenset({"counterfactuals"}),
    "planner_worker": frozenset({"several_roles", "leader", "delegation", "earned", "counterfactuals"}),
    "magrpo": frozenset({"several_roles", "joints", "rounds", "alternatives", "returns", "counterfactuals"}),
    "debate": frozenset({"several_roles", "joints", "rounds", "earned", "counterfactuals"}),
    "generate_verify_refine": frozenset({"several_roles", "alternatives", "leaf_scores", "returns", "counterfactuals"}),
    "leader_peers": frozenset({"several_roles", "leader", "rounds", "earned", "counterfactuals"}),
    "simulated_user": frozenset({"several_roles", "leader", "counterfactuals"}),
}
"""What each topology's trees show with the settings that show most."""


def shown(
    workflow: Workflow, root: str, delegates: Mapping[str, Sequence[str]], *, workers_earn: bool, replayed: bool
) -> frozenset[Evidence]:
    """What the trees of a topology show with these settings. `delegates` of each role are whom it may call."""
    lacking: set[Evidence] = set()
    match workflow:
        case PlannerWorker():
            if not delegates[root]:
                lacking |= {"leader", "delegation"}
            if set(delegates[root]) <= {root}:
                lacking.add("several_roles")
            if not workers_earn:
                lacking.add("earned")
        case Magrpo():
            if len(set(workflow.agents)) < 2:
                lacking.add("several_roles")
            if workflow.turns < 2:
                lacking.add("rounds")
            elif workflow.samples < 2:  # in the first turn the group's trees are alternatives to one another
                lacking.add("alternatives")
            if workflow.follow == "best":
                lacking.add("returns")
        case Debate() | LeaderPeers():
            if workflow.rounds < 2:
                lacking.add("rounds")
        case GenerateVerifyRefine():
            if workflow.samples < 2:
                lacking.add("alternatives")
        case SingleAgent() | SimulatedUser():
            pass
    seen = AT_MOST[workflow.kind] - lacking
    return seen if replayed or seen >= {"alternatives", "returns"} else seen - {"counterfactuals"}


def refusal(kind: Kind, shows: frozenset[Evidence], credit: Scheme, objective: Terms) -> str | None:
    """Why a topology that shows this, a credit scheme and an objective do not go together; None where they do."""
    missing = [evidence for evidence in MEANING if evidence in credit.needs - shows]
    if missing:
        lacks = " and ".join(MEANING[evidence] for evidence in missing)
        if AT_MOST[kind].issuperset(missing):
            remedy = " and ".join(dict.fromkeys(REMEDY[evidence] for evidence in missing))
        else:
            remedy = f"take one of {', '.join(fitting(shows))}"
        return f"learner.credit {credit.name!r} needs {lacks}, not shown by episode.workflow {kind!r}; {remedy}"
    if credit.one_sided and (isinstance(objective, Topr) or objective.sequence_mask is not None):
        what = "objective 'topr'" if isinstance(objective, Topr) else "sequence_mask"
        return (
            f"learner.credit {credit.title!r} gives no advantage above 0, and {what} is made for groups that have both"
            " signs; take another baseline or objective"
        )
    return None


def misfit(kind: Kind, credit: Scheme, roles: Sequence[str], zero_variance: str) -> str | None:
    """What else in the settings does not suit the scheme; None where all does."""
    if zero_variance == "resample" and credit.judges == "acts":
        return (
            "learner.zero_variance = 'resample' looks at the rewards of whole trees, but learner.credit"
            f" {credit.name!r} judges single acts, which may differ all the same; set it to 'filter'"
        )
    if isinstance(credit, OrchestratorOnly) and credit.role is None and kind == "leader_peers":
        return "learner.credit.role must name the leader: the peers act before it"
    if isinstance(credit, OrchestratorOnly) and credit.role is not None and credit.role not in roles:
        return f"learner.credit.role is {credit.role!r}, which is not among the roles {sorted(roles)}"
    return None


def fitting(shows: frozenset[Evidence]) -> tuple[str, ...]:
    """Names of the schemes that need nothing beyond this."""
    return tuple(scheme.model_fields["name"].default for scheme in SCHEMES if scheme.needs <= shows)
