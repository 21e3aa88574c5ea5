"""A trainer that outlived its owner and its hub, and the one that was started meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from learner.trainer import __main__ as trainer
from learner.trainer.turn import only_trainer
from tests.learner.trainer.runs import make_run

NOBODY_STOPS = threading.Event()


def test_a_trainer_begins_only_when_the_one_before_it_has_saved_and_is_gone(tmp_path: Path) -> None:
    lock, said = tmp_path / "trainer.lock", list[str]()
    with only_trainer(lock, NOBODY_STOPS):

        def succeed() -> None:
            with only_trainer(lock, NOBODY_STOPS):
                said.append("begun")

        successor = threading.Thread(target=succeed)
        successor.start()
        with pytest.raises(TimeoutError), only_trainer(lock, NOBODY_STOPS, patience_s=0.5):
            pass
        said.append("saved")
    successor.join(timeout=30)
    assert said == ["saved", "begun"]


def test_a_trainer_beside_another_that_stays_ends_by_itself_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_run(tmp_path)
    monkeypatch.setattr(trainer, "stop_on_signals", threading.Event.set)
    with only_trainer(folder.trainer_lock, NOBODY_STOPS):
        assert trainer.run(["--run", str(tmp_path)]) == 1
    assert f"is trained by process {os.getpid()} on " in capsys.readouterr().err
    assert not folder.checkpoints.exists() and not folder.consumed.exists()
