"""`python -m actors.engines.sglang.leash COMMAND …`: runs a server that must not outlive the actor that started it.

The actor holds the other end of standard input. When it closes, because the actor wants so or was killed, the server
and all its processes are killed; when the server ends by itself, so does the leash, with the same exit status. A killed
server leaves sockets and files behind, so it gets a temporary folder of its own, which goes with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress


def kill_group(leader: int) -> None:
    """End a process and everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever signals the actor's group must not leave a server behind
    room = tempfile.TemporaryDirectory(prefix="matpo-server-", ignore_cleanup_errors=True)
    server = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, env=os.environ | {"TMPDIR": room.name}
    )

    def wait_for_end_of_input() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            continue
        kill_group(server.pid)

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    status = server.wait()
    kill_group(server.pid)
    room.cleanup()
    # Not sys.exit: the thread is still reading.
    os._exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
