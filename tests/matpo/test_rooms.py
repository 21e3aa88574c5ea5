"""Folders outside a run's own: gone with the last who uses them, or with the next after a kill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from matpo.errors import UserError
from matpo.rooms import held, room

HOLD = """
import sys
from pathlib import Path
from matpo.rooms import held
with held(Path(sys.argv[1]), setting="x") as folder:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").touch()
    print("holds", flush=True)
    sys.stdin.read()
"""


def test_a_folder_goes_with_the_last_who_uses_it(tmp_path: Path) -> None:
    folder = room(tmp_path, "kind", "one")
    with held(folder, setting="x"):
        with held(folder, setting="x"):
            (folder / "file").touch()
        assert (folder / "file").is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_that_needs_one_of_its_kind_and_the_living_keep_theirs(
    tmp_path: Path,
) -> None:
    folder, living, other_kind = (room(tmp_path, kind, name) for kind, name in (("a", "1"), ("a", "2"), ("b", "1")))
    other_kind.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        with held(living, setting="x"):
            assert (folder / "inner" / "file").is_file()
            process.kill()
            process.wait(timeout=30)
            with held(room(tmp_path, "a", "3"), setting="x") as third:
                assert sorted(tmp_path.iterdir()) == sorted((living, third, other_kind))


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_that_others_may_enter_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    folder = room(tmp_path, "kind", "one")
    folder.mkdir()
    with held(room(tmp_path, "kind", "two"), setting="x"):
        assert not folder.exists()  # nobody used it
    with held(folder, setting="x"):
        folder.chmod(mode)
        with pytest.raises(UserError, match="is not ours alone; remove it, or set x"), held(folder, setting="x"):
            pass
