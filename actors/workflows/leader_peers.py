"""MLPO's topology (arXiv 2507.08960): peers answer, the leader after reading them, and the peers after reading it."""

from __future__ import annotations

from actors.scene import Scene, fill
from actors.workflows.acting import Act, enter, peers, play, words
from matpo.workflow_config import LeaderPeers


async def leader_peers(scene: Scene, settings: LeaderPeers) -> float | None:
    """Play all rounds; every answer of the leader earns its own score. Returns that of the last.

    The peers are meant to be frozen: give their roles an `endpoint`, or a `learner.role_factors` of 0.
    """
    question = scene.task.question
    others = [enter(scene, role, question) for role in settings.peers]
    leader: Act | None = None
    score: float | None = None
    for _ in range(settings.rounds):
        if leader is not None:
            message = fill(settings.next_peer_message, leader=words(leader))
            others = [peer.again(message) for peer in others]
        await play(others)
        said = peers(others)
        if leader is None:
            leader = enter(scene, settings.leader, fill(settings.leader_message, question=question, peers=said))
        else:
            leader = leader.again(fill(settings.next_leader_message, peers=said))
        await leader.play()
        score = (await scene.appraise(leader.run)).score
        scene.earn(leader.index, score)
    return score
