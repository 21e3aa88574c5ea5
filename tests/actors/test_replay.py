"""Counterfactual replay: the record is heard again up to a decision, and what comes after it is new."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import numpy as np
import pytest
from pydantic import JsonValue

from actors.elsewhere import ChatClient, Elsewhere
from actors.engines.engine import EngineFailure
from actors.episode import play_episode
from actors.heard import Heard
from actors.render import Message
from actors.scene import Stage
from actors.setting import open_tools
from matpo.config import Endpoint, Sampling
from matpo.credit.counterfactual import Counterfactual
from matpo.credit.scheme import NOTHING
from matpo.errors import UserError
from protocols.codec import decode_tree, encode_tree
from protocols.messages import Purpose
from protocols.records import EpisodeGroup, EpisodeTree, Replay, Trajectory
from tests.actors.fakes import FakeTools, Say, Script, ScriptedEngine, call, last_message, settings, stage, task

EVERY = 100
"""More decisions than any episode here has."""
SOLO: dict[str, dict[str, object]] = {"solver": {"system": "Solve.", "tools": ["search"]}}
TEAM: dict[str, dict[str, object]] = {
    "planner": {"system": "Plan.", "delegates": ["worker"]},
    "worker": {"system": "Work.", "tools": ["search"]},
}


class Notebook:
    """A stateful tool: every answer depends on how often it was called before."""

    def __init__(self) -> None:
        self.queries: list[JsonValue] = []

    async def search(self, arguments: Mapping[str, JsonValue]) -> str:
        self.queries.append(arguments["query"])
        return f"note {len(self.queries)}"

    @property
    def tools(self) -> FakeTools:
        return FakeTools({"search": (self.search, ("query",))})


def on(
    roles: Mapping[str, Mapping[str, object]],
    script: Script,
    *,
    tools: FakeTools | None = None,
    decisions: int = EVERY,
    alternatives: int = 2,
    elsewhere: Elsewhere | None = None,
    **episode: object,
) -> tuple[Stage, ScriptedEngine]:
    episode = {"replay": {"decisions": decisions, "alternatives": alternatives}, **episode}
    config = settings(roles, **episode)
    return stage(config, script, tools=tools, elsewhere=elsewhere or Elsewhere())


async def play(on_stage: Stage, purpose: Purpose = "train") -> EpisodeTree:
    """One episode, as it arrives at the learner."""
    with anyio.fail_after(10):
        tree = await play_episode(task(), lease_id="l", group_id="g", episode=0, purpose=purpose, stage=on_stage)
    return decode_tree(encode_tree(tree))


def followers(tree: EpisodeTree, replay: Replay) -> tuple[Trajectory, ...]:
    """What followed an alternative."""
    later = [one.alternative for one in tree.replays if one.alternative > replay.alternative]
    return tree.trajectories[replay.alternative + 1 : min(later, default=None)]


def rewards(tree: EpisodeTree, turn: int, trajectory: int = 0) -> list[float | None]:
    return [one.reward for one in tree.replays if (one.trajectory, one.turn) == (trajectory, turn)]


def require_prefix(tree: EpisodeTree) -> None:
    """Every alternative has the record's tokens up to its decision, all given, and then one sampled message."""
    for one in tree.replays:
        recorded, alternative = tree.trajectories[one.trajectory], tree.trajectories[one.alternative]
        start = recorded.turns[one.turn].start
        assert alternative.tokens[:start].tobytes() == recorded.tokens[:start].tobytes()
        assert not alternative.sampled[:start].any() and alternative.sampled[start:].all()
        assert [turn.kind for turn in alternative.turns] == ["prompt", "sampled"]
        assert (alternative.role, alternative.parent) == (recorded.role, (one.trajectory, one.turn - 1))


async def test_two_decisions_with_three_alternatives_each_worked_out_by_hand() -> None:
    """The record searches and says Bob. First message: search again and say Ann, Bob, or Ann at once. Second: once of
    three times Ann."""
    first = iter(["search", "search", "\\boxed{Bob}", "\\boxed{Ann}"])
    second = iter(["\\boxed{Bob}", "\\boxed{Ann}", "\\boxed{Ann}", "\\boxed{Bob}", "\\boxed{Bob}"])
    seen, notebook = list[str](), Notebook()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if last_message(prompt) == "Who?":
            said = next(first)
            return call("search", query=f"q{len(notebook.queries)}") if said == "search" else said
        seen.append(last_message(prompt))
        return next(second)

    tree = await play(on(SOLO, script, tools=notebook.tools, decisions=2, alternatives=3)[0])
    require_prefix(tree)
    assert tree.rewards["answer"] == 0.0 and [turn.kind for turn in tree.trajectories[0].turns[1::2]] == ["sampled"] * 2
    # Queries: of the record, and of the one other first message that searched. The next message read the record's note
    # four times and the new one once: no recorded call was made again.
    assert notebook.queries == ["q0", "q1"] and Counter(seen) == {"note 1": 4, "note 2": 1}
    # Totals are 0.9 · answer + 0.1 · format; against the mean of the other two: 1 - 0.55, 0.1 - 1, 1 - 0.55 and
    # 1 - 0.1, 0.1 - 0.55, 0.1 - 0.55.
    assert rewards(tree, 1) == pytest.approx([1.0, 0.1, 1.0]) and rewards(tree, 3) == pytest.approx([1.0, 0.1, 0.1])
    (found,) = Counterfactual().credit(EpisodeGroup("g", tree.task, (tree,)), NOTHING)
    advantages = [found[one.alternative] for one in tree.replays]
    assert advantages == pytest.approx([0.45, -0.9, 0.45, 0.9, -0.45, -0.45])
    assert sum(score is not None for score in found) == 6


async def test_parallel_workers_are_matched_by_node_and_only_what_comes_after_the_decision_is_new() -> None:
    """In the record the second worker finishes first, so that nothing can be matched by time."""
    quick_done, said = anyio.Event(), Counter[str]()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        message = last_message(prompt)
        if message == "Who?":
            return call("worker", subtask="slow") + call("worker", subtask="quick")
        if "Plan." in prompt:
            said["plan"] += 1
            return f"plan {said['plan']} \\boxed{{Ann}}"
        name = "slow" if "subtask: slow" in prompt else "quick"
        if "note" not in message:
            if name == "slow":
                await quick_done.wait()
            said[f"{name} asks"] += 1
            return call("search", query=f"{name} {said[f'{name} asks']}")
        quick_done.set()
        said[name] += 1
        return f"{name} report {said[name]}"

    notebook = Notebook()
    on_stage, engine = on(TEAM, script, tools=notebook.tools)
    tree = await play(on_stage)
    require_prefix(tree)
    recorded = [(t.role, t.parent) for t in tree.played]
    assert recorded == [("planner", None), ("worker", (0, 1)), ("worker", (0, 1))]
    assert Counter((one.trajectory, one.turn) for one in tree.replays) == {
        (0, 1): 2, (0, 4): 2, (1, 1): 2, (1, 3): 2, (2, 1): 2, (2, 3): 2,
    }  # fmt: skip
    # Completions: 6 recorded; 6 after another first message, 1 after another last one, 3 or 2 after a worker's.
    assert len(engine.prompts) == 6 + 2 * (6 + 1 + 2 * (3 + 2))
    # Calls: 2 recorded; 2 after another plan, 1 after another query, none after another report. None was made twice.
    assert len(notebook.queries) == 2 + 2 * 2 + 2 * 2 * 1 == len(set(map(str, notebook.queries)))
    assert len([span for span in tree.tool_spans if span.server == "search_server"]) == len(notebook.queries)
    text = on_stage.renderer.decode
    for one in tree.replays:
        if one.trajectory == 1 and one.turn == 3:
            assert "slow report" in text(tree.trajectories[one.alternative].tokens)
            (planner,) = followers(tree, one)
            assert (planner.role, planner.parent) == ("planner", (0, 1))
            read = text(planner.tokens)
            assert "quick report 1" in read and "slow report 1<" not in read
            assert np.array_equal(planner.sampled, np.arange(len(planner.tokens)) >= planner.turns[1].start)


async def test_alternatives_carry_the_weights_that_drew_them_and_the_record_keeps_its_own() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if last_message(prompt) == "Who?":
            return call("search", query="x")
        return Say("\\boxed{Ann}", new_version=7)

    tree = await play(on(SOLO, script, tools=Notebook().tools)[0])
    recorded = tree.trajectories[0]
    assert set(recorded.versions.tolist()) == {3, 7} and recorded.versions[0] == 3
    for one in tree.replays:
        alternative = tree.trajectories[one.alternative]
        assert set(alternative.versions.tolist()) == {7}
        assert len(alternative.versions) == len(alternative.logprobs) == int(alternative.sampled.sum())
    assert [stamp.digest for stamp in tree.weights] == ["digest-3", "digest-7"]


async def test_agents_that_act_at_once_keep_what_they_said_and_all_of_the_next_round_is_new() -> None:
    said = Counter[str]()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        who = "one" if "I am one" in prompt else "two"
        said[who] += 1
        return f"{who} {said[who]}"

    roles = {name: {"system": f"I am {name}."} for name in ("one", "two")}
    workflow = {"kind": "debate", "agents": ["one", "two"], "rounds": 2, "next_message": "{peers}"}
    on_stage, engine = on(roles, script, workflow=workflow)
    tree = await play(on_stage)
    require_prefix(tree)
    # 4 recorded; a first-round decision is followed by the second round of both, a last one by nothing.
    assert len(engine.prompts) == 4 + 2 * (2 * 3 + 2 * 1)
    for one in tree.replays:
        later = followers(tree, one)
        assert len(later) == (2 if one.trajectory < 2 else 0)
        for act in later:
            beside = "two 1" if one.trajectory == 0 else "one 1"
            assert beside in on_stage.renderer.decode(act.tokens)
        if later:  # the agent that decided follows itself, the other its recorded act
            assert [act.parent for act in later] == [
                (one.alternative, 1) if act.role == tree.trajectories[one.trajectory].role else (1 - one.trajectory, 1)
                for act in later
            ]
    assert len(tree.joints) == 2 and len(tree.earned) == len(tree.trajectories)


NUMBERS = itertools.count(1)


async def anything_new(prompt: str, sampling: Sampling) -> str:
    """A message that nobody said before."""
    return f"word {next(NUMBERS)}."


def words_of(on_stage: Stage, act: Trajectory) -> str:
    """What an agent said last."""
    last = act.turns[-1]
    words = on_stage.renderer.decode(act.tokens[last.start : last.stop]).partition("<|")[0]
    assert words.startswith("word ")
    return words


AGENTS: dict[str, dict[str, object]] = {name: {"system": f"I am {name}."} for name in ("one", "two")}
CRITICS: dict[str, dict[str, object]] = {
    name: {"system": f"I am the {name}."} for name in ("generator", "verifier", "refiner")
}


async def test_both_agents_answer_again_after_a_joint_answer_with_another_answer_in_it() -> None:
    workflow = {"kind": "magrpo", "agents": ["one", "two"], "turns": 2, "next_message": "{peers}{feedback}"}
    on_stage, engine = on(AGENTS, anything_new, workflow=workflow)
    tree = await play(on_stage)
    require_prefix(tree)
    assert [one.role for one in tree.played] == ["one", "two"] * 2 and len(tree.joints) == 2
    # Both answer again after another first answer; nothing follows another second one.
    assert len(engine.prompts) == 4 + 2 * (2 * (1 + 2) + 2 * 1)
    assert [len(followers(tree, one)) for one in tree.replays] == [2] * 4 + [0] * 4
    for one in tree.replays[:4]:  # the one goes on from its alternative, which the other hears of
        mine = {act.role: act for act in followers(tree, one)}
        deciding = tree.trajectories[one.alternative]
        other = next(act for role, act in mine.items() if role != deciding.role)
        assert mine[deciding.role].parent == (one.alternative, 1)
        assert other.parent is not None and tree.trajectories[other.parent[0]] is tree.played[1 - one.trajectory]
        assert words_of(on_stage, deciding) in on_stage.renderer.decode(other.tokens)


async def test_another_answer_gets_a_critique_and_a_refinement_of_its_own() -> None:
    on_stage, engine = on(CRITICS, anything_new, workflow={"kind": "generate_verify_refine", "samples": 1})
    tree = await play(on_stage)
    require_prefix(tree)
    assert [one.role for one in tree.played] == ["generator", "verifier", "refiner"]
    assert len(engine.prompts) == 3 + 2 * (3 + 2 + 1)
    later = [[act.role for act in followers(tree, one)] for one in tree.replays]
    assert later == [["verifier", "refiner"]] * 2 + [["refiner"]] * 2 + [[]] * 2
    for one in tree.replays:
        said = words_of(on_stage, tree.trajectories[one.alternative])
        assert all(f"\n{said}\n" in on_stage.renderer.decode(act.tokens) for act in followers(tree, one))


async def test_a_simulated_user_answers_another_question_anew_and_the_recorded_one_not_again() -> None:
    roles: dict[str, dict[str, object]] = {name: {"system": f"I am the {name}."} for name in ("agent", "user")}
    on_stage, engine = on(roles, anything_new, workflow={"kind": "simulated_user", "turns": 2})
    frozen = on_stage.config.learner.model_copy(update={"role_factors": {"user": 0.0}})
    on_stage.config = on_stage.config.model_copy(update={"learner": frozen})
    tree = await play(on_stage)
    require_prefix(tree)
    assert [one.role for one in tree.played] == ["agent", "user", "agent"]
    # Another question: the user's words and the answer are new. Another answer: nothing follows.
    assert [[act.role for act in followers(tree, one)] for one in tree.replays] == [["user", "agent"]] * 2 + [[]] * 2
    assert len(engine.prompts) == 3 + 2 * 3 + 2 * 1
    for one in tree.replays[:2]:
        question, (user, answer) = tree.trajectories[one.alternative], followers(tree, one)
        assert words_of(on_stage, question) in on_stage.renderer.decode(user.tokens)
        assert words_of(on_stage, user) in on_stage.renderer.decode(answer.tokens)


class Peer(ChatClient):
    """A role played elsewhere that says something else every time."""

    def __init__(self) -> None:
        self.asked = 0

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> str:
        self.asked += 1
        return f"peer {self.asked}"


async def test_a_role_played_elsewhere_is_not_asked_again_before_the_decision() -> None:
    peer = Peer()

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        assert "peer 1" in prompt
        return "\\boxed{Ann}"

    endpoint = Endpoint(url="http://localhost:1/v1", model="peer")
    roles: dict[str, dict[str, object]] = {
        "leader": {"system": "Lead."},
        "peer": {"system": "Help.", "endpoint": endpoint.model_dump()},
    }
    workflow = {"kind": "leader_peers", "peers": ["peer"], "rounds": 2}
    tree = await play(on(roles, script, workflow=workflow, elsewhere=Elsewhere(None, {"peer": peer}))[0])
    # Twice in the record; again after another first message of the leader, not after another last one.
    assert peer.asked == 2 + 2 * 1
    assert {tree.trajectories[one.trajectory].role for one in tree.replays} == {"leader"}
    assert tree.played[0].role == "peer" and len(tree.replays) == 4


async def test_an_alternative_the_engine_could_not_draw_is_not_scored_and_holds_nothing_to_train() -> None:
    asked = 0

    async def script(prompt: str, sampling: Sampling) -> Say | str:
        nonlocal asked
        asked += 1
        if asked > 2:  # the record and the first alternative
            raise EngineFailure("dead")
        return "\\boxed{Ann}"

    tree = await play(on(SOLO, script, tools=Notebook().tools)[0])
    assert rewards(tree, 1) == [1.0, None]
    broken = tree.trajectories[tree.replays[1].alternative]
    assert broken.status == "engine_failure" and not broken.sampled.any()
    (found,) = Counterfactual().credit(EpisodeGroup("g", tree.task, (tree,)), NOTHING)
    assert found == (None, None, None)


async def test_decisions_are_those_of_trained_roles_in_scored_episodes_for_training() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        if last_message(prompt) == "Who?":
            return call("worker", subtask="find")
        return "\\boxed{Ann}"

    on_stage = on(TEAM, script, tools=Notebook().tools, decisions=1, alternatives=3)[0]
    assert len((await play(on_stage)).replays) == 3
    assert (await play(on_stage, "eval")).replays == ()
    frozen = on_stage.config.learner.model_copy(update={"role_factors": {"planner": 0.0}})
    on_stage.config = on_stage.config.model_copy(update={"learner": frozen})
    assert {one.trajectory for one in (await play(on_stage)).replays} == {1}

    async def broken(prompt: str, sampling: Sampling) -> Say | str:
        raise EngineFailure("dead")

    tree = await play(on(TEAM, broken, tools=Notebook().tools)[0])
    assert tree.reward is None and tree.replays == ()


async def test_the_same_record_has_the_same_decisions() -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        turns = prompt.count("<|im_start|>assistant")
        return call("search", query="x") if turns < 6 else "\\boxed{Ann}"

    async def find(arguments: Mapping[str, JsonValue]) -> str:
        return "found"

    tools = FakeTools({"search": (find, ("query",))})
    once, again = [await play(on(SOLO, script, tools=tools, decisions=2)[0]) for _ in range(2)]
    assert [one.turn for one in once.replays] == [one.turn for one in again.replays]
    assert len({one.turn for one in once.replays}) == 2 and len(once.replays) == 4


async def test_a_workflow_that_does_not_do_the_same_again_is_an_error_that_says_so() -> None:
    record = Heard()

    async def answer() -> str:
        return "peer"

    await record.words.ask(((), 1), answer)
    again = Heard(record, ("elsewhere", 1))
    assert await again.words.ask(((), 1), answer) == "peer" and again.words.asked == {}
    with pytest.raises(LookupError, match="not in its record: a workflow must do the same"):
        await again.words.ask(((), 2), answer)


async def test_servers_with_a_state_per_episode_are_refused_in_a_tools_file_too(tmp_path: Path) -> None:
    async def script(prompt: str, sampling: Sampling) -> Say | str:
        return ""

    file = tmp_path / "mcp.json"
    file.write_text('{"mcpServers": {"notes": {"command": "x", "matpo": {"scope": "episode"}}}}')
    config = on(SOLO, script, tools=Notebook().tools)[0].config
    config = config.model_copy(update={"tools": config.tools.model_copy(update={"file": file})})
    with pytest.raises(UserError, match="'notes' keeps a state for each episode"):
        open_tools(config, tmp_path)
    plain = config.model_copy(update={"episode": config.episode.model_copy(update={"replay": None})})
    open_tools(plain, tmp_path)
