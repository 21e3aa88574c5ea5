"""The trainer pauses or goes back when its figures say that it collapses, and a replay follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import orjson
import pytest

from learner.trainer import replay
from learner.trainer.checkpoint import Checkpoints
from learner.trainer.guard import Guard
from learner.trainer.ranks import ALONE
from matpo.collapse import Alarm, read_rollbacks
from matpo.config import Config
from matpo.errors import Paused
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.metrics import read_metrics
from protocols.records import version_of
from tests.learner.trainer import rank_cases
from tests.learner.trainer.pair import Pair
from tests.learner.trainer.runs import JournalHub, StopAfter, damage, ledger, make_run, run_trainer


def alarmed(folder: RunFolder, action: Literal["off", "warn", "pause", "rollback"]) -> Config:
    """The run's config with limits so tight that every step raises the alarm."""
    content = orjson.loads(folder.config.read_bytes())
    content["learner"]["collapse"] = {"action": action, "signs": 1, "patience_steps": 1, "mismatch_kl": 1e-9}
    folder.config.write_bytes(orjson.dumps(content))
    return load_config(folder.config)


def newest(folder: RunFolder) -> int:
    state = Checkpoints(folder.checkpoints, keep=2).newest()
    assert state is not None
    return state.step


def test_every_step_tells_its_vitals_and_the_signs_seen(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path, steps=2)
    run_trainer(folder, alarmed(folder, "warn"))
    lines = [line for _, line in read_metrics(folder.metrics)]
    assert [line["vitals"]["step"] for line in lines if isinstance(line["vitals"], dict)] == [1, 2]
    assert "is above 1e-09 nats per token" in str(lines[0]["vitals"])


def test_a_run_that_pauses_is_saved_and_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path, steps=3)
    with pytest.raises(Paused, match="training is paused and saved at step 1: signs of a collapse since step 1"):
        run_trainer(folder, alarmed(folder, "pause"))
    assert newest(folder) == 1
    run_trainer(folder, alarmed(folder, "off"))
    assert newest(folder) == 3


def test_a_rollback_forgets_what_came_after_the_last_good_checkpoint_and_slows_down(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, steps=6)
    run_trainer(folder, config, stopping=StopAfter(5))
    good = newest(folder)
    run_trainer(folder, alarmed(folder, "rollback"))
    (rollback,) = read_rollbacks(folder.rollbacks)
    assert (rollback.step, rollback.to_step, newest(folder)) == (good + 1, good, good)
    hub = run_trainer(folder, alarmed(folder, "off"))
    assert hub.published[0].version == version_of(lineage=2, step=good)
    assert {(state, count) for state, _, _, count in ledger(folder)} == {("trained", 4), ("filtered", 2)}
    rates = {line["step"]: line["lr"] for _, line in read_metrics(folder.metrics)}
    assert rates == {step: pytest.approx(0.01 if step <= good else 0.005) for step in range(1, 7)}
    assert replay.run([str(tmp_path)]) == 0


def test_a_run_with_no_checkpoint_from_before_the_signs_pauses_instead(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path, steps=3)
    with pytest.raises(Paused, match="no checkpoint is older than the signs of a collapse since step 1"):
        run_trainer(folder, alarmed(folder, "rollback"))


def test_a_rollback_passes_a_damaged_checkpoint_over_and_removes_nothing_for_it(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path)
    run_trainer(folder, config)
    damage(folder.checkpoints / "step-000002")
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    assert checkpoints.steps_before(5) == [4] and checkpoints.steps_before(4) == []
    guard = Guard.of(folder, alarmed(folder, "rollback"), ALONE)
    guard.raised, guard._alarm = True, Alarm(step=4, since_step=3, signs=("a sign",))
    with pytest.raises(Paused, match="no checkpoint is older than the signs of a collapse since step 3"):
        guard.conclude(checkpoints)
    assert newest(folder) == 4


def test_going_back_to_the_same_checkpoint_in_vain_ends_in_a_pause(tmp_path: Path) -> None:
    folder, config = make_run(tmp_path, steps=4)
    run_trainer(folder, config, stopping=StopAfter(3))
    for _ in range(3):
        run_trainer(folder, alarmed(folder, "rollback"))
    with pytest.raises(Paused, match="3 times did not help"):
        run_trainer(folder, alarmed(folder, "rollback"))


def test_rollback_is_refused_with_a_single_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"set learner.keep_checkpoints to 2 or more"):
        Config.model_validate(
            {
                "model": {"path": "."},
                "data": {name: {"kind": "world"} for name in ("train", "evaluation")},
                "episode": {"roles": {"planner": {"system": "p"}}},
                "learner": {"keep_checkpoints": 1, "collapse": {"action": "rollback"}},
            }
        )


@pytest.mark.parametrize(("action", "starts", "kept"), [("pause", 1, 2), ("rollback", 4, 1)])
def test_two_ranks_pause_and_go_back_together_as_one_does(
    pair: Pair, tmp_path: Path, action: Literal["pause", "rollback"], starts: int, kept: int
) -> None:
    """Step 1 is saved; from then on every step raises the alarm, and a rollback does not help."""
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        folder, config = make_run(tmp_path / str(ranks), learner={"checkpoint_every_steps": 9})
        run_trainer(folder, config, stopping=StopAfter(3))
        assert newest(folder) == 1
        alarmed(folder, action)
        case = rank_cases.run_trainer
        with JournalHub(folder):
            ended = pair.do(case, folder.path) if ranks == 2 else [case(ALONE, folder.path)]
        for one in ended:
            assert one["starts"] == starts
            assert "paused" in one["paused"] and "at step 2" in one["paused"] and str(folder.path) in one["paused"]
        assert newest(folder) == kept
        assert [(one.step, one.to_step) for one in read_rollbacks(folder.rollbacks)] == [(2, 1)] * (starts - 1)
