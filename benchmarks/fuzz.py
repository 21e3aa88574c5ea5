"""Random and damaged messages against the real hub and the real actor, in process at full speed and over real sockets.

`python -m benchmarks.fuzz [--frames 1000000] [--seed 0] [--only TARGET …] [--out docs/results/fuzz.json]`. Half of them
are damaged in one odd value and often still messages, the others in their bytes, or noise. Ends with 1 at the first
crash, change of state, message that passes without a key, or message that takes more than a minute, and names the
target, the seed and the message. Writes `--out` and, beside it, a readable table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import logging
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import anyio
import orjson
import structlog
import zmq
import zmq.asyncio
from pydantic import JsonValue

from benchmarks.fuzz_messages import Mutator, Parts
from benchmarks.fuzz_targets import (
    MAX_MESSAGE_BYTES,
    ActorUnderAttack,
    FilesUnderAttack,
    HubUnderAttack,
    StateChanged,
)
from benchmarks.runs import print_result
from protocols.channel import HubClient, HubSocket, new_actor_keys, new_keys
from protocols.keys import ActorKeys, HubKeys, allow
from protocols.messages import Ack, LeaseRequest

AHEAD = 200
"""Messages on their way at once over a socket, or queued by a stranger for a hub that does not let it in."""
PATIENCE_S = 60
"""For one message, and for whatever is waited for."""
ADD_UP_EVERY = 2_000
HONEST = 424_242
"""Episodes that the honest actor asks for, to be known by."""
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class Found(Exception):
    """A message that did harm."""


class Attack:
    """Where an attack is: what goes wrong, or goes on for too long, is told with the message that did it."""

    def __init__(self, target: str, *, messages: int, seed: int) -> None:
        self.messages, self.seed = messages, seed
        self._name = f"{target}: seed {seed}"
        self._message: Parts = []
        self._number = 0

    def __enter__(self) -> Self:
        self._handler_before = signal.signal(signal.SIGALRM, self._too_long)
        self._timer_before = signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._timer_before)
        signal.signal(signal.SIGALRM, self._handler_before)
        if isinstance(error, Exception):
            shown = [part[:200] for part in self._message]
            raise Found(f"{self._name}, message {self._number}: {error!r} after {shown}") from error

    def send(self, number: int, parts: Parts) -> Parts:
        """The message, noted; the clock begins anew."""
        self._number, self._message = number, parts
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        return parts

    def _too_long(self, number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"nothing happens for {PATIENCE_S} s")


def fuzz_hub(folder: Path, attack: Attack) -> Counter[str]:
    """Messages of a stranger to the hub, trees as of the actor with the lease, in process. None may change anything but
    a whole tree."""
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, attack.seed)
        for number in range(attack.messages):
            target.attack(attack.send(number, mutator.draw()))
        return target.outcomes


def fuzz_hub_from_within(folder: Path, attack: Attack) -> Counter[str]:
    """All of them as of an actor that the hub knows; what it may change stays changed, and the ledger must add up."""
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, attack.seed)
        for number in range(attack.messages):
            target.suffer(attack.send(number, mutator.draw()), now_s=number / 100)
            if number % ADD_UP_EVERY == 0:
                target.add_up()
        target.add_up()
        return target.outcomes


async def fuzz_actor(folder: Path, attack: Attack) -> Counter[str]:
    """Messages to an actor, in process."""
    with ActorUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, attack.seed)
        for number in range(attack.messages):
            await target.attack(attack.send(number, mutator.draw()))
        return target.outcomes


def fuzz_files(folder: Path, attack: Attack) -> Counter[str]:
    """Damaged keyframes and deltas."""
    target = FilesUnderAttack(folder)
    mutator = Mutator([[target.keyframe], [target.delta]], attack.seed)
    for number in range(attack.messages):
        whole, read = (target.keyframe, target.attack_keyframe) if number % 2 else (target.delta, target.attack_delta)
        (content,) = attack.send(number, [mutator.damage(whole)])
        read(content)
    return target.outcomes


async def fuzz_sockets(folder: Path, attack: Attack) -> Counter[str]:
    """The same messages over a real socket, plain noise on its port, and an honest actor that is served all along."""
    answered: Counter[str] = Counter()
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, attack.seed)
        async with (
            HubSocket.bind("tcp://127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES) as hub,
            HubClient.connect(hub.endpoint) as honest,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_serve, hub, target, answered)
            tasks.start_soon(_noise, hub.endpoint, attack.messages // 100, attack.seed)
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.connect(hub.endpoint)
                dealt_with = anyio.Event()
                tasks.start_soon(_read_answers, dealer, dealt_with)
                for number in range(attack.messages):
                    await dealer.send_multipart(attack.send(number, mutator.draw()))
                    if number % AHEAD == 0:
                        await _ask(honest)
                await dealer.send_multipart([LeaseRequest(episodes=HONEST).model_dump_json().encode()])
                await dealt_with.wait()
                await _ask(honest)
                tasks.cancel_scope.cancel()
        return target.outcomes + hub.refused + answered


async def _serve(hub: HubSocket, target: HubUnderAttack, answered: Counter[str]) -> None:
    while True:
        received = await hub.receive()
        if received.message == LeaseRequest(episodes=HONEST):
            answered["honest actor answered"] += 1
            await hub.send(received.peer, Ack(tree_id="honest"))
            continue
        header = received.message.model_dump_json().encode()
        target.attack([header, *(bytes(frame) for frame in received.frames)])


async def _read_answers(dealer: zmq.asyncio.Socket, dealt_with: anyio.Event) -> None:
    """Until the answer to the last message: all that were sent before it have been dealt with."""
    while await dealer.recv_multipart() != [Ack(tree_id="honest").model_dump_json().encode()]:
        pass
    dealt_with.set()


async def _ask(honest: HubClient) -> None:
    with anyio.fail_after(PATIENCE_S):
        await honest.send(LeaseRequest(episodes=HONEST))
        message, _ = await honest.receive()
    if message != Ack(tree_id="honest"):
        raise StateChanged(f"the hub answers the honest actor with {message}")


async def _noise(endpoint: str, connections: int, seed: int) -> None:
    """Bytes that are no ZeroMQ at all."""
    mutator = Mutator([[b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48)]], seed)
    port = int(endpoint.rsplit(":", 1)[1])
    for _ in range(connections):
        try:
            async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                await stream.send(b"".join(mutator.draw()) or b"x")
        except (OSError, anyio.BrokenResourceError):
            continue


async def fuzz_keys(folder: Path, attack: Attack, *, careless: bool = False) -> Counter[str]:
    """Wrong keys, no keys, keys meant for another hub: no message gets past the handshake, damaged or whole.

    A `careless` hub lets a stranger in, which must be found.
    """
    new_keys(folder / "hub")
    new_keys(folder / "other")
    keys, allowed = HubKeys.load(folder / "hub"), ActorKeys.load(folder / "hub")
    new_actor_keys(folder / "stranger", hub=keys.pair.public)
    if careless:
        allow(folder / "hub", ActorKeys.load(folder / "stranger").pair.public)
    outsiders: dict[str, ActorKeys | None] = {
        "kept out with a key that is not allowed": ActorKeys.load(folder / "stranger"),
        "kept out with a key for another hub": ActorKeys(allowed.pair, ActorKeys.load(folder / "other").hub),
        "kept out without a key": None,
    }
    kept_out: Counter[str] = Counter()
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, attack.seed)
        async with (
            HubSocket.bind("tcp://127.0.0.1:0", keys=keys) as hub,
            HubClient.connect(hub.endpoint, keys=allowed) as honest,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_serve_one, hub, allowed.pair.public)
            while kept_out.total() < attack.messages:
                batch = [mutator.draw() if n % 3 else target.corpus[n % len(target.corpus)] for n in range(AHEAD)]
                for name, outsider in outsiders.items():
                    attack.send(kept_out.total(), batch[0])
                    kept_out[name] += await _knock(hub.endpoint, outsider, batch)
                    await _ask(honest)
            tasks.cancel_scope.cancel()
        if hub.refused:
            raise StateChanged(f"messages got as far as being refused by their content: {hub.refused}")
    return kept_out


async def _knock(endpoint: str, keys: ActorKeys | None, messages: Sequence[Parts]) -> int:
    """Queue messages that go out as soon as the hub lets this peer in, and wait until it has refused to. Returns how
    many were queued by then: afterwards ZeroMQ takes no more."""
    queued = 0
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger, dealer.sndhwm = 0, 0
        if keys is not None:
            dealer.curve_publickey = keys.pair.public.encode()
            dealer.curve_secretkey = keys.pair.secret.encode()
            dealer.curve_serverkey = keys.hub.encode()
        monitor = dealer.get_monitor_socket(REFUSED)
        dealer.connect(endpoint)
        try:
            for parts in messages:
                await dealer.send_multipart(parts, flags=zmq.NOBLOCK)
                queued += 1
        except zmq.Again:
            pass
        with anyio.fail_after(PATIENCE_S):
            await monitor.recv_multipart()
        dealer.disable_monitor()
        monitor.close(linger=0)
    return queued


async def _serve_one(hub: HubSocket, key: str) -> None:
    """Answer the honest actor; nobody else may get a word in."""
    while True:
        received = await hub.receive()
        if received.key != key or received.message != LeaseRequest(episodes=HONEST):
            raise StateChanged(f"{received.message.kind} passed with the key {received.key}")
        await hub.send(received.peer, Ack(tree_id="honest"))


@dataclass(frozen=True)
class Target:
    """One thing to attack."""

    fuzz: Callable[[Path, Attack], Counter[str]]
    share: int = 1
    """It gets one of so many messages."""


def _run(fuzz: Callable[[Path, Attack], Awaitable[Counter[str]]]) -> Callable[[Path, Attack], Counter[str]]:
    def run(folder: Path, attack: Attack) -> Counter[str]:
        return anyio.run(fuzz, folder, attack)

    return run


TARGETS = {
    "hub": Target(fuzz_hub),
    "actor": Target(_run(fuzz_actor)),
    "hub from within": Target(fuzz_hub_from_within, 10),
    "weight files": Target(fuzz_files, 50),
    "hub over sockets": Target(_run(fuzz_sockets), 20),
    "hub with keys": Target(_run(fuzz_keys), 100),
}


@dataclass(frozen=True)
class Outcome:
    """What became of the messages to one target."""

    messages: int
    """At least so many, of one frame or more."""
    outcomes: dict[str, int]
    seconds: float


def fuzz(name: str, *, frames: int, seed: int) -> Outcome:
    """Attack one target, in a folder of its own. Raises `Found`."""
    target, began = TARGETS[name], time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="matpo-fuzz-") as folder,
        Attack(name, messages=frames // target.share, seed=seed) as attack,
    ):
        outcomes = target.fuzz(Path(folder), attack)
    return Outcome(attack.messages, dict(outcomes.most_common()), round(time.monotonic() - began, 1))


def page(outcomes: dict[str, Outcome], *, frames: int, seed: int) -> str:
    """The report for people, in Markdown."""
    total = sum(outcome.messages for outcome in outcomes.values())
    lines = [
        f"# {total:,} hostile messages",
        "",
        f"`python -m benchmarks.fuzz --frames {frames} --seed {seed}`: no crash, no change of state, no message let in",
        "without a key, and none that took longer than a minute. What each target is: the docstrings of",
        "`benchmarks/fuzz.py`; what the answers mean: [security](../security.md).",
        "",
        "| target | messages | seconds | what became of them |",
        "|---|---|---|---|",
    ]
    for target, outcome in outcomes.items():
        became = ", ".join(f"{count:,} {what}" for what, count in outcome.outcomes.items())
        lines.append(f"| {target} | {outcome.messages:,} | {outcome.seconds:g} | {became} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fuzz, print a table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="messages to the hub, and as many to the actor")
    parser.add_argument("--quick", action="store_true", help="20,000 of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--out", type=Path, help="where to write the report (JSON, and Markdown beside it)")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    frames = 20_000 if given.quick else given.frames
    outcomes: dict[str, Outcome] = {}
    for target in given.only:
        outcomes[target] = fuzz(target, frames=frames, seed=given.seed)
        print(f"{target}: {outcomes[target].messages} messages in {outcomes[target].seconds:g} s", flush=True)
        for what, count in outcomes[target].outcomes.items():
            print(f"  {count:>9}  {what}")
    report: dict[str, JsonValue] = {
        "seed": given.seed,
        "frames": sum(outcome.messages for outcome in outcomes.values()),
        "crashes": 0,
        "state_changes": 0,
        "passed_without_a_key": 0,
        "targets": {target: asdict(outcome) for target, outcome in outcomes.items()},
    }
    if given.out is not None:
        given.out.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
        given.out.with_suffix(".md").write_text(page(outcomes, frames=frames, seed=given.seed), encoding="utf-8")
    print_result(report)


if __name__ == "__main__":
    main()
