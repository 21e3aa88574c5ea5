"""The whole hub in this process, over real sockets, against a small actor and a small trainer that follow the rules."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import anyio
import anyio.to_thread
import orjson
import pytest

from learner.doctor import examine
from learner.hub.__main__ import bind_for_actors, bind_for_trainer, give_up, listen_address, trainer_path, write_address
from learner.hub.core import Hub, Side
from learner.hub.journal import Journal, JournalUnreadable
from learner.hub.ledger import checks, read_ledger
from learner.hub.service import Service
from learner.hub.summary import summarise, write_summary
from matpo.config import Config
from matpo.errors import UserError
from matpo.folder import RunFolder
from matpo.metrics import MetricsFile, read_metrics
from protocols.channel import CannotListen, HubClient, HubSocket, TrainerLink
from protocols.codec import decode_tree, encode_tree
from protocols.messages import (
    PROTOCOL,
    Ack,
    Batch,
    BatchRequest,
    Drain,
    Heartbeat,
    Hello,
    Lease,
    LeaseRequest,
    NotYet,
    Ok,
    Publish,
    StepDone,
    TrainerHello,
    TrainerWelcome,
    TreeUpload,
    WeightObject,
    WeightsReady,
)
from protocols.records import EpisodeTree, version_of
from tests.disk import full_disk
from tests.learner.hub.bench import TOKENIZER, digest_of, make_config, make_tasks, make_tree

STEPS = 3
CONFIG = make_config(
    run={"steps": STEPS},
    evaluation={"questions": 2},
    hub={"heartbeat_s": 0.2, "lease_s": 30.0},
    learner={"groups_per_step": 2, "group_size": 2},
)


def new_folder(path: Path, config: Config) -> RunFolder:
    folder = RunFolder(path)
    folder.config.write_bytes(orjson.dumps(config.model_dump(mode="json")))
    return folder


async def serve(folder: RunFolder, config: Config, started: anyio.Event) -> bool:
    """What `learner.hub.__main__` does, with tasks made here."""
    with Journal.open(folder.journal) as journal:
        hub = Hub(
            config, journal, run="test", weights=folder.weights, archive=folder.archive,
            tokenizer=TOKENIZER, train=make_tasks(20),
            evaluation=make_tasks(5, "held-out-"), now_s=time.monotonic(),
        )  # fmt: skip
        async with (
            HubSocket.bind(listen_address(config, folder)) as actors,
            bind_for_trainer(CONFIG, folder) as trainer,
        ):
            write_address(folder, actors.endpoint, trainer.endpoint)
            started.set()
            sockets: dict[Side, HubSocket] = {"actors": actors, "trainer": trainer}
            metrics = MetricsFile(folder.metrics)
            service = Service(hub, journal, metrics, sockets=sockets, steps=config.run.steps, heartbeat_s=0.2)
            complete = await service.run()
            metrics.close()
        if complete:
            write_summary(journal, config, folder, complete=True)
        return complete


def train(folder: RunFolder, config: Config, *, upto: int) -> list[str]:
    """A trainer without a model: asks, checks, reports, publishes. Returns the trees it was given."""
    address = folder.hub_address()
    assert address is not None
    seen: list[str] = []
    with TrainerLink(address.trainer_endpoint) as link:

        def ask(message: TrainerHello | BatchRequest | StepDone | Publish) -> tuple[object, tuple[memoryview, ...]]:
            return link.request(message, deadline_s=20.0, waiting_for="the test's hub")

        hello, _ = ask(TrainerHello(protocol=PROTOCOL, step=0, config_digest=config.shared_digest))
        assert isinstance(hello, TrainerWelcome)
        for step in range(upto + 1):
            if step > 0:
                answer, frames = ask(BatchRequest(step=step))
                while isinstance(answer, NotYet):
                    answer, frames = ask(BatchRequest(step=step))
                assert isinstance(answer, Batch)
                trees = decode_all(answer, frames)
                seen += [tree.tree_id for tree in trees]
                ids = tuple(tree.tree_id for tree in trees)
                assert ask(StepDone(lineage=hello.lineage, step=step, trained=ids, filtered=()))[0] == Ok()
            assert ask(publication(folder, version_of(lineage=hello.lineage, step=step)))[0] == Ok()
    return seen


def decode_all(batch: Batch, frames: tuple[memoryview, ...]) -> list[EpisodeTree]:
    trees, rest = [], list(frames)
    for count in batch.frame_counts:
        trees.append(decode_tree(rest[:count]))
        rest = rest[count:]
    assert rest == []
    return trees


def publication(folder: RunFolder, version: int) -> Publish:
    name = f"keyframe-{version}.bin"
    (folder.weights / name).write_bytes(b"weights")
    entry = WeightObject(name=name, kind="keyframe", version=version, base=None, size_bytes=7, digest="x")
    return Publish(version=version, digest=digest_of(version), objects=(entry,))


def idle_heartbeat(version: int) -> Heartbeat:
    return Heartbeat(leases=(), version=version, live_episodes=0, outbox_trees=0, sampled_tokens=0)


async def act(folder: RunFolder, config: Config, name: str) -> str:
    """An actor without an engine: plays every lease with the newest weights; returns why it was sent home."""
    address = folder.hub_address()
    assert address is not None
    version = -1
    waiting: list[Lease] = []
    async with HubClient.connect(address.endpoint) as client:
        await client.send(
            Hello(
                protocol=PROTOCOL,
                actor_id=name,
                tokenizer_digest=TOKENIZER,
                config_digest=config.shared_digest,
                capacity=8,
            )
        )
        await client.send(LeaseRequest(episodes=8))
        while True:
            message = None
            with anyio.move_on_after(0.1):
                message, _ = await client.receive()
            match message:
                case None:
                    await client.send(idle_heartbeat(version))
                case WeightsReady():
                    version = message.version
                case Lease():
                    waiting.append(message)
                case Ack():
                    await client.send(LeaseRequest(episodes=8))
                case Drain(reason=reason):
                    return reason
            for lease in [lease for lease in waiting if lease.min_version <= version]:
                waiting.remove(lease)
                for episode in lease.episodes:
                    reward = float(version >= STEPS or episode % 2)
                    tree = make_tree(lease, episode, version=version, reward=reward)
                    await client.send(TreeUpload(tree_id=tree.tree_id), encode_tree(tree))


async def test_a_run_over_real_sockets_comes_to_its_end_with_an_exact_ledger(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, CONFIG)
    started, goodbyes = anyio.Event(), list[str]()
    seen: list[str] = []

    async def actor(name: str) -> None:
        goodbyes.append(await act(folder, CONFIG, name))

    async def trainer() -> None:
        seen.extend(await anyio.to_thread.run_sync(lambda: train(folder, CONFIG, upto=STEPS)))

    async def hub() -> None:
        assert await serve(folder, CONFIG, started)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub)
            await started.wait()
            tasks.start_soon(trainer)
            for name in ("actor-0", "actor-1"):
                tasks.start_soon(actor, name)
    assert goodbyes == ["the run is complete"] * 2
    assert len(seen) == len(set(seen)) == STEPS * 4
    summary = orjson.loads(folder.summary.read_bytes())
    assert summary["accuracy"] == {"before": 0.0, "after": 1.0}
    assert summary["ledger_adds_up"] and summary["ledger"]["trained"] == STEPS * 4
    assert summary["steps"] == STEPS and summary["complete"]
    lines = [line for _, line in read_metrics(folder.metrics)]
    assert [line["label"] for line in lines if line["stage"] == "evaluation"] == ["before", "after"]
    assert [line["step"] for line in lines if line["stage"] == "hub"][-1] == STEPS
    before, after = (orjson.loads(folder.trace(name).read_bytes()) for name in ("before", "after"))
    assert before["question"] == after["question"]
    assert (before["rewards"]["answer"], after["rewards"]["answer"]) == (0.0, 1.0)
    assert after["trajectories"][0]["turns"][1]["tokens"] == [3, 4, 5]


async def test_a_hub_asked_to_stop_can_be_started_again_and_finishes(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, CONFIG)
    first = anyio.Event()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            outcome: list[bool] = []

            async def hub(started: anyio.Event) -> None:
                outcome.append(await serve(folder, CONFIG, started))

            async def actor() -> None:
                await act(folder, CONFIG, "actor-0")

            tasks.start_soon(hub, first)
            await first.wait()
            tasks.start_soon(actor)
            await anyio.to_thread.run_sync(lambda: train(folder, CONFIG, upto=1))
            os.kill(os.getpid(), signal.SIGTERM)
        assert outcome == [False]
        port = folder.hub_address()
        second = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hub, second)
            await second.wait()
            assert folder.hub_address() == port  # actors find it where it was
            tasks.start_soon(actor)
            await anyio.to_thread.run_sync(lambda: train(folder, CONFIG, upto=STEPS))
    assert outcome == [False, True]
    with Journal.open_read_only(folder.journal) as journal:
        assert all(check.holds for check in checks(journal))
        assert summarise(journal, folder, complete=True).lineages == 2
        assert read_ledger(journal).trained == STEPS * 4


async def test_the_doctor_reads_a_live_hub_and_a_dead_one(tmp_path: Path) -> None:
    folder = new_folder(tmp_path, CONFIG)
    started = anyio.Event()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, folder, CONFIG, started)
            await started.wait()
            await anyio.to_thread.run_sync(lambda: train(folder, CONFIG, upto=0))
            live = examine(folder, now=time.time())
            os.kill(os.getpid(), signal.SIGTERM)
    assert (live.state, live.hub_pid, live.adds_up) == ("live", os.getpid(), True)


def test_a_long_run_path_gets_a_short_socket_path(tmp_path: Path) -> None:
    with trainer_path(RunFolder(Path("/r"))) as plain:
        assert plain == Path("/r/hub.ipc")
    long = RunFolder(tmp_path / ("x" * 90))
    with trainer_path(long) as short, trainer_path(long) as again:
        assert len(str(short)) < 96 and again == short
    assert not short.parent.exists()


async def test_the_hub_leaves_no_socket_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / ("x" * 90))
    folder.path.mkdir()
    with trainer_path(folder) as path:
        room = path.parent
    async with bind_for_trainer(CONFIG, folder):
        assert (room / "hub.ipc").is_socket()
    assert not room.exists()


async def test_a_restarted_hub_whose_port_was_taken_finds_another(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with anyio.fail_after(10):
        async with HubSocket.bind("tcp://127.0.0.1:0") as squatter:
            write_address(folder, squatter.endpoint, "ipc:///nowhere")
            async with bind_for_actors(CONFIG, folder) as socket:
                assert socket.endpoint != squatter.endpoint
            taken = make_config(hub={"listen": squatter.endpoint})
            with pytest.raises(CannotListen, match=r"set hub\.listen"):
                async with bind_for_actors(taken, folder):
                    pass


def test_a_full_disk_ends_the_hub_in_a_line_and_with_a_code_that_has_it_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert give_up(RunFolder(tmp_path), sqlite3.OperationalError("database or disk is full")) == 1
    assert "database or disk is full; free disk space, nothing is lost" in capsys.readouterr().err
    with pytest.raises(UserError, match="text"):
        give_up(RunFolder(tmp_path), JournalUnreadable("text"))


def test_a_full_disk_when_a_journal_is_opened_is_not_taken_for_a_damaged_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal.open(path) as journal, journal.transaction():
        journal.count_up("trees")
    refused = pytest.raises(sqlite3.OperationalError)
    with full_disk(), refused, Journal.open(path):
        pass
    with Journal.open(path) as journal:
        assert journal.counter("trees") == 1


def test_a_transaction_that_the_disk_refuses_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        journal.execute("PRAGMA max_page_count = 60")
        with pytest.raises(sqlite3.OperationalError, match="full"), journal.transaction():
            for number in range(200):
                journal.execute("INSERT INTO meta VALUES (?, ?)", (f"key {number}", "x" * 4000))
        assert journal.number("SELECT COUNT(*) FROM meta") == 0


@pytest.mark.parametrize(
    ("listen", "expected"),
    [("tcp://127.0.0.1:0", "tcp://127.0.0.1:4321"), ("tcp://127.0.0.1:5000", "tcp://127.0.0.1:5000")],
)
def test_a_restarted_hub_keeps_the_port_it_was_given(tmp_path: Path, listen: str, expected: str) -> None:
    folder, config = RunFolder(tmp_path), make_config(hub={"listen": listen})
    assert listen_address(config, folder) == listen
    write_address(folder, "tcp://127.0.0.1:4321", "ipc:///nowhere")
    assert listen_address(config, folder) == expected
