"""The quick-start job as its users run it, with everything around it that can be made to fail: `matpo run` with one
actor, and more actors on links and disks of their own, each kept by its owner."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import urlsplit

import anyio
from anyio.abc import Process

from matpo.errors import UserError
from matpo.folder import RunFolder
from matpo.keeper import Kept
from tests.chaos.faults import Fault, Role
from tests.chaos.link import Link
from tests.chaos.processes import GONE, all_below, until, with_role
from tests.end_to_end.processes import ROOT, environment

START_LIMIT_S, LEAVE_LIMIT_S = 240.0, 240.0
DISK_BYTES = 48 * 2**20
SLOW_LATENCY_S, SLOW_BYTES_PER_S = 0.1, 500_000.0
ALWAYS: tuple[str, ...] = (
    "run.steps=1000000", "run.name=chaos", "actor.count=1", "hub.lease_s=10", "hub.heartbeat_s=1", "hub.max_attempts=8",
    "learner.checkpoint_every_steps=2",
)  # fmt: skip
"""Without end; kills are frequent, so leases are short and an episode is played more often before it is given up."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What job to play, and how much of it is outside `matpo run`."""

    config: Path
    overrides: tuple[str, ...] = ()
    far_actors: int = 2


@dataclass(frozen=True, slots=True)
class Disk:
    """A small file system of its own, where this machine allows one."""

    folder: Path
    mounted: bool

    @classmethod
    def mount(cls, folder: Path) -> Self:
        folder.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "matpo-chaos", str(folder)],
            capture_output=True,
            check=False,
        )
        return cls(folder, done.returncode == 0)

    def fill(self) -> None:
        """Leave no byte."""
        with (self.folder / "ballast").open("ab", buffering=0) as file, suppress(OSError):
            for size in (2**20, 2**12, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@dataclass(slots=True)
class Job:
    """A run under way below `parent`."""

    parent: Path
    settings: Settings
    links: list[Link] = field(default_factory=list)
    disks: list[Disk] = field(default_factory=list)
    folder: RunFolder | None = None
    stopping: anyio.Event = field(default_factory=anyio.Event)
    resumed: int = 0
    """Times that `matpo run --resume` was needed."""
    gave_up: int = 0
    """Times that an actor outside `matpo run` ended with an error for people."""
    _run: Process | None = None

    @classmethod
    @asynccontextmanager
    async def started(cls, parent: Path, settings: Settings) -> AsyncIterator[Self]:
        """Start everything; at the end nothing of it is left."""
        job = cls(parent, settings)
        (parent / "runs").mkdir(parents=True)
        async with AsyncExitStack() as stack:
            stack.callback(job._clear)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(job._keep_run)
            await job._appears()
            for number in range(settings.far_actors):
                disk = Disk.mount(parent / f"disk-{number}")
                job.disks.append(disk)
                link = await stack.enter_async_context(Link.listening(job.hub_place))
                job.links.append(link)
                tasks.start_soon(job._keep_far_actor, number)
            yield job

    @property
    def run(self) -> RunFolder:
        assert self.folder is not None, "the job has begun"
        return self.folder

    @property
    def outboxes(self) -> list[Path]:
        """Where trees wait that are not acknowledged."""
        return [self.run.path / "outbox", *(disk.folder / "outbox" for disk in self.disks)]

    def hub_place(self) -> tuple[str, int] | None:
        """Where the hub listens now."""
        address = self.run.hub_address()
        if address is None:
            return None
        place = urlsplit(address.endpoint)
        return str(place.hostname), int(place.port or 0)

    async def strike(self, fault: Fault) -> bool:
        """Let a fault happen, and undo it after its time; False when there was nothing it could happen to."""
        match fault.what:
            case "disk":
                disks = [disk for disk in self.disks if disk.mounted]
                if not disks:
                    return False
                disk = chosen(disks, fault)
                disk.fill()
                try:
                    await anyio.sleep(fault.lasts_s)
                finally:
                    disk.free()
            case "link":
                link = chosen(self.links, fault)
                if fault.verb == "cut":
                    await link.cut()
                else:
                    link.latency_s, link.bytes_per_s = SLOW_LATENCY_S, SLOW_BYTES_PER_S
                try:
                    await anyio.sleep(fault.lasts_s)
                finally:
                    link.mend()
            case role:
                return await self._strike_process(fault, role)
        return True

    async def stop(self) -> int:
        """Tell everybody to leave in order; returns the exit code of `matpo run`."""
        assert self._run is not None, "the run is going on"
        self.stopping.set()
        self._run.send_signal(signal.SIGINT)
        with anyio.fail_after(LEAVE_LIMIT_S):
            code = await self._run.wait()
            for actor in with_role(self.parent, "actor"):
                with suppress(*GONE):
                    actor.terminate()
            await until(lambda: not list(all_below(self.parent)))
        return code

    async def _strike_process(self, fault: Fault, of: Role) -> bool:
        found = with_role(self.parent, of)
        if not found:
            return False
        process = chosen(found, fault)
        try:
            if fault.verb == "kill":
                process.kill()
                return True
            process.suspend()
        except GONE:
            return False
        try:
            await anyio.sleep(fault.lasts_s)
        finally:
            with suppress(*GONE):
                process.resume()
        return True

    async def _keep_run(self) -> None:
        """`matpo run`, and the same command with `--resume` when it was killed."""
        words = ["run", str(self.settings.config), *ALWAYS, *self.settings.overrides, f"run.dir={self.parent / 'runs'}"]
        while not self.stopping.is_set():
            with (self.parent / "run.out").open("ab") as output:
                self._run = await anyio.open_process(
                    [sys.executable, "-m", "matpo", *words],
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment(),
                )  # fmt: skip
            async with self._run:
                code = await self._run.wait()
            if self.stopping.is_set():
                return
            if code != -signal.SIGKILL:
                raise RuntimeError(f"matpo run ended with {code}: {(self.parent / 'run.out').read_text()[-2000:]}")
            await until(lambda: self.run.hub_address() is None)  # what it left ends by itself
            words = ["run", str(self.settings.config), "--resume", str(self.run.path)]
            self.resumed += 1

    async def _keep_far_actor(self, number: int) -> None:
        """An actor on another machine, as far as it knows: its own disk, its own link, its own owner."""
        disk, link, name = self.disks[number], self.links[number], f"far-{number}"
        words = [sys.executable, "-m", "actors", str(self.run.config), "--hub", link.endpoint]
        words += ["--state", str(disk.folder), "--actor-id", name, "--patience-s", "600"]

        async def command() -> Sequence[str]:
            return words

        output = self.parent / f"{name}.out"
        with Kept(name, command, output=output, environment=environment()) as actor:
            while not self.stopping.is_set():
                try:
                    await actor.keep(self.stopping)  # a hub that leaves in order sends it home
                except UserError:  # it was killed ten times in a row; this owner tries again whatever the reason
                    self.gave_up += 1

    async def _appears(self) -> None:
        def listens() -> bool:
            self.folder = next(map(RunFolder, (self.parent / "runs").iterdir()), None)
            return self.folder is not None and self.folder.hub_address() is not None

        with anyio.fail_after(START_LIMIT_S):
            await until(listens)

    def _clear(self) -> None:
        """Leave nothing behind, whatever happened."""
        for _, process in list(all_below(self.parent)):
            with suppress(*GONE):
                process.kill()
        for disk in self.disks:
            disk.unmount()


def chosen(among: Sequence[T], fault: Fault) -> T:
    """The fault's share of the way along."""
    return among[min(len(among) - 1, int(fault.among * len(among)))]
