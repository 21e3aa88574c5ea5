"""A whole actor against a hub that is a socket and a script: work, weights, restarts, refusals, leaving."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from actors.__main__ import Place, parse, run_actor
from actors.failure import user_error
from matpo.config import Config
from matpo.errors import UserError
from protocols.channel import HubSocket
from protocols.codec import decode_tree
from protocols.messages import (
    Ack,
    ActorMessage,
    Chunk,
    ChunkRequest,
    Drain,
    Goodbye,
    Heartbeat,
    Hello,
    Lease,
    LeaseRequest,
    Refuse,
    TreeUpload,
    WeightsLoaded,
    WeightsReady,
    Welcome,
)
from protocols.records import EpisodeTree, Task
from protocols.refusals import HubInput, HubUnreachable
from protocols.weights import Tensor, weights_digest, write_keyframe
from tests.actors.tools.hosts import FREEZE, once

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "models" / "quickstart"
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the quick start's tokenizer, and its weights as the hub would hand them out."""
    folder = tmp_path_factory.mktemp("model")
    for file in TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    build: Callable[[Qwen3Config], Qwen3ForCausalLM] = Qwen3ForCausalLM
    model = build(config)
    model.save_pretrained(folder)
    weights = {name: Tensor("float32", p.detach().numpy()) for name, p in model.named_parameters()}
    (folder / "objects").mkdir()
    item = write_keyframe(folder / "objects" / "keyframe-0", weights, version=0)
    ready = WeightsReady(version=0, digest=weights_digest(weights), objects=(item,))
    (folder / "objects" / "ready.json").write_text(ready.model_dump_json())
    return folder


def config_for(model: Path, **more: object) -> Config:
    world = {"kind": "world", "worlds": 1, "questions": 2}
    role = {"system": "plan", "max_turns": 2, "sampling": {"max_tokens": 4}}
    return Config.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": world, "evaluation": world},
            "episode": {"workflow": "single_agent", "root": "planner", "roles": {"planner": role}},
            "actor": {
                "concurrency": 4,
                "engine": {"max_batch": 4, "max_context_tokens": 128},
                "weights": {"memory": str(model)},
            },
            **more,
        }
    )


@dataclass
class ScriptedHub:
    """Welcomes, hands out weights and one lease of two episodes, acknowledges; remembers everything."""

    socket: HubSocket
    objects: Path
    leases: list[Lease]
    acknowledges: bool = True
    knows: set[bytes] = field(default_factory=set)
    heard: list[HubInput] = field(default_factory=list)
    trees: list[EpisodeTree] = field(default_factory=list)
    changed: anyio.Event = field(default_factory=anyio.Event)

    async def serve(self) -> None:
        while True:
            received = await self.socket.receive()
            self.heard.append(received.message)
            if isinstance(received.message, TreeUpload):
                self.trees.append(decode_tree(received.frames))
            if received.peer not in self.knows and not isinstance(received.message, Hello):
                await self.socket.send(received.peer, Refuse(reason="unknown_peer", detail="say hello"))
            else:
                await self.answer(received.peer, received.message)
            self.changed.set()
            self.changed = anyio.Event()

    async def answer(self, peer: bytes, message: HubInput) -> None:
        match message:
            case Hello():
                self.knows.add(peer)
                await self.socket.send(peer, Welcome(run="test", heartbeat_s=0.05))
            case Heartbeat():
                await self.socket.send(peer, self.weights())
            case ChunkRequest(name=name, offset=offset, size_bytes=size):
                content = (self.objects / name).read_bytes()
                await self.socket.send(peer, Chunk(name=name, offset=offset), [content[offset : offset + size]])
            case LeaseRequest() if self.leases:
                await self.socket.send(peer, self.leases.pop())
            case TreeUpload(tree_id=tree_id) if self.acknowledges:
                await self.socket.send(peer, Ack(tree_id=tree_id))
            case _:
                pass

    def weights(self) -> WeightsReady:
        return WeightsReady.model_validate_json((self.objects / "ready.json").read_bytes())

    def waits(self) -> list[str]:
        """What the newest heartbeat says is waited for."""
        beats = [message for message in self.heard if isinstance(message, Heartbeat)]
        return [wait.what for wait in beats[-1].waits] if beats else []

    async def wait(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(PATIENCE_S):
            while not condition():
                await self.changed.wait()

    async def send_home(self) -> None:
        for peer in self.knows:
            await self.socket.send(peer, Drain(reason="run complete"))

    def of(self, kind: type[ActorMessage]) -> list[HubInput]:
        return [message for message in self.heard if isinstance(message, kind)]


@asynccontextmanager
async def scripted_hub(model: Path) -> AsyncIterator[ScriptedHub]:
    lease = Lease(
        lease_id="lease-1",
        group_id="group-1",
        task=Task.make("who is it ?", ("me",)),
        episodes=(0, 1),
        purpose="train",
        min_version=0,
        expires_s=60.0,
    )
    async with HubSocket.bind("tcp://127.0.0.1:0") as socket:
        hub = ScriptedHub(socket, model / "objects", [lease])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub.serve)
            yield hub
            tasks.cancel_scope.cancel()


def place(config: Config, hub: ScriptedHub, tmp_path: Path) -> Place:
    return Place(config, hub.socket.endpoint, tmp_path, "actor-0", patience_s=PATIENCE_S)


async def test_an_actor_pulls_weights_plays_its_lease_and_goes_home_when_told(
    model_folder: Path, tmp_path: Path
) -> None:
    async with scripted_hub(model_folder) as hub, anyio.create_task_group() as tasks:
        tasks.start_soon(run_actor, place(config_for(model_folder), hub, tmp_path))
        await hub.wait(lambda: len({tree.tree_id for tree in hub.trees}) == 2)
        await hub.send_home()
    digest = hub.weights().digest
    loaded = hub.of(WeightsLoaded)
    assert [(m.version, m.digest) for m in loaded if isinstance(m, WeightsLoaded)] == [(0, digest)]
    assert sorted({tree.episode for tree in hub.trees}) == [0, 1]
    for tree in hub.trees:
        assert (tree.actor_id, tree.lease_id, tree.weights[0].digest) == ("actor-0", "lease-1", digest)
        assert tree.sampled_count > 0


async def test_a_hub_that_forgot_everything_is_greeted_again_and_gets_the_trees_again(
    model_folder: Path, tmp_path: Path
) -> None:
    async with scripted_hub(model_folder) as hub, anyio.create_task_group() as tasks:
        hub.acknowledges = False
        tasks.start_soon(run_actor, place(config_for(model_folder), hub, tmp_path))
        await hub.wait(lambda: len(hub.trees) == 2)
        hub.knows.clear()
        hub.acknowledges = True
        await hub.wait(lambda: len(hub.trees) == 4 and len(hub.of(Hello)) == 2)
        await hub.send_home()
    ids = [tree.tree_id for tree in hub.trees]
    assert sorted(ids[:2]) == sorted(ids[2:])


async def test_trees_of_an_earlier_process_are_delivered_by_the_next(model_folder: Path, tmp_path: Path) -> None:
    async with scripted_hub(model_folder) as hub:
        hub.acknowledges = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_actor, place(config_for(model_folder), hub, tmp_path))
            await hub.wait(lambda: len(hub.trees) == 2)
            tasks.cancel_scope.cancel()
        hub.acknowledges = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_actor, place(config_for(model_folder), hub, tmp_path))
            await hub.wait(lambda: len(hub.trees) == 4)
            await hub.send_home()
    assert len({tree.tree_id for tree in hub.trees}) == 2


async def test_a_refused_config_ends_the_actor_with_the_hubs_reason(model_folder: Path, tmp_path: Path) -> None:
    async with HubSocket.bind("tcp://127.0.0.1:0") as socket, anyio.create_task_group() as tasks:

        async def refuse() -> None:
            received = await socket.receive()
            await socket.send(received.peer, Refuse(reason="wrong_config", detail="episode differs"))

        tasks.start_soon(refuse)
        with pytest.raises(UserError, match="episode differs"), anyio.fail_after(PATIENCE_S):
            await run_actor(Place(config_for(model_folder), socket.endpoint, tmp_path, "actor-0"))


async def test_an_actor_that_comes_as_the_run_ends_goes_home_without_an_error(
    model_folder: Path, tmp_path: Path
) -> None:
    async with HubSocket.bind("tcp://127.0.0.1:0") as socket:
        words = command(model_folder, tmp_path, socket.endpoint)
        async with await anyio.open_process(words, cwd=ROOT, stdout=None, stderr=None) as actor:
            with anyio.fail_after(PATIENCE_S):
                received = await socket.receive()
                await socket.send(received.peer, Refuse(reason="draining", detail="the run is complete"))
                assert await actor.wait() == 0


async def test_a_tool_server_that_does_not_start_ends_the_actor_with_its_name(
    model_folder: Path, tmp_path: Path
) -> None:
    broken = {"mcpServers": {"broken": {"command": sys.executable, "args": ["-c", "raise SystemExit(3)"]}}}
    async with scripted_hub(model_folder) as hub:
        with anyio.fail_after(PATIENCE_S):
            try:
                await run_actor(place(config_for(model_folder, tools=broken), hub, tmp_path))
            except (UserError, BaseExceptionGroup) as error:
                known = user_error(error)
    assert known is not None and "broken" in str(known)


async def test_a_tool_server_frozen_at_its_first_start_is_told_to_the_hub_and_overcome(
    model_folder: Path, tmp_path: Path
) -> None:
    frozen = {"mcpServers": {"lame": once(tmp_path, FREEZE, start_timeout_s=3)}}
    async with scripted_hub(model_folder) as hub, anyio.create_task_group() as tasks:
        tasks.start_soon(run_actor, place(config_for(model_folder, tools=frozen), hub, tmp_path))
        await hub.wait(lambda: "the first answer of tool server lame" in hub.waits())
        await hub.wait(lambda: len(hub.trees) == 2)
        assert "the first answer of tool server lame" not in hub.waits()
        await hub.send_home()


def command(model: Path, tmp_path: Path, hub: str) -> list[str]:
    config = tmp_path / "config.json"
    config.write_text(config_for(model).model_dump_json())
    return [sys.executable, "-m", "actors", str(config), "--hub", hub, "--state", str(tmp_path), "--actor-id", "a"]


def test_an_address_that_is_none_is_one_line_and_exit_code_2(model_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(model_folder, tmp_path, "nonsense"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: 'nonsense' is not an address")
    assert len(done.stderr.strip().splitlines()) == 1


async def test_a_hub_that_is_not_there_ends_the_actor_in_time(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HubUnreachable, match=r"within 0\.1 s"):
        await run_actor(Place(config_for(model_folder), "tcp://127.0.0.1:9", tmp_path, "actor-0", patience_s=0.1))


def test_an_actor_id_that_is_no_file_name_is_refused(model_folder: Path, tmp_path: Path) -> None:
    arguments = command(model_folder, tmp_path, "tcp://127.0.0.1:1")[3:]
    with pytest.raises(UserError, match="--actor-id 'a/b'"):
        parse([*arguments, "--actor-id", "a/b"])
    there, log_file = parse([*arguments, "actor.concurrency=3"])
    assert there.config.actor.concurrency == 3 and log_file == tmp_path / "logs" / "a.jsonl"


async def test_sigterm_hands_over_what_was_played_and_says_goodbye(model_folder: Path, tmp_path: Path) -> None:
    async with scripted_hub(model_folder) as hub:
        arguments = command(model_folder, tmp_path, hub.socket.endpoint)
        async with await anyio.open_process(arguments, cwd=ROOT) as process:
            await hub.wait(lambda: len(hub.trees) >= 1)
            process.send_signal(signal.SIGTERM)
            await hub.wait(lambda: bool(hub.of(Goodbye)))
            with anyio.fail_after(PATIENCE_S):
                assert await process.wait() == 0
    assert hub.heard[-1] == Goodbye(reason="SIGTERM")
