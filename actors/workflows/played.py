"""The topology the config names, played."""

from __future__ import annotations

from typing import assert_never

from actors.scene import Scene
from actors.workflows.debate import debate
from actors.workflows.generate_verify_refine import generate_verify_refine
from actors.workflows.leader_peers import leader_peers
from actors.workflows.magrpo import magrpo
from actors.workflows.planner_worker import planner_worker
from actors.workflows.simulated_user import simulated_user
from actors.workflows.single_agent import single_agent
from matpo.workflow_config import (
    Debate,
    GenerateVerifyRefine,
    LeaderPeers,
    Magrpo,
    PlannerWorker,
    SimulatedUser,
    SingleAgent,
)


async def played(scene: Scene) -> float | None:
    """Play it, and return what the answer was worth; None where it could not be scored."""
    match scene.stage.config.episode.workflow:
        case SingleAgent():
            return await single_agent(scene)
        case PlannerWorker():
            return await planner_worker(scene)
        case Magrpo() as settings:
            return await magrpo(scene, settings)
        case Debate() as settings:
            return await debate(scene, settings)
        case GenerateVerifyRefine() as settings:
            return await generate_verify_refine(scene, settings)
        case LeaderPeers() as settings:
            return await leader_peers(scene, settings)
        case SimulatedUser() as settings:
            return await simulated_user(scene, settings)
        case other:
            assert_never(other)
