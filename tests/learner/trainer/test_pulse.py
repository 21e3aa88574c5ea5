"""The trainer's pulse: it says what the trainer is busy with, and names a hub that does not answer."""

from __future__ import annotations

import time
from pathlib import Path

from learner.trainer.pulse import Pulse
from protocols.messages import TrainerBeat
from tests.learner.trainer.runs import JournalHub, make_run


def next_beat(hub: JournalHub, what: str) -> TrainerBeat:
    """The next beat whose first wait is for `what`."""
    while True:
        beat = hub.beats.get(timeout=20.0)
        if [wait.what for wait in beat.waits][:1] == [what]:
            return beat


def test_the_hub_hears_what_the_trainer_is_busy_with(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path)
    with JournalHub(folder) as hub, Pulse(folder, every_s=0.01) as pulse:
        assert hub.beats.get(timeout=20.0).waits == ()
        pulse.enter("step", 3)
        assert next_beat(hub, "step 3 to be computed").waits[0].who == "trainer"
        pulse.enter("checkpoint", 3)
        next_beat(hub, "the checkpoint of step 3 to be written")
        pulse.rest()
        while hub.beats.get(timeout=20.0).waits:
            pass


def test_a_hub_that_does_not_answer_is_named(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path)
    pulse = Pulse(folder)
    assert pulse.waits() == ()
    pulse._answered_s = time.monotonic() - 21.0
    (wait,) = pulse.waits()
    assert (wait.name, wait.who, wait.since_s > wait.limit_s) == ("hub_answer", "trainer", True)
