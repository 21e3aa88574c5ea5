"""The learner's supervisor, with small scripts for children."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from learner.__main__ import prepare
from learner.supervisor import Supervisor
from matpo.errors import Paused, UserError
from matpo.keeper import Kept, Patience, always
from matpo.owner import UNOWNED

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
here = Path({folder!r})
def starts(name):
    with (here / name).open("a") as file:
        file.write("x")
    return len((here / name).read_text())
def until(name):
    while not (here / name).exists():
        time.sleep(0.01)
def on_term(name, code):
    def leave(*_):
        with (here / "order").open("a") as file:
            file.write(name + " ")
        sys.exit(code)
    signal.signal(signal.SIGTERM, leave)
"""
FOREVER = "\n(here / (name + '.up')).touch()\nwhile True: time.sleep(0.05)"


def supervisor(folder: Path, *, hub: str, trainer: str) -> Supervisor:
    def child(name: str, script: str, outlived_by: Sequence[Kept] = ()) -> Kept:
        source = PRELUDE.format(folder=str(folder)) + f"name = {name!r}\n" + script
        return Kept(
            name,
            always(sys.executable, "-S", "-c", source),
            output=folder / "logs" / f"{name}.out",
            environment=os.environ,
            patience=Patience(pauses_s=(0.01,)),
            outlived_by=outlived_by,
        )

    kept = child("hub", hub)
    return Supervisor(
        hub=kept,
        trainer=child("trainer", trainer, [kept]),
        owner=UNOWNED,
        trainer_leave_limit_s=5.0,
        hub_leave_limit_s=5.0,
    )


async def finish(made: Supervisor) -> int:
    with anyio.fail_after(30):
        return await made.run()


async def test_the_learner_ends_with_0_when_the_hub_says_the_run_is_complete(tmp_path: Path) -> None:
    assert await finish(supervisor(tmp_path, hub="until('done')", trainer="(here / 'done').touch()")) == 0


async def test_a_killed_trainer_is_started_again(tmp_path: Path) -> None:
    trainer = "n = starts('n')\nif n < 3: os.kill(os.getpid(), signal.SIGKILL)\n(here / 'done').touch()"
    assert await finish(supervisor(tmp_path, hub="until('done')", trainer=trainer)) == 0
    assert (tmp_path / "n").read_text() == "xxx"


async def test_a_trainer_that_paused_is_not_started_again_and_ends_the_learner_with_its_words(tmp_path: Path) -> None:
    trainer = "starts('n')\nprint('error: training is paused', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(Paused, match=r"^training is paused$"):
        await finish(supervisor(tmp_path, hub=FOREVER, trainer=trainer))
    assert (tmp_path / "n").read_text() == "x"


async def test_a_killed_hub_is_started_again_and_the_trainer_is_left_alone(tmp_path: Path) -> None:
    hub = "until('m')\nn = starts('n')\nif n < 3: os.kill(os.getpid(), signal.SIGKILL)\n(here / 'done').touch()"
    made = supervisor(tmp_path, hub=hub, trainer="starts('m')\nuntil('done')")
    assert await finish(made) == 0
    assert ((tmp_path / "n").read_text(), (tmp_path / "m").read_text()) == ("xxx", "x")


async def test_something_to_fix_ends_the_learner_with_the_childs_own_words(tmp_path: Path) -> None:
    hub = "print('error: port 1 is taken; set hub.listen', file=sys.stderr)\nsys.exit(2)"
    with pytest.raises(UserError, match=r"hub could not go on: port 1 is taken; set hub\.listen"):
        await finish(supervisor(tmp_path, hub=hub, trainer=FOREVER))


async def test_a_child_that_always_dies_is_given_up(tmp_path: Path) -> None:
    trainer = "starts('n')\nprint('ValueError: no', file=sys.stderr)\nsys.exit(1)"
    with pytest.raises(UserError, match="trainer died 10 times in a row: ValueError: no"):
        await finish(supervisor(tmp_path, hub=FOREVER, trainer=trainer))
    assert (tmp_path / "n").read_text() == "x" * 10


STOP_ME = "until('hub.up')\nos.kill(os.getppid(), signal.SIGTERM)"


async def test_a_signal_ends_the_trainer_before_the_hub_and_the_exit_code_says_so(tmp_path: Path) -> None:
    trainer = f"on_term('trainer', 0)\n{STOP_ME}{FOREVER}"
    made = supervisor(tmp_path, hub="on_term('hub', 130)" + FOREVER, trainer=trainer)
    assert await finish(made) == 130
    assert (tmp_path / "order").read_text() == "trainer hub "


async def test_who_does_not_leave_in_time_is_killed(tmp_path: Path) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    made = supervisor(tmp_path, hub=deaf + FOREVER, trainer=deaf + STOP_ME + FOREVER)
    made.trainer_leave_limit_s = made.hub_leave_limit_s = 0.1
    assert await finish(made) == 130


def test_a_learner_without_a_config_or_a_run_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a config file"):
        prepare(None, [], None)
    with pytest.raises(UserError, match="give a config file"):
        prepare(None, [], tmp_path / "new")


def test_an_existing_run_keeps_its_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert prepare(None, [], tmp_path).path == tmp_path
    with pytest.raises(UserError, match="keeps the settings"):
        prepare(None, ["learner.lr=1"], tmp_path)
