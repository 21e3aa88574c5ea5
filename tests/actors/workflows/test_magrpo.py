"""MAGRPO: joint answers, their tree, what each turn reads, what the returns add up to."""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import numpy as np
import pytest

from actors.engines.engine import EngineFailure
from actors.episode import play_episode
from actors.scene import Stage
from matpo.config import Sampling
from protocols.codec import decode_tree, encode_tree
from protocols.messages import Purpose
from protocols.records import EpisodeTree, Joint, Task
from tests.actors.fakes import Say, Script, last_message, settings, stage

TASK = Task.make("Two names?", ("Ann", "Bob"))
ROLES: dict[str, dict[str, object]] = {
    "left": {"system": "Left.", "max_context_tokens": 5_000},
    "right": {"system": "Right.", "max_context_tokens": 5_000},
}


def open_stage(
    script: Script, answer: str = "cover", *, rewards: Mapping[str, str] | None = None, **workflow: object
) -> Stage:
    config = settings(ROLES, workflow={"kind": "magrpo", "agents": ["left", "right"], **workflow})
    measured = {"answer": answer, "answer_weight": 1.0, "format_weight": 0.0, **(rewards or {})}
    return stage(config.model_copy(update={"rewards": config.rewards.model_copy(update=measured)}), script)[0]


async def played(on_stage: Stage, purpose: Purpose = "train") -> EpisodeTree:
    with anyio.fail_after(10):
        return await play_episode(TASK, lease_id="l", group_id="g", episode=0, purpose=purpose, stage=on_stage)


def in_turn(**lines: list[str]) -> Script:
    """Every role says its lines in order."""

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return lines["left" if "Left." in prompt else "right"].pop(0)

    return script


async def test_agents_answer_at_once_without_reading_one_another() -> None:
    """Each waits for the other to have begun: in turn, this would never end."""
    begun = {"Left.": anyio.Event(), "Right.": anyio.Event()}
    prompts: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        prompts.append(last_message(prompt))
        me, other = ("Left.", "Right.") if "Left." in prompt else ("Right.", "Left.")
        begun[me].set()
        await begun[other].wait()
        return "Ann" if me == "Left." else "Bob"

    tree = await played(open_stage(script, turns=1))
    assert prompts == ["Two names?"] * 2
    assert [(t.role, t.parent) for t in tree.trajectories] == [("left", None), ("right", None)]
    assert tree.joints == (Joint(members=(0, 1), after=None, reward=1.0),)
    assert (tree.rewards["answer"], tree.rewards["total"], tree.earned) == (1.0, 1.0, ())


async def test_the_next_turn_reads_the_feedback_and_is_a_trajectory_of_its_own_after_the_same_agents_act() -> None:
    prompts: list[str] = []

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        prompts.append(prompt)
        return {"Left.": "Ann", "Right.": "Zoe" if "right yet" not in prompt and len(prompts) < 3 else "Bob"}[
            "Left." if "Left." in prompt else "Right."
        ]

    tree = await played(open_stage(script, next_message="{feedback} They said {peers} Again."))
    assert [(t.role, t.parent) for t in tree.trajectories] == [
        ("left", None), ("right", None), ("left", (0, 1)), ("right", (1, 1)),
    ]  # fmt: skip
    assert tree.joints == (
        Joint(members=(0, 1), after=None, reward=0.5),
        Joint(members=(2, 3), after=0, reward=1.0),
    )
    assert tree.rewards["total"] == pytest.approx(1.5)
    assert last_message(prompts[2]) == "That is not right. They said [2] Zoe Again."
    first, second = tree.trajectories[0], tree.trajectories[2]
    assert second.tokens[: len(first.tokens)].tolist() == first.tokens.tolist()
    assert [turn.kind for turn in second.turns] == ["prompt", "instruction", "sampled"]
    assert int(np.count_nonzero(second.sampled)) == second.turns[2].stop - second.turns[2].start
    assert not second.sampled[: len(first.tokens)].any()


def named(task: Task, role: str, message: str) -> float:
    """A local reward: half a point for a name of the task's, and a tenth for being the left one."""
    return 0.5 * (message in task.answers) + 0.1 * (role == "left")


async def test_an_answer_may_earn_something_by_itself_beside_its_joint_answers() -> None:
    script = in_turn(left=["Ann", "Zoe"], right=["Zoe", "Bob"])
    on_stage = open_stage(script, rewards={"local": f"{__name__}:named"}, turns=1, samples=2)
    tree = await played(on_stage)
    assert [t.role for t in tree.trajectories] == ["left", "left", "right", "right"]
    assert tree.earned == (0.6, 0.1, 0.0, 0.5)
    assert [joint.reward for joint in tree.joints] == [0.5, 0.5]
    evaluated = open_stage(in_turn(left=["Ann"], right=["Bob"]), rewards={"local": f"{__name__}:named"}, turns=1)
    assert (await played(evaluated, "eval")).earned == ()


async def test_aligned_samples_make_a_tree_of_pairs_whose_returns_add_up_from_the_leaves() -> None:
    # Two samples a node, two turns: 2 pairs, and 2 more after each. Scores by pair, worked out below.
    lines = in_turn(
        left=["Ann", "Zoe", "Ann", "Zoe", "Ann", "Ann"],
        right=["Zoe", "Zoe", "Bob", "Zoe", "Bob", "Zoe"],
    )
    tree = await played(open_stage(lines, samples=2))
    assert len(tree.trajectories) == 2 * (2 + 4) and len(tree.joints) == 2 + 4
    roots = [index for index, joint in enumerate(tree.joints) if joint.after is None]
    assert [tree.joints[index].reward for index in roots] == [0.5, 0.0]
    after = {root: [j.reward for j in tree.joints if j.after == root] for root in roots}
    assert sorted(after.values()) == [[1.0, 0.0], [1.0, 0.5]]
    # Mean of 0.5 + mean(one pair of leaves) and 0 + mean(the other), whichever agent's samples came first.
    assert tree.rewards["total"] == pytest.approx((0.5 + 0.0 + 0.5 + 0.75) / 2)
    for joint in tree.joints:
        if joint.after is not None:
            before = tree.joints[joint.after]
            parents = [tree.trajectories[member].parent for member in joint.members]
            assert [parent and parent[0] for parent in parents] == list(before.members)


async def test_cross_pairing_scores_every_combination_of_the_samples() -> None:
    lines = in_turn(left=["Ann", "Zoe"], right=["Bob", "Zoe"])
    tree = await played(open_stage(lines, samples=2, pairing="cross", turns=1))
    assert [(joint.members, joint.reward) for joint in tree.joints] == [
        ((0, 2), 1.0), ((0, 3), 0.5), ((1, 2), 0.5), ((1, 3), 0.0),
    ]  # fmt: skip
    assert tree.rewards["total"] == 0.5


async def test_after_a_crossed_node_every_combination_goes_on_by_itself() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return "Ann"

    tree = await played(open_stage(script, samples=2, pairing="cross", turns=2))
    assert [sum(j.after == index for j in tree.joints) for index in range(4)] == [4, 4, 4, 4]
    assert len(tree.joints) == 4 + 16 and len(tree.trajectories) == 4 + 4 * 4


async def test_only_the_best_joint_answer_is_followed_where_the_config_says_so() -> None:
    lines = in_turn(left=["Zoe", "Ann", "Ann", "Ann"], right=["Zoe", "Zoe", "Bob", "Bob"])
    tree = await played(open_stage(lines, samples=2, follow="best"))
    assert [joint.after for joint in tree.joints] == [None, None, 1, 1]
    assert tree.rewards["total"] == pytest.approx((0.0 + 0.5 + 1.0) / 2)


async def test_a_node_that_is_good_enough_is_not_followed() -> None:
    tree = await played(open_stage(in_turn(left=["Ann"], right=["Bob"]), stop_above=0.9))
    assert len(tree.joints) == 1 and tree.rewards["total"] == 1.0


async def test_an_evaluation_plays_one_joint_answer_a_turn_and_counts_the_last() -> None:
    lines = in_turn(left=["Ann", "Ann"], right=["Zoe", "Bob"])
    tree = await played(open_stage(lines, samples=2, pairing="cross"), "eval")
    assert [joint.reward for joint in tree.joints] == [0.5, 1.0] and tree.rewards["answer"] == 1.0


async def test_an_engine_that_dies_leaves_the_joint_answer_and_the_episode_unscored() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if "Right." in prompt:
            raise EngineFailure("gone")
        return "Ann"

    tree = await played(open_stage(script))
    assert tree.joints == (Joint(members=(0, 1), after=None, reward=None),)
    assert tree.rewards["total"] is None


async def test_a_tree_of_acts_survives_the_wire_at_the_cost_of_its_new_tokens() -> None:
    lines = in_turn(left=["Ann", "Zoe"] * 3, right=["Zoe", "Bob"] * 3)
    tree = await played(open_stage(lines, samples=2))
    again = decode_tree(encode_tree(tree))
    assert (again.joints, again.earned) == (tree.joints, tree.earned)
    # The history that an act repeats is named, not sent again: two bytes for every other token.
    parents = [(t.parent and len(tree.trajectories[t.parent[0]].tokens)) or 0 for t in tree.trajectories]
    fresh = sum(len(t.tokens) for t in tree.trajectories) - sum(parents)
    assert sum(parents) > 0 and len(encode_tree(tree)[4]) <= 2 * fresh
