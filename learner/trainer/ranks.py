"""The processes that train one policy together: how they meet, and the little they tell each other beside gradients.

Every exchange is collective: all ranks make the same calls in the same order, and each wait ends after the group's
deadline, or at once when another rank died. A rank that lost another ends too; whoever started them starts all again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from matpo.config import Learner
from matpo.errors import Paused, UserError
from matpo.launched import launched_ranks, local_rank, own_rank, restarts

CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together; one alone says everything to itself."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU
    """Where this rank computes."""

    @property
    def first(self) -> bool:
        """Whether this rank is the one that talks to the hub and writes files."""
        return self.rank == 0

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all ranks."""
        together = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(together, dist.ReduceOp.MAX)
        return [float(value) for value in together]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks."""
        together = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            dist.all_reduce(together)
        return [float(value) for value in together]

    def share(self, parts: Sequence[bytes | memoryview] | None) -> list[memoryview]:
        """What the first rank gives, on every rank; the others give None."""
        if self.count == 1:
            return [memoryview(part) for part in parts or ()]
        number = torch.tensor([len(parts or ())])
        dist.broadcast(number, 0)
        sizes = torch.tensor([len(part) for part in parts or ()] or [0] * int(number), dtype=torch.int64)
        dist.broadcast(sizes, 0)
        content = bytearray().join(parts) if parts is not None else bytearray(int(sizes.sum()))
        if content:
            dist.broadcast(torch.frombuffer(content, dtype=torch.uint8), 0)
        ends = np.cumsum([0, *sizes.tolist()]).tolist()
        whole = memoryview(content)
        return [whole[start:end] for start, end in pairwise(ends)]

    def gather(self, part: bytes) -> list[bytes]:
        """What each rank gives, in order of rank, on every rank."""
        if self.count == 1:
            return [part]
        size = int(self.most([len(part)])[0])
        mine = torch.frombuffer(bytearray(part.ljust(size)), dtype=torch.uint8)
        everyones = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyones, mine)
        return [other.numpy().tobytes().rstrip() for other in everyones]


ALONE: Final = Ranks()


@contextmanager
def joined(learner: Learner) -> Iterator[Ranks]:
    """Meet the other ranks, as RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say; alone without them.

    `accelerate launch`, `torchrun` and our own supervisor set these. Raises `UserError` where the launcher started
    another number of ranks than `learner.ranks` names, or this rank has no GPU to itself.
    """
    count, rank = launched_ranks(), own_rank()
    if learner.ranks not in (1, count):
        raise UserError(
            f"learner.ranks is {learner.ranks}, but {count} ranks were launched; remove learner.ranks where"
            " `accelerate launch` or `torchrun` says how many there are"
        )
    if count == 1:
        yield Ranks(device=torch.device(learner.device))
        return
    device = _device(learner.device, local_rank())
    # What ranks tell each other lies in host memory; NCCL opens no connection before the first tensor on a GPU.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=learner.rank_timeout_s)
    store, _, _ = next(rendezvous("env://", rank, count, timeout=limit))
    # A launcher may keep one store for all its restarts, and in it the addresses of ranks that have ended.
    store = PrefixStore(f"start-{restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    try:
        yield Ranks(rank, count, device)
    except Paused:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after another error: it might wait for the rank that is lost


def _device(name: str, local_rank: int) -> torch.device:
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(f"learner.device {name!r} gives all ranks one GPU; set it to {device.type!r}")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no GPU ({torch.cuda.device_count()} are visible);"
            " start as many ranks as there are GPUs"
        )
    device = torch.device(device.type, local_rank)
    torch.cuda.set_device(device)
    return device
