"""`python -m actors.engines.sglang.leash COMMAND …`: runs a server that must not outlive the actor that started it.

The actor holds the other end of standard input. When it closes, because the actor wants so or was killed, the server
and all its processes are killed; when the server ends by itself, so does the leash, with the same exit status. A killed
server leaves sockets and files behind, so it gets a temporary folder of its own, which goes with it, and so does the
shared memory that its processes were seen to hold.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from matpo.rooms import held, room

SHARED: Final = Path("/dev/shm")
KINDS: Final = ("sglang_loads_", "sgl_shm_", "multi_tokenizer_args_", "sem.mp-", "psm_", "nccl-", "cuda.shm.")
"""How names of shared memory begin that SGLang and its libraries make; others may be somebody else's."""
LIBC: Final = ctypes.CDLL(None)
PR_SET_PDEATHSIG: Final = 1
LOOK_EVERY_S: Final = 30.0
"""A server whose processes all die at once cannot be asked any more what it held."""


def die_with_parent() -> None:
    """Called in the server's process: it ends with the leash, even if that is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(leader: int) -> None:
    """End a process and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def waited(server: subprocess.Popen[bytes]) -> int | None:
    """Its exit status; None when it goes on after `LOOK_EVERY_S`."""
    try:
        return server.wait(LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return None


def shared_memory(leader: int) -> set[Path]:
    """What the processes of a session hold of the shared memory that SGLang makes."""
    found = set[Path]()
    for entry in Path("/proc").iterdir():
        with suppress(ValueError, OSError):  # no process, or one that has just ended
            if os.getsid(int(entry.name)) == leader:
                lines = (entry / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
                found |= {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return {path for path in found if path.parent == SHARED and path.name.startswith(KINDS)}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever signals the actor's group must not leave a server behind
    with held(room(Path(tempfile.gettempdir()), "matpo-server", uuid.uuid4().hex), setting="TMPDIR") as folder:
        status = run(sys.argv[1:], folder)
    # Not sys.exit: a thread is still reading.
    os._exit(status if status >= 0 else 128 - status)


def run(command: Sequence[str], folder: Path) -> int:
    """The server, from its start until nothing of it is left; returns its exit status."""
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(folder)},
        preexec_fn=die_with_parent,
    )
    shared = set[Path]()

    def end() -> None:
        shared.update(shared_memory(server.pid))
        kill_group(server.pid)

    def wait_for_end_of_input() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            continue
        end()

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    while (status := waited(server)) is None:
        shared.update(shared_memory(server.pid))
    end()
    for path in shared:
        path.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    main()
