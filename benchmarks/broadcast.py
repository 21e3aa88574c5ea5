"""From a publication to loaded weights: a real hub process and real followers, one to four, each as if on a machine of
its own; what a slow one costs the others; CPU per GB against raw TCP. `python -m benchmarks.broadcast [--quick]`; the
last line is one JSON object."""

from __future__ import annotations

import argparse
import mmap
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np
import orjson
import psutil

from actors.engines.engine import EngineHealth, Generation, LoadReport
from actors.greet import greet
from actors.weights.download import Download
from actors.weights.follow import Follower
from actors.weights.shadow import Shadow, default_memory
from actors.weights.sources import HubSource, Sources
from benchmarks.runs import ROOT
from matpo.config import Config, Sampling
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.model_files import tokenizer_digest
from protocols.channel import HubClient, TrainerLink
from protocols.delta import write_delta
from protocols.messages import (
    CHUNK_BYTES,
    PROTOCOL,
    Chunk,
    Goodbye,
    Hello,
    Ok,
    Publish,
    PullHello,
    TrainerHello,
    WeightObject,
    WeightsReady,
)
from protocols.records import Tokens
from protocols.weights import Tensor, Weights, weights_digest, write_keyframe

PATIENCE_S = 120.0
ELEMENTS, TENSORS = 134_515_008, 64
"""SmolLM2-135M: 269 MB in bfloat16."""
DENSITY = 0.0035
"""Share of elements a step at learning rate 1e-6 changes."""
SLOWNESS = 10
PULLS = 4
"""Keyframes per reading of CPU clocks, which count hundredths of seconds."""


@dataclass(frozen=True)
class BroadcastFigures:
    """Medians over rounds. `_s` by number of actors: from the Publish message until the last engine has loaded."""

    keyframe_s: Mapping[int, float]
    delta_s: Mapping[int, float]
    slow_actor_cost: float
    """By how much longer three actors take for a keyframe when a fourth pulls it ten times slower, than when it is as
    fast as they are (bar: 0.05)."""
    slow_actor_cost_vs_none: float
    """The same against a fourth that stands still. Here it also takes its share of the two cores."""
    cpu_per_gb_vs_tcp: float
    """CPU of hub and puller for a keyframe into a file in shared memory, over that of two plain sockets (bar: 2)."""
    cpu_s_per_gb: float
    tcp_cpu_s_per_gb: float
    keyframe_bytes: int
    delta_bytes: int


class Holder:
    """An engine that reads every byte of what it is given, and holds nothing."""

    def __init__(self) -> None:
        self.version = -1
        self.digests: dict[int, str] = {}

    async def generate(
        self, tokens: Tokens, sampling: Sampling, *, deadline_s: float, group: str = "", adapter: str | None = ""
    ) -> Generation:
        raise NotImplementedError

    async def load(self, weights: Weights, *, version: int, file: Path | None = None) -> LoadReport:
        digest = await anyio.to_thread.run_sync(weights_digest, weights)
        self.version, self.digests[version] = version, digest
        print(orjson.dumps({"version": version, "at_s": time.monotonic()}).decode(), flush=True)
        return LoadReport(version=version, digest=digest, pause_s=0.0)

    async def health(self) -> EngineHealth:
        raise NotImplementedError


async def follow(endpoint: str, name: str, config: Config, memory: Path) -> None:
    """An actor's process: what `matpo-actor` does about weights. Standard input gives the pause after each chunk."""
    hello = Hello(
        protocol=PROTOCOL,
        actor_id=name,
        tokenizer_digest=tokenizer_digest(config.model),
        config_digest=config.shared_digest,
        capacity=0,
    )
    pause_s = [0.0]

    def heed() -> None:
        for line in sys.stdin:
            pause_s[0] = float(line)
        os._exit(0)

    threading.Thread(target=heed, daemon=True).start()
    async with HubClient.connect(endpoint) as client, anyio.create_task_group() as tasks:
        welcome = await greet(client, hello, deadline_s=PATIENCE_S)
        with Shadow.open(f"{welcome.run}-{name}", memory=memory) as shadow:
            follower = Follower(shadow, engine=Holder(), sources=Sources(HubSource(client)), reports=client)
            tasks.start_soon(follower.run)
            while True:
                message, frames = await client.receive()
                if isinstance(message, WeightsReady):
                    follower.announce(message)
                elif isinstance(message, Chunk):
                    follower.take(message, frames[0])
                    await anyio.sleep(pause_s[0])


async def pull(endpoint: str, wanted: WeightObject, folder: Path) -> float:
    """CPU seconds of this process for pulling the object `PULLS` times into a file."""
    async with HubClient.connect(endpoint) as client:
        await greet(client, PullHello(protocol=PROTOCOL, puller_id="puller", run=None), deadline_s=PATIENCE_S)
        began = time.process_time()
        for _ in range(PULLS):
            with Download(wanted, folder / "pulled") as download:
                while not download.complete:
                    await download.ask(client)
                    message, frames = await client.receive()
                    if isinstance(message, Chunk):
                        download.take(message, frames[0])
        spent_s = time.process_time() - began
        await client.send(Goodbye(reason="measured"))
    return spent_s


def send_plainly(path: Path) -> None:
    """The other process of the plain sockets: send a file `PULLS` times, print the CPU seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server, path.open("rb") as file:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        with connection, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            began = time.process_time()
            for _ in range(PULLS):
                connection.sendall(content)
            print(time.process_time() - began, flush=True)


def receive_plainly(path: Path, folder: Path) -> float:
    """CPU seconds of both processes for the same transfer over plain sockets."""
    size, part = path.stat().st_size, bytearray(CHUNK_BYTES)
    with process("--send", str(path)) as sender, (folder / "plain").open("wb", buffering=0) as file:
        assert sender.stdout is not None
        with socket.create_connection(("127.0.0.1", int(sender.stdout.readline()))) as connection:
            began = time.process_time()
            for _ in range(PULLS):
                file.seek(0)
                file.truncate()  # a new file every time, as a download is
                left = size
                while left:
                    count = connection.recv_into(part, min(left, len(part)))
                    file.write(memoryview(part)[:count])
                    left -= count
            spent_s = time.process_time() - began
        return spent_s + float(sender.stdout.readline())


@contextmanager
def process(*arguments: str, module: str = "benchmarks.broadcast") -> Iterator[subprocess.Popen[str]]:
    """A process of ours, ended with the context."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.terminate()


class Actors:
    """Follower processes; each has its own copy of the weights, as actors on different machines do."""

    def __init__(self, stack: ExitStack, endpoint: str, config: Path, memory: Path) -> None:
        self._stack = stack
        self._arguments = [endpoint, str(config), str(memory)]
        self._processes: list[subprocess.Popen[str]] = []

    def grow_to(self, count: int, version: int) -> None:
        """Have so many, each with the version published last."""
        while len(self._processes) < count:
            name = f"actor-{len(self._processes)}"
            self._processes.append(self._stack.enter_context(process("--follow", name, *self._arguments)))
            self.loaded_at_s(version, members=slice(-1, None))

    def loaded_at_s(self, version: int, *, members: slice = slice(None)) -> list[float]:
        """When each of them had loaded the version."""
        found = []
        for member in self._processes[members]:
            assert member.stdout is not None
            while (line := orjson.loads(member.stdout.readline()))["version"] != version:
                pass
            found.append(line["at_s"])
        return found

    def slow_down(self, pause_s: float) -> None:
        """The first of them waits so long after every chunk."""
        stdin = self._processes[0].stdin
        assert stdin is not None
        stdin.write(f"{pause_s}\n")
        stdin.flush()

    def signal_first(self, number: signal.Signals) -> None:
        """Stop the first of them, or let it go on."""
        self._processes[0].send_signal(number)


class Trainer:
    """Publishes two sets of weights in turn."""

    def __init__(self, folder: RunFolder, link: TrainerLink) -> None:
        self._folder = folder
        self._link = link
        self._weights = make_weights()
        self._digests = [weights_digest(weights) for weights in self._weights]
        self.version = -1
        self.keyframes = [
            write_keyframe(folder.path / f"set-{index}", weights, version=index)
            for index, weights in enumerate(self._weights)
        ]
        self.delta_bytes = 0

    def path_of(self, keyframe: WeightObject) -> Path:
        return self._folder.weights / keyframe.name

    def publish(self, *, delta: bool) -> float:
        """Publish the next version, in either form; returns when the message was sent."""
        base, self.version = self.version, self.version + 1
        side = self.version % 2
        if delta:
            path = self._folder.weights / f"delta-{self.version}"
            item = write_delta(
                path, self._weights[1 - side], self._weights[side], base_version=base, version=self.version
            )
            self.delta_bytes = item.size_bytes
        else:
            name = f"keyframe-{self.version}"
            (self._folder.weights / name).hardlink_to(self._folder.path / f"set-{side}")
            item = self.keyframes[side].model_copy(update={"name": name, "version": self.version})
        began_s = time.monotonic()
        message = Publish(version=self.version, digest=self._digests[side], objects=(item,))
        answer, _ = self._link.request(message, deadline_s=PATIENCE_S, waiting_for="the hub")
        assert answer == Ok(), answer
        return began_s


def make_weights() -> tuple[Weights, Weights]:
    """Weights of the size of SmolLM2-135M, and the same after a small step."""
    random = np.random.default_rng(0)
    size = ELEMENTS // TENSORS
    before = {f"layer.{index:02}": random.integers(0x3A00, 0x3D00, size, dtype=np.uint16) for index in range(TENSORS)}
    after = {name: data + (random.random(size, dtype=np.float32) < DENSITY) for name, data in before.items()}
    first = {name: Tensor("bfloat16", data) for name, data in before.items()}
    return first, {name: Tensor("bfloat16", data.astype(np.uint16)) for name, data in after.items()}


def measure_times(trainer: Trainer, actors: Actors, rounds: int) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds until the last has loaded, of keyframes and of deltas, by number of actors."""
    times: dict[bool, dict[int, float]] = {False: {}, True: {}}
    trainer.publish(delta=False)
    for count in (1, 2, 4):
        actors.grow_to(count, trainer.version)
        found: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for delta in (False, True):
                began_s = trainer.publish(delta=delta)
                found[delta].append(max(actors.loaded_at_s(trainer.version)) - began_s)
        for delta in (False, True):
            times[delta][count] = statistics.median(found[delta])
    return times[False], times[True]


def measure_slow_actor(trainer: Trainer, actors: Actors, rounds: int, keyframe_s: float) -> tuple[float, float]:
    """Three actors beside a fourth that takes ten times as long, against one as fast as they, and one that stands."""
    chunks = -(-trainer.keyframes[0].size_bytes // CHUNK_BYTES)
    slow, others = slice(0, 1), slice(1, None)
    pause_s = (SLOWNESS - 1) * keyframe_s / chunks
    costs = []
    for _ in range(rounds):
        seconds = []
        for pause, hindrance in ((0.0, signal.SIGCONT), (pause_s, signal.SIGSTOP), (pause_s, signal.SIGCONT)):
            actors.slow_down(pause)
            actors.signal_first(hindrance)
            began_s = trainer.publish(delta=False)
            seconds.append(statistics.mean(actors.loaded_at_s(trainer.version, members=others)) - began_s)
            actors.signal_first(signal.SIGCONT)
            actors.slow_down(0.0)  # it has shown what it costs: let it catch up
            actors.loaded_at_s(trainer.version, members=slow)
        costs.append((seconds[2] / seconds[0] - 1, seconds[2] / seconds[1] - 1))
    return statistics.median(cost for cost, _ in costs), statistics.median(cost for _, cost in costs)


def measure_cpu(trainer: Trainer, hub: psutil.Process, endpoint: str, folder: Path, rounds: int) -> tuple[float, float]:
    """CPU seconds per GB, of sender and receiver together: over the hub, and over plain sockets."""
    wanted = trainer.keyframes[trainer.version % 2].model_copy(update={"name": f"keyframe-{trainer.version}"})
    gigabytes = PULLS * wanted.size_bytes / 1e9
    ours, plain = [], []
    for _ in range(rounds):
        before = hub.cpu_times()
        spent_s = anyio.run(pull, endpoint, wanted, folder, backend_options={"use_uvloop": True})
        after = hub.cpu_times()
        spent_s += after.user + after.system - before.user - before.system
        ours.append(spent_s / gigabytes)
        plain.append(receive_plainly(trainer.path_of(wanted), folder) / gigabytes)
    return statistics.median(ours), statistics.median(plain)


def measure(quick: bool) -> BroadcastFigures:
    """Run everything; `quick` takes fewer rounds and less than a minute on two idle cores."""
    rounds = 2 if quick else 5
    with ExitStack() as stack:
        folder = RunFolder(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="matpo-broadcast-"))))
        shared = stack.enter_context(tempfile.TemporaryDirectory(prefix="matpo-broadcast-", dir=default_memory()))
        config = load_config(ROOT / "configs" / "quickstart.toml")
        folder.config.write_bytes(orjson.dumps(config.model_dump(mode="json")))
        hub = stack.enter_context(process("--run", str(folder.path), module="learner.hub"))
        deadline_s = time.monotonic() + PATIENCE_S
        while (address := folder.hub_address()) is None:
            assert hub.poll() is None and time.monotonic() < deadline_s, "the hub did not start"
            time.sleep(0.05)  # another process writes the file; there is nothing here to wait on
        link = stack.enter_context(TrainerLink(address.trainer_endpoint))
        hello = TrainerHello(protocol=PROTOCOL, step=0, config_digest=config.shared_digest)
        link.request(hello, deadline_s=PATIENCE_S, waiting_for="the hub")
        trainer = Trainer(folder, link)
        actors = Actors(stack, address.endpoint, folder.config, Path(shared))
        keyframe_s, delta_s = measure_times(trainer, actors, rounds)
        slow_actor_cost, versus_none = measure_slow_actor(trainer, actors, rounds, keyframe_s[4])
        ours, plain = measure_cpu(trainer, psutil.Process(hub.pid), address.endpoint, Path(shared), rounds)
        return BroadcastFigures(
            keyframe_s=keyframe_s,
            delta_s=delta_s,
            slow_actor_cost=slow_actor_cost,
            slow_actor_cost_vs_none=versus_none,
            cpu_per_gb_vs_tcp=ours / plain,
            cpu_s_per_gb=ours,
            tcp_cpu_s_per_gb=plain,
            keyframe_bytes=trainer.keyframes[0].size_bytes,
            delta_bytes=trainer.delta_bytes,
        )


def main() -> int:
    """Measure and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; under a minute")
    parser.add_argument("--follow", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--send", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.follow:
        name, endpoint, config, memory = options.follow
        configure_logs(Path(memory) / f"{name}.jsonl", component=name)
        anyio.run(follow, endpoint, name, load_config(Path(config)), Path(memory), backend_options={"use_uvloop": True})
    elif options.send:
        send_plainly(options.send)
    else:
        print(orjson.dumps(asdict(measure(options.quick)), option=orjson.OPT_NON_STR_KEYS).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
