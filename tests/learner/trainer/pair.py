"""Two real processes that are the ranks of one trainer, over gloo."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import orjson

from tests.learner.trainer.rank_cases import Found

ANSWER_LIMIT_S = 120.0


class Pair:
    """Two processes that meet as ranks and then do the cases they are told."""

    def __init__(self, *, rank_timeout_s: float, device: str = "cpu") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.learner.trainer.rank_cases", str(rank_timeout_s), device],
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # a line read ahead would be waited for in vain
            )
            for rank in range(2)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()

    def begin(self, case: Callable[..., Found], folder: Path, *trained: str) -> None:
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write((" ".join([case.__name__, str(folder), *trained]) + "\n").encode())
            rank.stdin.flush()

    def answer(self, rank: int) -> Found:
        """What a rank found; fails if it takes too long or ended."""
        output = self._ranks[rank].stdout
        assert output is not None
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while time.monotonic() < deadline:
            if select.select([output], [], [], deadline - time.monotonic())[0]:
                line = output.readline()
                assert line, f"rank {rank} ended"
                if line.startswith(b'{"event') or not line.startswith(b"{"):
                    continue  # a line of its log
                found: Found = orjson.loads(line)
                if "timestamp" not in found:
                    return found
        raise TimeoutError(f"rank {rank} gave no answer within {ANSWER_LIMIT_S:g} s")

    def do(self, case: Callable[..., Found], folder: Path, *trained: str) -> list[Found]:
        self.begin(case, folder, *trained)
        return [self.answer(rank) for rank in range(2)]
