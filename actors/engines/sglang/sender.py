"""`PYTHON sender.py RANKS GROUP ADDRESS BACKEND DEADLINE_S`: broadcasts bytes of files to the ranks of one server.

Run by path with the interpreter of SGLang's environment, whose torch speaks the same language as the server's; it
imports nothing of ours. Standard input brings one JSON command a line, standard output one JSON reply each, in order.
The end of standard input is the end of the sender, whatever it is doing: it must not outlive its actor.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world


def join(store: Store, *, ranks: int, group: str, backend: str, deadline: timedelta) -> dist.ProcessGroup:
    """Rank 0 of a group of its own, made as SGLang makes its side: `init_process_group` would use other keys."""
    pool, _ = _new_process_group_helper(
        1 + ranks, 0, [], Backend(backend), PrefixStore(group, store), group_name=GroupName(group), timeout=deadline
    )
    if not isinstance(pool, dist.ProcessGroup):
        raise RuntimeError(f"no process group {group}")
    _world.pg_group_ranks[pool] = {rank: rank for rank in range(1 + ranks)}
    return pool


def broadcast(file: str, start: int, size: int, pool: dist.ProcessGroup, device: torch.device) -> None:
    """Send `size` bytes of `file` from byte `start` on, straight from the mapped file where the device is the CPU."""
    # Mode c: torch wants memory it could write to; nothing is written.
    content = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c", offset=start, shape=(size,)))
    dist.broadcast(content.to(device), src=0, group=pool)
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_commands(commands: queue.SimpleQueue[str]) -> None:
    """Queue the lines of standard input; at its end, end the process."""
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)


def reply(**content: object) -> None:
    """One line to the actor."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def main() -> None:
    ranks, group, address, backend, deadline_s = sys.argv[1:]
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read_commands, args=(commands,), daemon=True).start()
    deadline = timedelta(seconds=float(deadline_s))
    store = TCPStore(address, 0, 1 + int(ranks), is_master=True, timeout=deadline, wait_for_workers=False)
    reply(port=store.port)
    try:
        pool = join(store, ranks=int(ranks), group=group, backend=backend, deadline=deadline)
        reply(joined=True)
        device = torch.device("cpu" if backend == "gloo" else "cuda")
        while True:
            command = json.loads(commands.get())
            broadcast(command["file"], command["start"], command["size"], pool, device)
            reply(sent=command["size"])
    except (RuntimeError, OSError, ValueError) as error:
        reply(error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    os._exit(1)


if __name__ == "__main__":
    main()
