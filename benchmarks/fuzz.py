"""Random and damaged messages against the real hub and the real actor, in process at full speed and over real sockets.

`python -m benchmarks.fuzz [--frames 1000000] [--seed 0] [--out docs/results/security.json]`; the last line is one JSON
object. Ends with 1 at the first crash or change of state, naming the seed and the number of the message.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import orjson
import structlog
import zmq
import zmq.asyncio
from pydantic import JsonValue

from benchmarks.fuzz_messages import Mutator, Parts
from benchmarks.fuzz_targets import MAX_MESSAGE_BYTES, ActorUnderAttack, FilesUnderAttack, HubUnderAttack
from benchmarks.runs import print_result
from protocols.channel import HubClient, HubSocket, new_actor_keys, new_keys
from protocols.keys import ActorKeys, HubKeys
from protocols.messages import Ack, LeaseRequest

SOCKET_SHARE, FILE_SHARE, KEY_SHARE = 20, 50, 200
"""For one message to the hub over a socket there are so many in process; and so on."""
AHEAD = 200
"""Messages on their way at once over a socket."""
PATIENCE_S = 60.0
HONEST = 424_242
"""Episodes that the honest actor asks for, to be known by."""


class Found(Exception):
    """A message that did harm."""

    def __init__(self, target: str, seed: int, number: int, parts: Parts) -> None:
        super().__init__(f"{target}: seed {seed}, message {number}: {[part[:200] for part in parts]}")


@dataclass(frozen=True)
class Outcome:
    """What became of the messages to one target."""

    frames: int
    """Messages, each of one frame or more."""
    outcomes: dict[str, int]
    seconds: float


def fuzz_hub(folder: Path, *, frames: int, seed: int) -> Outcome:
    """Messages to the hub, in process. Raises `Found`."""
    began = time.monotonic()
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, seed)
        for number in range(frames):
            parts = mutator.draw()
            try:
                target.attack(parts)
            except Exception as error:
                raise Found("hub", seed, number, parts) from error
    return Outcome(frames, dict(target.outcomes.most_common()), _since(began))


async def fuzz_actor(folder: Path, *, frames: int, seed: int) -> Outcome:
    """Messages to an actor, in process. Raises `Found`."""
    began = time.monotonic()
    with ActorUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, seed)
        for number in range(frames):
            parts = mutator.draw()
            try:
                await target.attack(parts)
            except Exception as error:
                raise Found("actor", seed, number, parts) from error
    return Outcome(frames, dict(target.outcomes.most_common()), _since(began))


def fuzz_files(folder: Path, *, files: int, seed: int) -> Outcome:
    """Damaged keyframes and deltas. Raises `Found`."""
    began = time.monotonic()
    target = FilesUnderAttack(folder)
    mutator = Mutator([[target.keyframe], [target.delta]], seed)
    for number in range(files):
        keyframe = number % 2 == 0
        content = mutator.damage(target.keyframe if keyframe else target.delta)
        try:
            (target.attack_keyframe if keyframe else target.attack_delta)(content)
        except Exception as error:
            raise Found("files", seed, number, [content]) from error
    return Outcome(files, dict(target.outcomes.most_common()), _since(began))


async def fuzz_sockets(folder: Path, *, frames: int, seed: int) -> Outcome:
    """The same messages over a real socket, plain noise on its port, and an honest actor that is served all along."""
    began = time.monotonic()
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, seed)
        async with (
            HubSocket.bind("tcp://127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES) as hub,
            HubClient.connect(hub.endpoint) as honest,
            anyio.create_task_group() as tasks,
        ):
            answered: Counter[str] = Counter()
            tasks.start_soon(_serve, hub, target, answered)
            tasks.start_soon(_noise, hub.endpoint, frames // 100, seed)
            with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.connect(hub.endpoint)
                for number in range(frames):
                    await dealer.send_multipart(mutator.draw())
                    if number % AHEAD == 0:
                        await _ask(honest, number)
                await dealer.send_multipart([LeaseRequest(episodes=HONEST).model_dump_json().encode()])
                with anyio.fail_after(PATIENCE_S):  # what was sent before it has been dealt with
                    while await dealer.recv_multipart() != [Ack(tree_id="honest").model_dump_json().encode()]:
                        pass
                await _ask(honest, frames)
            tasks.cancel_scope.cancel()
    outcomes = {**(target.outcomes + hub.refused), "honest actor answered": answered["honest"]}
    return Outcome(frames, outcomes, _since(began))


async def _serve(hub: HubSocket, target: HubUnderAttack, answered: Counter[str]) -> None:
    while True:
        received = await hub.receive()
        if received.message == LeaseRequest(episodes=HONEST):
            answered["honest"] += 1
            await hub.send(received.peer, Ack(tree_id="honest"))
            continue
        header = received.message.model_dump_json().encode()
        target.attack([header, *(bytes(frame) for frame in received.frames)])


async def _ask(honest: HubClient, number: int) -> None:
    with anyio.fail_after(PATIENCE_S):
        await honest.send(LeaseRequest(episodes=HONEST))
        message, _ = await honest.receive()
    assert message == Ack(tree_id="honest"), f"after {number} messages the hub answers {message}"


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


async def fuzz_keys(folder: Path, *, frames: int, seed: int) -> Outcome:
    """Wrong keys, no keys, keys meant for another hub: no message gets past the handshake, damaged or whole."""
    began = time.monotonic()
    new_keys(folder / "hub")
    new_keys(folder / "other")
    keys, allowed = HubKeys.load(folder / "hub"), ActorKeys.load(folder / "hub")
    new_actor_keys(folder / "stranger", hub=keys.pair.public)
    outsiders: dict[str, ActorKeys | None] = {
        "a key that is not allowed": ActorKeys.load(folder / "stranger"),
        "a key for another hub": ActorKeys(allowed.pair, ActorKeys.load(folder / "other").hub),
        "no key": None,
    }
    passed: Counter[str] = Counter(dict.fromkeys(outsiders, 0))
    with HubUnderAttack.open(folder) as target:
        mutator = Mutator(target.corpus, seed)
        messages = [mutator.draw() if n % 3 else target.corpus[n % len(target.corpus)] for n in range(frames)]
        async with (
            HubSocket.bind("tcp://127.0.0.1:0", keys=keys) as hub,
            HubClient.connect(hub.endpoint, keys=allowed) as honest,
        ):
            for name, outsider in outsiders.items():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_answer_honest, hub, allowed.pair.public, passed, name)
                    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
                        await _push(dealer, hub.endpoint, outsider, messages)
                        for number in range(5):
                            await _ask(honest, number)
                            await anyio.sleep(0.1)  # time for handshakes to be tried again
                    tasks.cancel_scope.cancel()
                passed[name] += hub.refused.total()
    return Outcome(len(outsiders) * frames, {f"passed with {name}": n for name, n in passed.items()}, _since(began))


async def _push(socket: zmq.asyncio.Socket, endpoint: str, keys: ActorKeys | None, messages: Sequence[Parts]) -> None:
    """Queue messages that go out as soon as the hub lets this peer in."""
    socket.linger, socket.sndhwm = 0, 0
    if keys is not None:
        socket.curve_publickey = keys.pair.public.encode()
        socket.curve_secretkey = keys.pair.secret.encode()
        socket.curve_serverkey = keys.hub.encode()
    socket.connect(endpoint)
    for parts in messages:
        await socket.send_multipart(parts)


async def _answer_honest(hub: HubSocket, key: str, passed: Counter[str], name: str) -> None:
    while True:
        received = await hub.receive()
        if received.key == key and received.message == LeaseRequest(episodes=HONEST):
            await hub.send(received.peer, Ack(tree_id="honest"))
        else:
            passed[name] += 1


def fuzz_all(*, frames: int, seed: int) -> dict[str, Outcome]:
    """Every target, each in a folder of its own. Raises `Found`."""
    sockets, files, keys = (max(10, frames // share) for share in (SOCKET_SHARE, FILE_SHARE, KEY_SHARE))
    with tempfile.TemporaryDirectory(prefix="matpo-fuzz-") as name:
        root = Path(name)
        for target in ("hub", "actor", "files", "sockets", "keys"):
            (root / target).mkdir()
        return {
            "hub": fuzz_hub(root / "hub", frames=frames, seed=seed),
            "actor": anyio.run(_actor, root / "actor", frames, seed),
            "weight files": fuzz_files(root / "files", files=files, seed=seed),
            "hub over sockets": anyio.run(_sockets, root / "sockets", sockets, seed),
            "hub with keys": anyio.run(_keys, root / "keys", keys, seed),
        }


async def _actor(folder: Path, frames: int, seed: int) -> Outcome:
    return await fuzz_actor(folder, frames=frames, seed=seed)


async def _sockets(folder: Path, frames: int, seed: int) -> Outcome:
    return await fuzz_sockets(folder, frames=frames, seed=seed)


async def _keys(folder: Path, frames: int, seed: int) -> Outcome:
    return await fuzz_keys(folder, frames=frames, seed=seed)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def main() -> None:
    """Fuzz, print a table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="messages to the hub, and as many to the actor")
    parser.add_argument("--quick", action="store_true", help="20,000 of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the report (JSON)")
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    outcomes = fuzz_all(frames=20_000 if given.quick else given.frames, seed=given.seed)
    for target, outcome in outcomes.items():
        print(f"{target}: {outcome.frames} messages in {outcome.seconds:g} s, no crash, no change of state")
        for what, count in outcome.outcomes.items():
            print(f"  {count:>9}  {what}")
    report: dict[str, JsonValue] = {
        "seed": given.seed,
        "frames": sum(outcome.frames for outcome in outcomes.values()),
        "crashes": 0,
        "state_changes": 0,
        "targets": {target: asdict(outcome) for target, outcome in outcomes.items()},
    }
    if given.out is not None:
        given.out.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    print_result(report)


if __name__ == "__main__":
    main()
