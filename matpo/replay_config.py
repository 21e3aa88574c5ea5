"""Settings of counterfactual replay, and what it does not go together with."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from matpo.credit.counterfactual import Counterfactual
from matpo.credit.scheme import Scheme
from matpo.section import Section
from matpo.tools_config import McpServer
from matpo.workflow_config import GenerateVerifyRefine, Magrpo, Workflow


class Replay(Section):
    """C3 (arXiv 2603.06859): other choices at decisions of every finished training episode, each played to its end."""

    decisions: int = Field(default=1, ge=1)
    """Messages of trained roles that are chosen at random in an episode; fewer where it has fewer."""
    alternatives: int = Field(default=4, ge=2)
    """Messages drawn anew at each; the recorded one is not among them."""


def idle(workflow: Workflow, credit: Scheme) -> str | None:
    """Why replays would be played in vain; None where they would not."""
    if not isinstance(credit, Counterfactual):
        return (
            f"episode.replay has no effect with learner.credit {credit.name!r}, which does not read alternatives; take"
            " 'counterfactual' or remove it"
        )
    if isinstance(workflow, Magrpo | GenerateVerifyRefine) and workflow.samples > 1:
        return (
            f"episode.replay is for topologies without alternatives of their own, and episode.workflow.samples is"
            f" {workflow.samples}; set that to 1 or remove episode.replay"
        )
    return None


def stateful(servers: Mapping[str, McpServer]) -> str | None:
    """Why episodes with these tool servers cannot be replayed; None where they can."""
    for name, entry in servers.items():
        if not entry.disabled and entry.matpo.scope == "episode":
            return (
                f"tool server {name!r} keeps a state for each episode (scope = 'episode'), and episode.replay makes no"
                " recorded call again, so that the state at a decision cannot be had; set its scope to 'shared' if its"
                " answers do not depend on earlier calls, or remove episode.replay"
            )
    return None
