"""The trainer's loop against a real journal: what it trains, publishes and saves, and how it goes on when killed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from learner.hub.journal import Journal
from learner.hub.settled import Settler
from learner.trainer import replay
from learner.trainer.checkpoint import Checkpoints
from learner.trainer.hub import Hub, NoHub
from matpo.errors import UserError
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.metrics import read_metrics
from protocols.delta import apply_delta
from protocols.messages import Publish
from protocols.records import version_of
from protocols.weights import Weights, covering, read_keyframe, weights_digest
from tests.disk import full_disk
from tests.learner.trainer.models import tiny_model
from tests.learner.trainer.runs import StopAfter, damage, ledger, make_run, run_trainer


def digest_of(path: Path) -> str:
    state = Checkpoints(path / "checkpoints", keep=2).newest()
    assert state is not None
    return state.weights


def test_a_run_trains_every_scored_tree_once_and_ends_with_a_checkpoint(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path)
    hub = run_trainer(folder, config)
    assert list(ledger(folder)) == [
        row for step in (1, 2, 3, 4) for row in (("filtered", step, "unscored", 2), ("trained", step, None, 4))
    ]
    assert [done.step for done in hub.steps_done] == [1, 2, 3, 4]
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["step-000002", "step-000004"]


def test_each_step_is_one_line_of_metrics(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    lines = [line for _, line in read_metrics(folder.metrics)]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["version"] for line in lines] == [1, 2, 3, 4]
    # Every tree was sampled by version 0.
    assert [line["staleness_max"] for line in lines] == [0, 1, 2, 3]
    assert {"wait_s", "step_s", "publish_s", "reward_mean", "all_fail_groups", "loss", "grad_norm"} <= set(lines[0])


def rebuild(folder: Path, published: list[Publish]) -> dict[int, Weights]:
    """What an actor that follows every version holds after each."""
    held: dict[int, Weights] = {}
    version: int | None = None
    for message in published:
        for item in covering(message.objects, version):
            path = folder / item.name
            held[item.version] = (
                read_keyframe(path) if item.base is None else apply_delta(path, held[item.base], base_version=item.base)
            )
        version = message.version
        assert weights_digest(held[version]) == message.digest
    return held


def test_published_deltas_rebuild_every_version_exactly(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, learner={"lr": 1e-6})
    hub = run_trainer(folder, config)
    kinds = [tuple(item.kind for item in message.objects) for message in hub.published]
    assert kinds == [("keyframe",), ("delta",), ("delta", "fold"), ("keyframe",), ("delta",)]
    assert sorted(rebuild(folder.weights, hub.published)) == [0, 1, 2, 3, 4]


def test_where_most_of_the_weights_moved_a_keyframe_is_published_instead(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, steps=1, learner={"lr": 0.5, "publish_dtype": "float32"})
    hub = run_trainer(folder, config)
    assert [[item.kind for item in message.objects] for message in hub.published] == [["keyframe"], ["keyframe"]]
    assert len(list(folder.weights.iterdir())) == 2


def test_the_same_run_twice_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        folder, config = make_run(tmp_path / name)
        run_trainer(folder, config)
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "two")


def test_a_stopped_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole, config = make_run(tmp_path / "whole", steps=6)
    run_trainer(whole, config)
    stopped, config = make_run(tmp_path / "stopped", steps=6)
    run_trainer(stopped, config, stopping=StopAfter(5))
    before = Checkpoints(stopped.checkpoints, keep=2).newest()
    assert before is not None
    assert 0 < before.step < 6
    hub = run_trainer(stopped, config)
    assert hub.published[0].version == version_of(lineage=1, step=before.step)
    assert digest_of(stopped.path) == digest_of(whole.path)


def test_a_killed_trainer_repeats_what_its_checkpoint_lacks_and_nothing_is_trained_twice(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, config = make_run(tmp_path / "whole", steps=5)
    run_trainer(whole, config)
    killed, config = make_run(tmp_path / "killed", steps=5)
    run_trainer(killed, config)
    # As after kill -9 while step 5 is saved: the ledger is ahead of the newest checkpoint, beside which lies a draft.
    (killed.checkpoints / "step-000005").rename(killed.checkpoints / ".draft")
    hub = run_trainer(killed, config)
    assert not (killed.checkpoints / ".draft").exists()
    assert [done.step for done in hub.steps_done] == [5]
    assert list(ledger(killed)) == list(ledger(whole))
    assert digest_of(killed.path) == digest_of(whole.path)


def test_a_checkpoint_without_room_is_named_and_training_goes_on_to_its_end_or_ends_in_one_line(tmp_path: Path) -> None:
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
        # A model whose optimizer state is the largest file of all.
        make_run(tmp_path / name, steps=7)
        tiny_model("qwen3", head_width=128).save_pretrained(tmp_path / name / "model")
    whole, full = (RunFolder.existing(tmp_path / name) for name in ("whole", "full"))
    config = {name: load_config(tmp_path / name / "config.json") for name in ("whole", "full")}
    run_trainer(whole, config["whole"])
    run_trainer(full, config["full"], stopping=StopAfter(3))
    sound = Checkpoints(full.checkpoints, keep=2).newest()
    assert sound is not None and sound.step < 5
    ends = pytest.raises(UserError, match=r"checkpoint of step 7 has no room in .* \(File too large\); free")
    with capture_logs() as lines, full_disk(above_bytes=400_000), ends:
        run_trainer(full, config["full"])
    refused = [line for line in lines if line["event"] == "checkpoint not written, training goes on"]
    first = sound.step + 2 - sound.step % 2
    assert [line["reason"].split()[4] for line in refused] == [str(step) for step in range(first, 7)]
    assert Checkpoints(full.checkpoints, keep=2).newest() == sound
    assert not (full.checkpoints / ".draft").exists()
    run_trainer(full, config["full"])
    assert digest_of(full.path) == digest_of(whole.path)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
    whole, config = make_run(tmp_path / "whole")
    run_trainer(whole, config)
    damaged, config = make_run(tmp_path / "damaged")
    run_trainer(damaged, config)
    damage(damaged.checkpoints / "step-000004")
    hub = run_trainer(damaged, config)
    assert "damaged checkpoint ignored" in capsys.readouterr().out
    assert [done.step for done in hub.steps_done] == [3, 4]
    assert digest_of(damaged.path) == digest_of(whole.path)


def test_a_checkpoint_saved_after_a_damaged_later_one_is_kept_in_its_place(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, learner={"keep_checkpoints": 1})
    run_trainer(folder, config)
    damage(folder.checkpoints / "step-000004")
    run_trainer(folder, config, stopping=StopAfter(5))
    saved = Checkpoints(folder.checkpoints, keep=1).newest()
    assert saved is not None and 0 < saved.step < 4
    assert [path.name for path in folder.checkpoints.iterdir()] == [f"step-{saved.step:06d}"]


def test_a_trainer_told_to_stop_while_waiting_saves_and_ends(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path)
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(NoHub, match="no hub of run"):
        Hub(folder, stopping)
    run_trainer(folder, config, stopping=StopAfter(3))
    assert Checkpoints(folder.checkpoints, keep=2).newest() is not None


def test_replay_from_the_journal_gives_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = make_run(tmp_path, learner={"optimizer_steps_per_batch": 2, "objective": {"name": "decoupled"}})
    run_trainer(folder, config)
    assert replay.run([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(digest_of(tmp_path)) == 2
    assert "equal" in printed


def test_replay_of_a_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    shutil.rmtree(folder.checkpoints / "step-000004")
    run_trainer(folder, config)
    assert replay.run([str(tmp_path)]) == 0


def settle(folder: RunFolder, *, upto: int, archive: bool) -> None:
    """What the hub does once every kept checkpoint is of step `upto` or later."""
    with Journal.open(folder.journal) as journal:
        settler = Settler(journal, archive=folder.archive if archive else None)
        settler.allow(upto)
        with journal.transaction():
            assert settler.settle_some() == 2 * upto


def test_replay_finds_episodes_in_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    settle(folder, upto=2, archive=True)
    assert replay.run([str(tmp_path)]) == 0
    assert "replayed 4 steps" in capsys.readouterr().out


def test_replay_of_what_was_dropped_begins_at_the_oldest_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    settle(folder, upto=2, archive=False)
    assert replay.run([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the episodes of steps 1 to 2 were dropped (hub.keep_trained); from the checkpoint of step 2" in printed
    assert "replayed 2 steps" in printed
    shutil.rmtree(folder.checkpoints / "step-000002")
    shutil.rmtree(folder.checkpoints / "step-000004")
    with pytest.raises(UserError, match="there is nothing to replay from"):
        replay.run([str(tmp_path)])


def test_replay_notices_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    config_file = folder.config
    config_file.write_text(config_file.read_text().replace('"lr":0.01', '"lr":0.011'))
    assert replay.run([str(tmp_path)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_replay_under_another_objective_trains_on_the_same_episodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    assert replay.run([str(tmp_path), "--objective", "tis", "learner.credit=leave_one_out"]) == 0
    printed = capsys.readouterr().out
    assert "replayed 4 steps" in printed
    assert digest_of(tmp_path) not in printed
