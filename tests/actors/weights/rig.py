"""A real hub with its journal and sockets, a trainer that publishes to it, and actors that only follow weights."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
import numpy as np
from anyio.abc import TaskGroup, TaskStatus

from actors.engines.engine import Engine
from actors.greet import greet
from actors.weights.follow import Follower
from actors.weights.shadow import Shadow
from actors.weights.sources import HubSource, Source, Sources
from learner.hub.core import Hub, Side
from learner.hub.journal import Journal
from learner.hub.service import Service
from matpo.folder import RunFolder
from matpo.metrics import MetricsFile
from protocols.channel import HubClient, HubSocket, TrainerLink
from protocols.delta import write_delta
from protocols.keys import ActorKeys, HubKeys
from protocols.messages import (
    PROTOCOL,
    Chunk,
    Heartbeat,
    Hello,
    Ok,
    Publish,
    Refuse,
    TrainerHello,
    TrainerWelcome,
    WeightObject,
    WeightsReady,
)
from protocols.records import version_of
from protocols.weights import Tensor, Weights, weights_digest, write_keyframe
from tests.learner.hub.bench import TOKENIZER, make_config, make_tasks

CHUNK_BYTES = 4096
PATIENCE_S = 0.3
"""Short, so that what was lost is asked for again within a test."""
CONFIG = make_config(hub={"heartbeat_s": 0.05, "lease_s": 30.0}, run={"steps": 1000})


def weights_at(step: int) -> Weights:
    """120 kB that differ in one row per step."""
    data = np.arange(30_000, dtype=np.float32).reshape(300, 100).copy()
    data[:step] += 1.0
    return {"w": Tensor("float32", data)}


class Learner:
    """The hub, which can be stopped and started again, and a trainer without a model."""

    def __init__(self, folder: Path, tasks: TaskGroup, keys: HubKeys | None = None) -> None:
        self.folder = RunFolder(folder)
        self.hub: Hub | None = None
        self.endpoint = "tcp://127.0.0.1:0"
        self.lineage = -1
        self._keys = keys
        self._tasks = tasks
        self._scope = anyio.CancelScope()
        self._stopped = anyio.Event()
        self._base: tuple[int, Weights] | None = None
        self._keyframe: tuple[int, Weights] | None = None

    @property
    def served_bytes(self) -> int:
        """What the hub handed out since it was started."""
        assert self.hub is not None
        return self.hub.weights.served_bytes

    async def start(self) -> None:
        """Start the hub where it was before."""
        self._scope, self._stopped = anyio.CancelScope(), anyio.Event()
        await self._tasks.start(self._serve)

    async def stop(self) -> None:
        """End the hub at once, as a kill does."""
        self._scope.cancel()
        await self._stopped.wait()

    async def begin(self) -> None:
        """A trainer starts, from a checkpoint or from nothing: a new lineage, and nothing to build on."""
        hello = TrainerHello(protocol=PROTOCOL, step=0, config_digest=CONFIG.shared_digest)
        answer = await anyio.to_thread.run_sync(self._ask, hello)
        assert isinstance(answer, TrainerWelcome)
        self.lineage, self._base, self._keyframe = answer.lineage, None, None

    async def publish(self, weights: Weights, *, step: int, whole: bool = False, spoil: bool = False) -> WeightsReady:
        """Publish a step: what changed, and a keyframe if it is the first or `whole`. `spoil` damages the delta."""
        version = version_of(lineage=self.lineage, step=step)
        objects = self._write(weights, version, whole=whole)
        if spoil:
            path = self.folder.weights / objects[0].name
            content = bytearray(path.read_bytes())
            content[-1] ^= 0xFF
            path.write_bytes(content)
        message = Publish(version=version, digest=weights_digest(weights), objects=objects)
        assert await anyio.to_thread.run_sync(self._ask, message) == Ok()
        return WeightsReady(version=version, digest=message.digest, objects=objects)

    def _write(self, weights: Weights, version: int, *, whole: bool) -> tuple[WeightObject, ...]:
        folder, objects = self.folder.weights, list[WeightObject]()
        starts: list[tuple[Literal["delta", "fold"], tuple[int, Weights] | None]] = [("delta", self._base)]
        if self._keyframe != self._base:
            starts.append(("fold", self._keyframe))
        for kind, start in starts:
            if start is not None:
                path = folder / f"{kind}-{start[0]}-{version}"
                objects.append(write_delta(path, start[1], weights, base_version=start[0], version=version, kind=kind))
        self._base = version, weights
        if self._keyframe is None or whole:
            objects.append(write_keyframe(folder / f"keyframe-{version}", weights, version=version))
            self._keyframe = self._base
        return tuple(objects)

    def _ask(self, message: TrainerHello | Publish) -> object:
        address = f"ipc://{self.folder.path / 'hub.ipc'}"
        with TrainerLink(address) as link:
            return link.request(message, deadline_s=10.0, waiting_for="the test's hub")[0]

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        try:
            with self._scope, Journal.open(self.folder.journal) as journal:
                self.hub = Hub(
                    CONFIG, journal, run="test", weights=self.folder.weights, archive=self.folder.archive,
                    tokenizer=TOKENIZER,
                    train=make_tasks(20), evaluation=make_tasks(5, "held-out-"), now_s=time.monotonic(),
                )  # fmt: skip
                async with (
                    HubSocket.bind(self.endpoint, keys=self._keys) as actors,
                    HubSocket.bind(f"ipc://{self.folder.path / 'hub.ipc'}") as trainer,
                ):
                    self.endpoint = actors.endpoint
                    sockets: dict[Side, HubSocket] = {"actors": actors, "trainer": trainer}
                    metrics = MetricsFile(self.folder.metrics)
                    service = Service(self.hub, journal, metrics, sockets=sockets, steps=1000, heartbeat_s=0.2)
                    task_status.started()
                    try:
                        await service.run()
                    finally:
                        metrics.close()
        finally:
            self._stopped.set()


@asynccontextmanager
async def learner(folder: Path, *, keys: HubKeys | None = None, limit_s: float = 30.0) -> AsyncIterator[Learner]:
    """A hub that listens, and a trainer's first lineage begun. Everything within must end in `limit_s`."""
    await anyio.Path(folder).mkdir(parents=True, exist_ok=True)
    with anyio.fail_after(limit_s):
        async with anyio.create_task_group() as tasks:
            made = Learner(folder, tasks, keys)
            await made.start()
            await made.begin()
            yield made
            tasks.cancel_scope.cancel()


class Actor:
    """Says hello, sends heartbeats, follows weights; `listening` unset is an actor that stands still."""

    def __init__(
        self, name: str, endpoint: str, engine: Engine, memory: Path, *, others: Sequence[Source] = (),
        rest_s: float = 60.0, keys: ActorKeys | None = None,
    ) -> None:  # fmt: skip
        self.listening = anyio.Event()
        self.listening.set()
        self.chunks = 0
        """Received over the hub's connection."""
        self.changed = anyio.Event()
        self.follower: Follower | None = None
        self._name = name
        self._endpoint = endpoint
        self._engine = engine
        self._memory = memory
        self._others = others
        self._rest_s = rest_s
        self._keys = keys
        self._hello = Hello(
            protocol=PROTOCOL, actor_id=name, tokenizer_digest=TOKENIZER, config_digest=CONFIG.shared_digest, capacity=0
        )

    @property
    def failures(self) -> dict[str, int]:
        assert self.follower is not None
        return dict(self.follower.failures)

    async def run(self) -> None:
        async with HubClient.connect(self._endpoint, keys=self._keys, deadline_s=10) as client:
            welcome = await greet(client, self._hello, deadline_s=10)
            source = HubSource(client, patience_s=PATIENCE_S, chunk_bytes=CHUNK_BYTES)
            self._memory.mkdir(exist_ok=True)
            with Shadow.open(welcome.run, memory=self._memory) as shadow:
                self.follower = Follower(
                    shadow,
                    engine=self._engine,
                    sources=Sources(source, self._others, rest_s=self._rest_s),
                    reports=client,
                    loaded=(self.notice,),
                )
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.follower.run)
                    tasks.start_soon(self._beat, client)
                    await self._listen(client, self.follower)

    async def wait_version(self, version: int) -> None:
        while self._engine.version != version:
            await self.changed.wait()

    async def wait_chunks(self, count: int) -> None:
        while self.chunks < count:
            await self.changed.wait()

    async def wait_failure(self, kind: str) -> None:
        while not self.failures.get(kind):
            await self.changed.wait()

    def notice(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def _listen(self, client: HubClient, follower: Follower) -> None:
        while True:
            await self.listening.wait()
            message, frames = await client.receive()
            match message:
                case WeightsReady():
                    follower.announce(message)
                case Chunk():
                    self.chunks += 1
                    follower.take(message, frames[0])
                case Refuse(reason="unknown_peer"):
                    await client.send(self._hello)
                case Refuse():
                    follower.refuse(message)
                case _:
                    pass
            self.notice()

    async def _beat(self, client: HubClient) -> None:
        while True:
            await self.listening.wait()
            await client.send(
                Heartbeat(leases=(), version=self._engine.version, live_episodes=0, outbox_trees=0, sampled_tokens=0)
            )
            await anyio.sleep(0.05)
