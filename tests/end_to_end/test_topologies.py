"""Every topology from its tiny config: played on the embedded engine, sent as the wire's frames, trained on, and played
again with the new weights. One of them also as the real processes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import anyio
import pytest

from actors.engines.opening import open_engine
from actors.episode import play_episode
from actors.scene import Stage
from actors.setting import open_tools
from learner.trainer.__main__ import shared_step
from learner.trainer.intake import prepare
from learner.trainer.publish import to_weights
from learner.trainer.ranks import ALONE
from learner.trainer.setup import Training
from matpo.combinations import shown
from matpo.config import Config
from matpo.credit.chosen import SCHEMES
from matpo.credit.counterfactual import Counterfactual
from matpo.credit.scheme import NOTHING
from matpo.datasets.load import load_tasks
from matpo.load import load_config
from matpo.model_files import model_folder
from protocols.codec import decode_tree, encode_tree
from protocols.records import EpisodeGroup, EpisodeTree
from tests.end_to_end.processes import ROOT, matpo, only_run, summary

TINY = ROOT / "configs" / "tiny"
SHAPES: dict[str, dict[str, int]] = {
    "single_agent": {"solver": 1},
    "magrpo": {"left": 2 + 4 * 2, "right": 2 + 4 * 2},
    "debate": {"one": 2, "two": 2, "three": 2},
    "generate_verify_refine": {"generator": 2, "verifier": 4, "refiner": 8},
    "leader_peers": {"leader": 2, "peer": 4},
}
"""Trajectories per role; the other topologies have as many as the agents like."""
FROZEN = frozenset({"peer", "user"})
"""Roles that play and are not trained: by the credit scheme, by their factor."""


async def play(config: Config, training: Training, tools_folder: Path) -> list[EpisodeTree]:
    """A group, a step on it, and one more episode with what was learned."""
    settings, learner = config.actor.engine, config.learner
    async with (
        open_engine(model_folder(config.model), settings, seed=1) as engine,
        open_tools(config, tools_folder) as tools,
    ):
        stage = Stage.open(config, engine=engine, tools=tools, actor_id="actor")
        task = load_tasks(config.data.train, seed=0)[0]

        async def episode(number: int) -> EpisodeTree:
            tree = await play_episode(task, lease_id="l", group_id="g", episode=number, purpose="train", stage=stage)
            return decode_tree(encode_tree(tree))

        policy = training.policy
        await engine.load(to_weights(policy.published, learner.publish_dtype), version=0)
        trees = [await episode(number) for number in range(learner.group_size)]
        taken = prepare(trees, config, current=0, shape=policy.shape, device=policy.device)
        assert taken.filtered == () and len(taken.samples) == taken.report.trajectories > 0
        assert FROZEN.isdisjoint(sample.role for sample in taken.samples)
        report = shared_step(training, taken, config, 1, ALONE)
        assert math.isfinite(report.loss) and math.isfinite(report.grad_norm)
        await engine.load(to_weights(policy.published, learner.publish_dtype), version=1)
        return [*trees, await episode(learner.group_size)]


def check_credit(config: Config, trees: list[EpisodeTree]) -> None:
    """Every scheme that fits the topology scores some of its acts, all with finite numbers."""
    episode, group = config.episode, EpisodeGroup("g", trees[0].task, tuple(trees))
    delegates = {name: role.delegates for name, role in episode.roles.items()}
    earn = config.rewards.workers != "none"
    shows = shown(episode.workflow, episode.root, delegates, workers_earn=earn, replayed=False)
    for scheme in (found for found in SCHEMES if found.needs <= shows):
        scores = scheme.model_validate({"name": scheme.model_fields["name"].default}).credit(group, NOTHING)
        assert [len(row) for row in scores] == [len(tree.trajectories) for tree in trees]
        numbers = [score for row in scores for score in row if score is not None]
        assert numbers and all(map(math.isfinite, numbers)), scheme


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({file.stem for file in TINY.glob("*.toml")} - {"replay"}))
async def test_a_topology_plays_trains_and_plays_on(name: str, tmp_path: Path) -> None:
    config = load_config(TINY / f"{name}.toml")
    assert config.episode.workflow.kind == name
    with anyio.fail_after(120):
        trees = await play(config, Training.start(config, ALONE), tmp_path)
    assert [tree.versions for tree in trees] == [(0,)] * config.learner.group_size + [(1,)]
    assert all(tree.reward is not None for tree in trees)
    check_credit(config, trees[:-1])
    if name in SHAPES:
        for tree in trees:
            assert Counter(trajectory.role for trajectory in tree.trajectories) == SHAPES[name]


@pytest.mark.slow
async def test_finished_episodes_are_replayed_and_only_their_alternatives_are_trained_on(tmp_path: Path) -> None:
    config = load_config(TINY / "replay.toml")
    with anyio.fail_after(120):
        trees = await play(config, Training.start(config, ALONE), tmp_path)
    for tree in trees:
        decisions = Counter((one.trajectory, one.turn) for one in tree.replays)
        assert set(decisions.values()) == {3} and 1 <= len(decisions) <= 2
        for one in tree.replays:
            recorded, alternative = tree.trajectories[one.trajectory], tree.trajectories[one.alternative]
            start = recorded.turns[one.turn].start
            assert alternative.tokens[:start].tobytes() == recorded.tokens[:start].tobytes()
            assert alternative.sampled.tolist() == [False] * start + [True] * (len(alternative.tokens) - start)
    group = EpisodeGroup("g", trees[0].task, tuple(trees[:-1]))
    for tree, scores in zip(group.trees, Counterfactual().credit(group, NOTHING), strict=True):
        trained = {index for index, score in enumerate(scores) if score is not None}
        assert trained == {one.alternative for one in tree.replays}


@pytest.mark.slow
def test_joint_answers_are_trained_on_by_the_real_processes(tmp_path: Path) -> None:
    done = matpo("run", str(TINY / "magrpo.toml"), f"run.dir={tmp_path}", timeout_s=180)
    assert done.returncode == 0, done.stdout + done.stderr
    ledger = summary(only_run(tmp_path))["ledger"]
    assert isinstance(ledger, dict) and ledger["trained"] >= 8
