"""One chaos run: the job, so many faults, calm, an orderly end, and the account of every episode."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from learner.doctor import examine
from matpo.metrics import read_metrics
from protocols.records import Record
from tests.chaos.consumption import judge, read_consumption
from tests.chaos.faults import Fault, schedule
from tests.chaos.job import Job, Settings
from tests.chaos.processes import until
from tests.chaos.watch import Watch

CALM_STEPS = 3
"""Steps taken after the last fault: the run has overcome all of them."""
CALM_LIMIT_S = 400.0
UNDER_WAY = 12
"""Faults that last at the same time, at most."""


class ChaosReport(Record):
    """What happened and what became of everything."""

    faults: int
    lost: int
    """Trees an actor was told are safe, or had finished, that are nowhere; with trees of which trainer and journal say
    different things."""
    doubled: int
    """Trees the surviving weights consumed more than once."""
    trained: int
    filtered: int
    pending: int
    seconds: float
    seed: int
    by_kind: dict[str, int]
    tasks: int
    tasks_trained: int
    tasks_filtered: int
    tasks_pending: int
    """Being played or waiting for a step."""
    in_outboxes: int
    """Finished trees whose actor was told to leave before the hub had them; they wait on its disk."""
    promised: int
    """Trees noted from outside while the run went on, all of which were looked for afterwards."""
    steps: int
    steps_undone: int
    """Taken, and lost with a trainer that was killed before its checkpoint."""
    lineages: int
    resumed: int
    """Times `matpo run` itself was started again."""
    gave_up: int
    """Times an actor outside `matpo run` ended with an error for people, and was started again by its owner."""
    adds_up: bool
    exit_code: int
    """Of `matpo run` after Ctrl-C: 130."""
    reward_first: float
    """Mean over the first `REWARD_STEPS` surviving steps …"""
    reward_last: float
    """… and over as many last ones."""


@dataclass(slots=True)
class Chaos:
    """Carries out a schedule."""

    job: Job
    seed: int
    faults: int
    seconds: float
    """The faults are spread over so long."""
    rare: bool
    say: Callable[[str], None]
    done: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    _room: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(UNDER_WAY))

    async def play(self) -> None:
        """Until so many faults have happened and been undone."""
        pauses = random.Random(self.seed + 1)
        began = time.monotonic()
        async with anyio.create_task_group() as under_way:
            for fault in schedule(self.seed, rare=self.rare):
                if fault.number - self.missed.total() >= self.faults:
                    break
                await self._room.acquire_on_behalf_of(fault)
                under_way.start_soon(self._one, fault)
                due = began + self.seconds * (fault.number + pauses.random()) / self.faults
                await anyio.sleep(max(0.05, due - time.monotonic()))

    async def _one(self, fault: Fault) -> None:
        try:
            happened = await self.job.strike(fault)
        finally:
            self._room.release_on_behalf_of(fault)
        (self.done if happened else self.missed)[fault.name] += 1
        total = self.done.total()
        if happened and total % 20 == 0:
            self.say(f"{total} of {self.faults} faults, step {steps_taken(self.job)}")


async def play(
    parent: Path,
    settings: Settings,
    *,
    seed: int,
    faults: int,
    seconds: float,
    rare: bool,
    say: Callable[[str], None] = lambda _: None,
) -> ChaosReport:
    """Run it all below `parent` and account for everything."""
    async with Job.started(parent, settings) as job, anyio.create_task_group() as tasks:
        watch = Watch(job)
        tasks.start_soon(watch.forever)
        await steps_reach(job, 1)
        began = time.monotonic()
        chaos = Chaos(job, seed, faults, seconds, rare, say)
        await chaos.play()
        took_s = time.monotonic() - began
        calm_at = steps_taken(job)
        say(f"{chaos.done.total()} faults in {took_s:.0f} s; calm from step {calm_at}")
        await steps_reach(job, calm_at + CALM_STEPS)
        code = await job.stop()
        tasks.cancel_scope.cancel()
        report = account(watch, chaos, seconds=took_s, exit_code=code)
        keep_logs(job)
    return report


def account(watch: Watch, chaos: Chaos, *, seconds: float, exit_code: int) -> ChaosReport:
    """What became of everything, once nobody is at work any more."""
    job = watch.job
    doctor, promised = examine(job.run, now=time.time()), watch.promised()
    verdict = judge(job.run.path, promised)
    ledger = doctor.ledger
    first, last = rewards(job)
    lines = [line for line in job.run.consumed.read_text(encoding="utf-8").splitlines() if line]
    starts = sum('"event":"start"' in line for line in lines)
    return ChaosReport(
        faults=chaos.done.total(),
        lost=len(verdict.lost) + len(verdict.disagree),
        doubled=len(verdict.doubled),
        trained=ledger.trained,
        filtered=ledger.filtered,
        pending=ledger.pending,
        seconds=round(seconds, 1),
        seed=chaos.seed,
        by_kind=dict(sorted(chaos.done.items())),
        tasks=ledger.tasks,
        tasks_trained=ledger.tasks_trained,
        tasks_filtered=ledger.tasks_filtered,
        tasks_pending=ledger.tasks_open + ledger.tasks_complete,
        in_outboxes=len(watch.waiting()),
        promised=len(promised),
        steps=verdict.steps,
        steps_undone=len(lines) - starts - verdict.steps,
        lineages=starts,
        resumed=job.resumed,
        gave_up=job.gave_up,
        adds_up=doctor.adds_up,
        exit_code=exit_code,
        reward_first=round(first, 4),
        reward_last=round(last, 4),
    )


def rewards(job: Job) -> tuple[float, float]:
    """Mean reward of the first and of the last tenth (at least three) of the surviving steps."""
    steps = read_consumption(job.run.consumed).step
    of_step: dict[int, float] = {}
    for _, line in read_metrics(job.run.metrics):
        if line["stage"] == "trainer":
            step, reward = line["step"], line["reward_mean"]
            assert isinstance(step, int) and isinstance(reward, float)
            of_step[step] = reward  # the last to take a step is the one that stands
    kept = [of_step[step] for step in sorted(of_step) if step <= steps]
    count = max(3, len(kept) // 10)
    return sum(kept[:count]) / len(kept[:count]), sum(kept[-count:]) / len(kept[-count:])


def steps_taken(job: Job) -> int:
    """By the trainer's own record."""
    return read_consumption(job.run.consumed).step if job.run.consumed.is_file() else 0


async def steps_reach(job: Job, step: int) -> None:
    """Until the trainer has taken so many. Fails when it does not get there in time."""
    with anyio.fail_after(CALM_LIMIT_S):
        await until(lambda: steps_taken(job) >= step)


def keep_logs(job: Job) -> None:
    """The disks go; what their actors logged stays below the run's folder."""
    for number, disk in enumerate(job.disks):
        shutil.copytree(disk.folder / "logs", job.run.path / "logs" / f"far-{number}", dirs_exist_ok=True)


def say_on_stderr(words: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {words}\n")
