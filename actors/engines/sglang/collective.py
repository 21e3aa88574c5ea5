"""Weights broadcast into servers: for those that do not see our file system, and for clusters with a fast network."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import anyio
import anyio.to_thread
import structlog

from actors.engines.sglang.buckets import Bucket, cut
from actors.engines.sglang.client import ServerGone, ServerRefused, SglangClient
from actors.engines.sglang.features import look
from actors.engines.sglang.handover import WEIGHT_FILE, DiskHandover, Parcel
from actors.engines.sglang.link import Sender, SenderLost
from actors.engines.sglang.model import ModelFacts
from matpo.config import SglangEngine as Settings
from matpo.errors import UserError
from protocols.weights import Weights

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SENDER_START_S: Final = 120.0
"""For a sender to import torch on a crowded machine."""
CALL_DEADLINE_S: Final = 60.0
"""For a server to join, to open or close a session, to take one bucket."""
PART_DEADLINE_S: Final = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """A process group with one server."""

    url: str
    """The server's, when the group was built."""
    sender: Sender
    bracketed: bool
    """See `Features`."""


class CollectiveHandover:
    """One sender and one process group per server, so that a server that dies stops no other's weights.

    A group that breaks is torn down and built again, once per delivery; the server is asked to end the half session.
    """

    pauses = True

    def __init__(self, folders: DiskHandover, settings: Settings, facts: ModelFacts, log_file: Path | None) -> None:
        self._folders = folders
        self._settings = settings
        self._facts = facts
        self._log_file = log_file
        self._groups: dict[SglangClient, _Group] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, facts: ModelFacts, *, log_file: Path | None) -> AsyncIterator[Self]:
        """Senders start with the first delivery and end here. `log_file` receives what they print.

        Raises `UserError` where they could not be started.
        """
        if shutil.which(settings.python) is None:
            raise UserError(f"actor.engine.python {settings.python!r} is no program; the sender of weights needs it")
        async with DiskHandover.open(settings, facts) as folders:
            handover = cls(folders, settings, facts, log_file)
            try:
                yield handover
            finally:
                for group in handover._groups.values():
                    await group.sender.kill()

    def check(self, weights: Weights) -> None:
        """See `Handover.check`."""
        self._facts.check(weights)

    async def prepare(self, weights: Weights, *, version: int, file: Path | None) -> Parcel:
        """As for a server on this machine: the senders map the file."""
        return await self._folders.prepare(weights, version=version, file=file)

    def keep_only(self, *parcels: Parcel) -> None:
        """See `Handover.keep_only`."""
        self._folders.keep_only(*parcels)

    async def held(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> bool:
        """See `Handover.held`."""
        return await self._folders.held(parcel, client, deadline_s=deadline_s)

    async def retire(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> None:
        """Nothing: the server has overwritten it."""

    async def meet(self, client: SglangClient) -> None:
        """Build the group, which takes seconds where there is none yet."""
        with suppress(SenderLost, ServerGone, ServerRefused):
            await self._group(client)

    async def deliver(self, parcel: Parcel, client: SglangClient, *, flush: bool, deadline_s: float) -> None:
        """Broadcast all tensors. What fails is tried a second time with a new sender."""
        file = parcel.folder / WEIGHT_FILE
        buckets = await anyio.to_thread.run_sync(cut, file, self._facts.shapes.keys())
        try:
            with anyio.fail_after(deadline_s):
                try:
                    await self._broadcast(file, buckets, client, version=parcel.version, flush=flush)
                except (SenderLost, ServerRefused, ServerGone) as error:
                    log.warning("weights broadcast again", server=client.url, reason=str(error))
                    await self._broadcast(file, buckets, client, version=parcel.version, flush=flush)
        except SenderLost as error:
            raise ServerRefused(str(error)) from error
        except TimeoutError as error:
            raise ServerGone(f"{client.url} did not take version {parcel.version} within {deadline_s:g} s") from error

    async def _broadcast(
        self, file: Path, buckets: Sequence[Bucket], client: SglangClient, *, version: int, flush: bool
    ) -> None:
        """One session. Raises `SenderLost`, `ServerGone` or `ServerRefused`; there is no group then."""
        group = await self._group(client)
        sender, sent, opened = group.sender, False, False
        try:
            if group.bracketed:
                await _begin(client)
                opened = True
            for bucket in buckets:
                last = bucket is buckets[-1]
                await sender.command({"file": str(file), "start": bucket.start, "size": bucket.size})
                body = {
                    "names": bucket.names,
                    "dtypes": bucket.dtypes,
                    "shapes": bucket.shapes,
                    "group_name": sender.group,
                    "load_format": "flattened_bucket",
                    # The version changes and the cache is flushed with the last bucket only.
                    "weight_version": str(version) if last else None,
                    "flush_cache": flush and last,
                }
                await client.command("/update_weights_from_distributed", body, deadline_s=CALL_DEADLINE_S)
                await sender.reply(deadline_s=CALL_DEADLINE_S)
            sent = True
        finally:
            with anyio.CancelScope(shield=True):
                if not sent:  # first, because the server may be waiting for the sender
                    await self._part(client)
                if opened:
                    await client.command("/end_weight_update", {}, deadline_s=CALL_DEADLINE_S)

    async def _group(self, client: SglangClient) -> _Group:
        """This server's; a new one where there is none, or the server was started anew."""
        known = self._groups.get(client)
        if known is not None and known.url == client.url and known.sender.alive:
            return known
        await self._part(client)
        settings = self._settings
        features = await look(client, settings)
        sender = await Sender.start(
            settings.python,
            ranks=settings.tensor_parallel,
            address=settings.sender_address,
            backend=settings.backend,
            deadline_s=SENDER_START_S,
            log=self._log_file,
        )
        group = self._groups[client] = _Group(client.url, sender, features.bracketed)
        body = {
            "master_address": settings.sender_address,
            "master_port": sender.port,
            "rank_offset": 1,
            "world_size": 1 + settings.tensor_parallel,
            "group_name": sender.group,
            "backend": settings.backend,
        }
        joined = False
        try:
            await client.command("/init_weights_update_group", body, deadline_s=CALL_DEADLINE_S)
            await sender.reply(deadline_s=CALL_DEADLINE_S)
            joined = True
        finally:
            if not joined:
                with anyio.CancelScope(shield=True):
                    await self._part(client)
        return group

    async def _part(self, client: SglangClient) -> None:
        """End this server's sender, and let the server forget the group."""
        group = self._groups.pop(client, None)
        if group is None:
            return
        await group.sender.kill()
        if group.url == client.url:
            with suppress(ServerGone, ServerRefused):
                body = {"group_name": group.sender.group}
                await client.command("/destroy_weights_update_group", body, deadline_s=PART_DEADLINE_S)


async def _begin(client: SglangClient) -> None:
    """Open a session; one that somebody left open is closed before."""
    try:
        await client.command("/begin_weight_update", {}, deadline_s=CALL_DEADLINE_S)
    except ServerRefused:
        await client.command("/end_weight_update", {}, deadline_s=CALL_DEADLINE_S)
        await client.command("/begin_weight_update", {}, deadline_s=CALL_DEADLINE_S)
