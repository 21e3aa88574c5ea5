"""Follows the learner's weights: brings this machine's copy up to date, checks every byte, hands it to the engine.

Playing goes on meanwhile. Whatever does not fit (a damaged file, a delta for other weights, another digest than
announced) is counted and answered by starting again from a keyframe.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread
import structlog

from actors.engines.engine import Engine, EngineFailure
from actors.weights.download import BrokenTransfer, ObjectGone
from actors.weights.shadow import Copy, Shadow, Turn, TurnLost
from actors.weights.sources import Sources
from matpo.errors import UserError
from matpo.waits import Condition, waiting
from protocols.delta import BadDelta, patch_weights
from protocols.messages import Chunk, Refuse, WeightObject, WeightsLoaded, WeightsReady
from protocols.weights import BadWeights, Weights, covering, read_keyframe, weights_digest

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Reports(Protocol):
    """Where the follower says what the engine holds: `protocols.channel.HubClient`."""

    async def send(self, message: WeightsLoaded) -> bool: ...


class Follower:
    """Keeps the engine at the newest announced weights."""

    def __init__(
        self,
        shadow: Shadow,
        *,
        engine: Engine,
        sources: Sources,
        reports: Reports,
        loaded: Sequence[Callable[[], None]] = (),
    ) -> None:
        """`loaded` are called right after every swap."""
        self.failures = sources.failures
        """What went wrong and was repaired, by kind."""
        self.waiting_for: Condition | None = None
        """What is being waited for."""
        self._shadow = shadow
        self._engine = engine
        self._reports = reports
        self._sources = sources
        self._loaded = loaded
        self._newest: WeightsReady | None = None
        self._fresh = anyio.Event()
        self._whole = False
        """Start from a keyframe, because what there was led nowhere."""
        self._postponed = -1
        """A version that was left alone once because another actor of this machine was ahead already."""

    @property
    def wanted_version(self) -> int:
        """The newest announced version; -1 before the first."""
        return -1 if self._newest is None else self._newest.version

    def announce(self, ready: WeightsReady) -> None:
        """New weights can be pulled, or are still the newest: repeated announcements are also the clock of retries."""
        if ready.version >= self.wanted_version:
            self._newest = ready
            self._fresh.set()

    def take(self, chunk: Chunk, content: memoryview) -> None:
        """Bytes of a weight object arrived from the hub."""
        self._sources.hub.take(chunk, content)

    def refuse(self, refusal: Refuse) -> bool:
        """Handle the hub's refusal of a chunk. False when it is about something else."""
        return self._sources.hub.refuse(refusal)

    async def run(self) -> None:
        """Follow announcements forever. Raises `UserError` when the learner trains another model than this actor's."""
        while True:
            await self._fresh.wait()
            self._fresh = anyio.Event()
            if self._newest is not None and self._is_new(self._newest):
                await self._follow(self._newest)
                self.waiting_for = None

    def _is_new(self, ready: WeightsReady) -> bool:
        """Also a version the engine has, if it turned out to hold other weights than meant."""
        held = self._engine.version
        return ready.version > held or (ready.version == held and self._engine.digests.get(held) != ready.digest)

    async def _follow(self, ready: WeightsReady) -> None:
        try:
            copy = await self._obtain(ready)
            if copy is not None:
                await self._load(copy)
                self._whole = False
        except (BrokenTransfer, BadDelta, BadWeights) as error:
            self.failures["broken"] += 1
            self._whole = True
            log.warning("weights broken, starting from a keyframe", version=ready.version, reason=str(error))
        except ObjectGone as error:
            self.failures["gone"] += 1
            log.info("weight object gone", object=str(error))
        except TurnLost as error:
            self.failures["turn_lost"] += 1
            log.info("another actor brings the weights", reason=str(error))
        except EngineFailure as error:
            self.failures["engine"] += 1
            log.warning("engine took no weights", version=ready.version, reason=str(error))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"{str(self._shadow.folder)!r} has no room for two copies of the weights ({error.strerror});"
                " free some there, or set actor.weights.memory to a folder with more"
            ) from error

    async def _obtain(self, ready: WeightsReady) -> Copy | None:
        """This machine's copy of the newest weights, in use by this actor; None to wait for the next announcement."""
        self.waiting_for = waiting("weights_turn", version=ready.version, folder=str(self._shadow.folder))
        self._shadow.require()
        async with self._shadow.turn() as turn:
            ready = self._newest or ready
            self.waiting_for = waiting("weights_bytes", version=ready.version)
            if turn.is_behind(ready.version) and self._postponed != ready.version:
                self._postponed = ready.version
                return None
            try:
                copy = turn.find(ready.version, ready.digest) or await self._bring(turn, ready)
            except FileNotFoundError as error:  # who takes over removes what this one was working on
                raise TurnLost(f"{error.filename} was removed") from error
            self._shadow.use(copy)
        return copy

    async def _bring(self, turn: Turn, ready: WeightsReady) -> Copy:
        """Make the copy of the newest weights: from the copy there is, or from nothing, one object after the other."""
        current = turn.base_of(ready.version)
        turn.make_room(current)
        base = None if self._whole else current
        draft: Path | None = None
        held, digest = (None, None) if base is None else (base.version, base.digest)
        while chain := self._chain(ready, held):
            wanted = chain[0]
            path = await self._sources.fetch(wanted, turn)
            if wanted.base is None:
                if draft is not None:
                    turn.drop(draft)
                draft, digest = path, None
            else:
                if draft is None:
                    assert base is not None, "a chain from nothing begins with a keyframe"
                    draft = turn.draft()
                    await anyio.to_thread.run_sync(shutil.copyfile, base.path, draft)
                digest = await anyio.to_thread.run_sync(_patch, path, draft, wanted, digest)
                turn.drop(path)
            turn.progress()
            held, ready = wanted.version, self._newest or ready
        if draft is None:
            raise BrokenTransfer(f"no object of those announced leads to version {ready.version}")
        return turn.finish(draft, ready.version, ready.digest)

    def _chain(self, ready: WeightsReady, held: int | None) -> list[WeightObject]:
        try:
            return covering(ready.objects, held)
        except ValueError as error:
            raise BrokenTransfer(str(error)) from error

    async def _load(self, copy: Copy) -> None:
        try:
            weights = await anyio.to_thread.run_sync(_read, copy)
        except (BrokenTransfer, BadWeights):
            self._shadow.discard(copy)
            raise
        except FileNotFoundError as error:
            raise TurnLost(f"the copy of version {copy.version} was found damaged by another actor") from error
        self.waiting_for = waiting("weights_loaded", version=copy.version)
        try:
            report = await self._engine.load(weights, version=copy.version, file=copy.path)
        except ValueError as error:
            raise UserError(f"the learner's {error}; give actor and learner the same model.path") from error
        for call in self._loaded:
            call()
        if report.digest != copy.digest:
            raise BrokenTransfer(f"engine holds digest {report.digest}, announced was {copy.digest}")
        log.info("weights loaded", version=report.version, pause_s=round(report.pause_s, 6))
        await self._reports.send(WeightsLoaded(version=report.version, digest=report.digest, pause_s=report.pause_s))


def _patch(delta: Path, draft: Path, wanted: WeightObject, digest: str | None) -> str:
    """Turn the draft (`digest`: its own, if known) into the delta's version where it lies; returns the new digest."""
    assert wanted.base is not None, "a keyframe is no delta"
    weights = read_keyframe(draft, writable=True)
    return patch_weights(delta, weights, base_version=wanted.base, base_digest=digest)


def _read(copy: Copy) -> Weights:
    """Map a copy and check every byte of it."""
    weights = read_keyframe(copy.path)
    digest = weights_digest(weights)
    if digest != copy.digest:
        raise BrokenTransfer(f"weights {copy.version} have digest {digest}, announced was {copy.digest}")
    return weights
