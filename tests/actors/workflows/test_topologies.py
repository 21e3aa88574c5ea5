"""Debate, generate-verify-refine, leader and peers, simulated user: who reads what, tree shapes, what acts earn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import anyio
import pytest

from actors.episode import play_episode
from actors.scene import Scene
from actors.workflows.acting import enter, last_turn, words
from matpo.config import Sampling
from protocols.messages import Purpose
from protocols.records import EpisodeTree, Joint, Task
from tests.actors.fakes import Say, Script, last_message, settings, stage

TASK = Task.make("Who?", ("Ann",), {"hidden": "Her name begins with A."})


async def played(
    script: Script, workflow: Mapping[str, object], *roles: str, purpose: Purpose = "train", task: Task = TASK
) -> EpisodeTree:
    """One episode of roles whose system prompt is their name."""
    config = settings({name: {"system": f"I am {name}."} for name in roles}, workflow=dict(workflow))
    with anyio.fail_after(10):
        on_stage = stage(config, script)[0]
        return await play_episode(task, lease_id="l", group_id="g", episode=0, purpose=purpose, stage=on_stage)


def who(prompt: str) -> str:
    return prompt.split("I am ")[1].split(".")[0]


DEBATE: dict[str, object] = {"kind": "debate", "agents": ["one", "two", "three"], "rounds": 2}


async def test_debaters_read_the_others_answers_and_every_answer_of_every_round_earns_its_own_score() -> None:
    second: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if message == "Who?":
            return {"one": "Ann", "two": "Bob", "three": "Zoe"}[who(prompt)]
        second.append(message)
        return {"one": "Ann", "two": "Ann", "three": "Zoe"}[who(prompt)]

    tree = await played(script, {**DEBATE, "next_message": "{peers}"}, "one", "two", "three")
    assert sorted(second) == ["[1] Ann\n[2] Bob", "[1] Ann\n[3] Zoe", "[2] Bob\n[3] Zoe"]
    assert [t.parent for t in tree.trajectories] == [None, None, None, (0, 1), (1, 1), (2, 1)]
    assert tree.earned == (1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    assert tree.joints == (
        Joint(members=(0, 1, 2), after=None, reward=1 / 3),
        Joint(members=(3, 4, 5), after=0, reward=2 / 3),
    )
    assert tree.rewards["answer"] == pytest.approx(2 / 3)


async def test_a_debate_may_end_with_consensus_and_an_evaluation_takes_the_majoritys_answer() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return "the Ann." if who(prompt) == "one" else "Ann"

    tree = await played(script, {**DEBATE, "stop_on_consensus": True}, "one", "two", "three")
    assert len(tree.joints) == 1 and tree.rewards["answer"] == 1.0

    async def split(prompt: str, sampling: Sampling) -> Say | str:
        return "Zoe" if who(prompt) == "one" else "Ann"

    tree = await played(split, DEBATE, "one", "two", "three", purpose="eval")
    assert tree.rewards["answer"] == 1.0


async def test_generation_verification_and_refinement_make_a_tree_of_n_cubed_leaves() -> None:
    count = Counter[str]()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        me = who(prompt)
        count[me] += 1
        if me == "refiner":
            return "Ann" if "critique 1" in prompt or "critique 2" in prompt else "Zoe"
        return f"{'answer' if me == 'generator' else 'critique'} {count[me]}"

    workflow = {"kind": "generate_verify_refine", "samples": 2}
    tree = await played(script, workflow, "generator", "verifier", "refiner")
    roles = [t.role for t in tree.trajectories]
    assert Counter(roles) == {"generator": 2, "verifier": 4, "refiner": 8}
    above = {"verifier": "generator", "refiner": "verifier"}
    for trajectory in tree.trajectories:
        assert (trajectory.parent is None) == (trajectory.role == "generator")
        if trajectory.parent is not None:
            assert roles[trajectory.parent[0]] == above[trajectory.role]
    children = Counter(t.parent[0] for t in tree.trajectories if t.parent is not None)
    assert set(children.values()) == {2}
    leaves = [score for role, score in zip(roles, tree.earned, strict=True) if role == "refiner"]
    assert sorted(leaves, key=str) == [0.0] * 4 + [1.0] * 4  # two critiques of four led to the right answer
    assert all(score is None for role, score in zip(roles, tree.earned, strict=True) if role != "refiner")
    assert tree.rewards["answer"] == 0.5


async def test_a_verifier_reads_the_answer_and_a_refiner_both() -> None:
    seen: dict[str, str] = {}

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        seen[who(prompt)] = last_message(prompt)
        return {"generator": "Bob", "verifier": "No, Ann.", "refiner": "Ann"}[who(prompt)]

    workflow = {
        "kind": "generate_verify_refine", "samples": 1,
        "verify_message": "{question} {answer}", "refine_message": "{question} {answer} {critique}",
    }  # fmt: skip
    tree = await played(script, workflow, "generator", "verifier", "refiner")
    assert seen == {"generator": "Who?", "verifier": "Who? Bob", "refiner": "Who? Bob No, Ann."}
    assert tree.rewards["answer"] == 1.0


async def test_the_leader_reads_its_peers_and_they_read_it() -> None:
    seen: list[tuple[str, str]] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        seen.append((who(prompt), last_message(prompt)))
        if who(prompt) == "leader":
            return "Bob" if len(seen) < 4 else "Ann"
        return f"{who(prompt)} says Ann"

    workflow = {
        "kind": "leader_peers", "peers": ["x", "y"], "rounds": 2,
        "leader_message": "{question}|{peers}", "next_leader_message": "{peers}", "next_peer_message": "{leader}",
    }  # fmt: skip
    tree = await played(script, workflow, "leader", "x", "y")
    assert seen[2] == ("leader", "Who?|[1] x says Ann\n[2] y says Ann")
    assert sorted(seen[3:5]) == [("x", "Bob"), ("y", "Bob")]
    assert [(t.role, t.parent) for t in tree.trajectories] == [
        ("x", None), ("y", None), ("leader", None), ("x", (0, 1)), ("y", (1, 1)), ("leader", (2, 1)),
    ]  # fmt: skip
    assert tree.earned == (None, None, 0.0, None, None, 1.0) and tree.rewards["answer"] == 1.0


async def test_the_user_knows_what_the_agent_must_ask_for() -> None:
    seen: list[tuple[str, str]] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        seen.append((who(prompt), last_message(prompt)))
        if who(prompt) == "user":
            return "It begins with A."
        return "How does it begin?" if len(seen) == 1 else "\\boxed{Ann}"

    workflow = {"kind": "simulated_user", "user_message": "{question} {hidden} {message}"}
    tree = await played(script, workflow, "agent", "user")
    assert seen == [
        ("agent", "Who?"),
        ("user", "Who? Her name begins with A. How does it begin?"),
        ("agent", "It begins with A."),
    ]
    assert [(t.role, t.parent) for t in tree.trajectories] == [("agent", None), ("user", (0, 1)), ("agent", (0, 1))]
    assert tree.earned == (None, None, 1.0) and tree.rewards["answer"] == 1.0


async def test_an_agent_that_only_asks_is_told_before_its_last_turn_and_then_scored_as_it_stands() -> None:
    agent: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if who(prompt) == "user":
            return "Well."
        agent.append(last_message(prompt))
        return "And?"

    tree = await played(
        script, {"kind": "simulated_user", "turns": 3, "last_message": "{message} Now!"}, "agent", "user"
    )
    assert agent == ["Who?", "Well.", "Well. Now!"]
    assert tree.rewards["answer"] == 0.0 and len(tree.trajectories) == 5


async def test_agents_of_any_topology_may_have_workers_of_their_own() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if "I am worker" in prompt:
            return "Ann"
        if message == "Who?":
            return '<tool_call>{"name": "worker", "arguments": {"subtask": "find"}}</tool_call>'
        return message if message == "Ann" else "Ann again"

    roles: dict[str, dict[str, object]] = {
        "one": {"system": "I am one.", "delegates": ["worker"]},
        "two": {"system": "I am two.", "delegates": ["worker"]},
        "worker": {"system": "I am worker."},
    }
    config = settings(roles, workflow={"kind": "debate", "agents": ["one", "two"], "rounds": 2})
    with anyio.fail_after(10):
        tree = await play_episode(
            TASK, lease_id="l", group_id="g", episode=0, purpose="train", stage=stage(config, script)[0]
        )
    assert Counter(t.role for t in tree.trajectories) == {"one": 2, "two": 2, "worker": 2}
    assert tree.earned.count(None) == 2 and tree.rewards["spawned"] == 2.0


async def relay(scene: Scene, roles: Sequence[str]) -> float | None:
    """Each role improves what the one before it wrote; the last answer counts. (The example of docs/topologies.md.)"""
    act = enter(scene, roles[0], scene.task.question)
    await act.play()
    for role in roles[1:]:
        act = enter(scene, role, f"{scene.task.question}\n{words(act)}", parent=last_turn(act))
        await act.play()
    return (await scene.appraise(act.run)).score


async def test_a_topology_of_ones_own_is_a_few_lines() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return "Ann" if last_message(prompt) == "Who?\nBob" else "Bob"

    config = settings({"one": {"system": "I am one."}, "two": {"system": "I am two."}})
    scene = Scene(stage(config, script)[0], TASK, "train", group_id="g")
    assert await relay(scene, ("one", "two")) == 1.0
    assert [(run.role, run.parent) for run in scene.runs] == [("one", None), ("two", (0, 1))]
