"""The launcher of a trainer's ranks, with small scripts for ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest

from learner.__main__ import prepare, supervisor
from learner.launch import Launch, ranks_of
from matpo.errors import PAUSED, USER_ERROR, Paused, UserError
from matpo.folder import RunFolder
from matpo.keeper import Kept, always
from matpo.launched import code_for_launcher
from matpo.owner import UNOWNED
from tests.learner.test_supervisor import FOREVER, PRELUDE


def launch(folder: Path, *scripts: str) -> Launch:
    def rank(number: int, script: str) -> Kept:
        source = PRELUDE.format(folder=str(folder)) + f"name = '{number}'\n" + script
        return Kept(
            f"trainer-{number}",
            always(sys.executable, "-S", "-c", source),
            output=folder / f"trainer-{number}.out",
            environment=os.environ,
        )

    return Launch(tuple(rank(number, script) for number, script in enumerate(scripts)), UNOWNED)


async def finish(made: Launch) -> int:
    with anyio.fail_after(30):
        return await made.run()


async def test_the_launcher_ends_with_0_when_every_rank_did(tmp_path: Path) -> None:
    assert await finish(launch(tmp_path, "until('done')", "(here / 'done').touch()")) == 0


async def test_the_first_rank_that_dies_ends_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
    dies = "until('0.up')\nprint('RuntimeError: no')\nos.kill(os.getpid(), signal.SIGKILL)"
    assert await finish(launch(tmp_path, deaf, dies)) == 1
    assert "error: trainer-1 ended with code -9: RuntimeError: no" in capsys.readouterr().err


async def test_what_a_user_can_fix_is_said_even_if_another_rank_failed_of_it_first(tmp_path: Path) -> None:
    fix = "until('lost')\nprint('error: model is none; give another', file=sys.stderr)\nsys.exit(2)"
    lost = "(here / 'lost').touch()\nuntil('never')"
    with pytest.raises(UserError, match="model is none; give another"):
        await finish(launch(tmp_path, fix, lost))


async def test_a_pause_of_all_ranks_is_one(tmp_path: Path) -> None:
    paused = "print('error: training is paused', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(Paused, match=r"^training is paused$"):
        await finish(launch(tmp_path, paused, paused))


def test_a_launcher_that_would_start_a_paused_run_again_is_told_that_all_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert code_for_launcher(PAUSED) == PAUSED, "no launcher"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for restarts, code in (("0", 0), ("2", 0), ("3", PAUSED)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert code_for_launcher(PAUSED) == code
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert [code_for_launcher(code) for code in (0, 1, USER_ERROR, 130)] == [0, 1, USER_ERROR, 130]


async def test_a_signal_is_handed_on_and_every_rank_may_finish(tmp_path: Path) -> None:
    slow = "on_term('early', 130)" + FOREVER
    # The second rank saves until the first has gone.
    late = (
        "def leave(*_):\n    until('order')\n    (here / 'saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, leave)\nuntil('0.up')\nos.kill(os.getppid(), signal.SIGTERM)" + FOREVER
    )
    assert await finish(launch(tmp_path, slow, late)) == 130
    assert (tmp_path / "saved").exists()


def test_ranks_are_told_where_they_meet_and_who_they_are(tmp_path: Path) -> None:
    first, second = ranks_of(RunFolder(tmp_path), 2)
    with first, second:
        made = (first, second)
    told = [[rank.environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")] for rank in made]
    assert told == [["0", "0", "2", "127.0.0.1"], ["1", "1", "2", "127.0.0.1"]]
    assert len({rank.environment["MASTER_PORT"] for rank in made}) == 1


def test_launched_ranks_share_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = Path("configs/quickstart.toml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give --run with a folder to all ranks"):
        prepare(quickstart, [], None)
    first = prepare(quickstart, ["run.steps=3"], tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    assert prepare(quickstart, ["run.steps=3"], tmp_path / "run") == first
    with pytest.raises(UserError, match="keeps the settings"):
        prepare(quickstart, ["run.steps=4"], tmp_path / "run")


@pytest.mark.parametrize(("ranks", "launched", "module"), [(1, 1, "trainer"), (8, 1, "launch"), (1, 8, "trainer")])
async def test_who_starts_the_ranks(
    ranks: int, launched: int, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(launched))
    made = supervisor(RunFolder(tmp_path), UNOWNED, ranks=ranks)
    with made.hub, made.trainer:
        assert (await made.trainer.command())[2] == f"learner.{module}"
