"""A run folder with a tiny model and a journal full of finished groups, and a hub that serves them to a trainer."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
from anyio.abc import TaskStatus
from anyio.from_thread import start_blocking_portal
from pydantic import JsonValue

from learner.hub.batches import Batches, BatchRules, OutOfStep
from learner.hub.journal import Journal
from learner.hub.leases import GroupRules, Leases
from learner.trainer.__main__ import train
from matpo.config import Config
from matpo.folder import HubAddress, RunFolder
from matpo.load import load_config
from matpo.metrics import MetricsFile
from protocols.channel import HubSocket
from protocols.codec import encode_tree
from protocols.messages import (
    Batch,
    BatchRequest,
    HubMessage,
    NotYet,
    Ok,
    Publish,
    Refuse,
    StepDone,
    TrainerBeat,
    TrainerHello,
    TrainerWelcome,
)
from protocols.records import EpisodeTree, Task
from tests.learner.trainer.models import tiny_model
from tests.matpo.trees import trajectory, tree

GROUPS, SIZE = 2, 3


def make_run(
    path: Path,
    *,
    steps: int = 4,
    learner: dict[str, JsonValue] | None = None,
    model: dict[str, JsonValue] | None = None,
) -> tuple[RunFolder, Config]:
    """A new run folder: config.json, a tiny Qwen3 model and a journal with enough groups for every step."""
    tiny_model("qwen3").save_pretrained(path / "model")
    content = {
        "run": {"steps": steps},
        "model": {"path": str(path / "model")} | (model or {}),
        "data": {name: {"kind": "world"} for name in ("train", "evaluation")},
        "episode": {"roles": {"planner": {"system": "plan", "delegates": ["worker"]}, "worker": {"system": "work"}}},
        "learner": {"groups_per_step": GROUPS, "group_size": SIZE, "lr": 1e-2, "checkpoint_every_steps": 2}
        | (learner or {}),
        "hub": {"keyframe_every_steps": 3},
    }
    (path / "config.json").write_bytes(orjson.dumps(content))
    folder = RunFolder.existing(path)
    with Journal.open(folder.journal) as journal, journal.transaction():
        for number in range(steps * GROUPS):
            insert_group(journal, number)
    return folder, load_config(folder.config)


def episode(group: int, number: int) -> EpisodeTree:
    """A planner, a worker, a reward; the third tree of every group was broken by a tool and is not scored."""
    seed = group * 10 + number
    reward = None if number == 2 else float(np.random.default_rng(seed).integers(0, 2))
    return tree(
        reward,
        trajectory("...xx..xxx", seed=seed),
        trajectory("..xxx.x", role="worker", parent=(0, 0), seed=seed + 1),
        name=f"tree-{group}-{number}",
        group=f"group-{group}",
        task=Task.make(f"question {group}", ("answer",)),
        episode=number,
    )


def insert_group(journal: Journal, number: int) -> None:
    trees = [episode(number, index) for index in range(SIZE)]
    task = trees[0].task
    seq = journal.insert(
        "INSERT INTO groups (group_id, purpose, task_id, task, state, opened_at)"
        " VALUES (?, 'train', ?, ?, 'complete', 0)",
        (f"group-{number}", task.task_id, task.model_dump_json()),
    )
    lease = f"lease-group-{number}"
    journal.insert("INSERT INTO leases VALUES (?, ?, 'actor', 'played', 0)", (lease, seq))
    for one in trees:
        frames = encode_tree(one)
        tree_seq = journal.insert(
            "INSERT INTO trees (tree_id, group_seq, lease_id, episode, actor_id, state, oldest_version, newest_version,"
            " reward, rewards, tokens, sampled_tokens, tool_calls, tool_failures, seconds, received_at)"
            " VALUES (?, ?, ?, ?, 'actor', 'pending', 0, 0, ?, '{}', 1, 1, 0, 0, 1, 0)",
            (one.tree_id, seq, lease, one.episode, one.reward),
        )
        sizes = orjson.dumps([len(frame) for frame in frames]).decode()
        journal.insert("INSERT INTO frames VALUES (?, ?, ?)", (tree_seq, sizes, b"".join(frames)))


class JournalHub:
    """The trainer's side of a hub, in a thread, over the real journal and socket."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.published: list[Publish] = []
        self.steps_done: list[StepDone] = []
        self.beats: queue.Queue[TrainerBeat] = queue.Queue()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> JournalHub:
        portal = self._stack.enter_context(start_blocking_portal())
        future, _ = portal.start_task(self._serve)
        self._stack.callback(future.cancel)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.folder.hub.unlink()

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        rules = GroupRules(group_size=SIZE, min_group=2, max_attempts=1, filter_zero_variance=False)
        with Journal.open(self.folder.journal) as journal:
            leases = Leases(journal, rules, lease_s=60, now_s=0)
            batches = Batches(journal, leases, BatchRules(groups_per_step=GROUPS, min_group=2, max_staleness_steps=99))
            async with HubSocket.bind("tcp://127.0.0.1:0", keys=None, max_message_bytes=1 << 24) as socket:
                address = HubAddress(endpoint="", trainer_endpoint=socket.endpoint, pid=os.getpid(), run="run")
                self.folder.hub.write_text(address.model_dump_json())
                task_status.started()
                while True:
                    received = await socket.receive()
                    with journal.transaction():
                        answer, frames = self._answer(batches, received.message)
                    await socket.send(received.peer, answer, frames)

    def _answer(self, batches: Batches, message: object) -> tuple[HubMessage, list[memoryview]]:
        try:
            match message:
                case TrainerHello(step=step):
                    return TrainerWelcome(lineage=batches.begin_lineage(step, at=0.0)), []
                case BatchRequest(step=step):
                    groups = batches.plan(step)
                    if groups is None:
                        return NotYet(), []
                    trees = batches.frames(groups)
                    counts = tuple(len(frames) for frames in trees)
                    return Batch(step=step, frame_counts=counts), [frame for frames in trees for frame in frames]
                case StepDone():
                    batches.done(message, at=0.0)
                    self.steps_done.append(message)
                case Publish():
                    self.published.append(message)
                case TrainerBeat():
                    self.beats.put(message)
        except OutOfStep as error:
            return Refuse(reason="unexpected", detail=str(error)), []
        return Ok(), []


class StopAfter(threading.Event):
    """A stop signal that comes while the trainer waits for its n-th look at it: between two steps."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._looks = looks

    def is_set(self) -> bool:
        self._looks -= 1
        return self._looks < 0 or super().is_set()


def run_trainer(folder: RunFolder, config: Config, *, stopping: threading.Event | None = None) -> JournalHub:
    """Train against a hub of one's own until the end (or the stop signal)."""
    with JournalHub(folder) as hub, contextlib.closing(MetricsFile(folder.metrics)) as metrics:
        train(folder, config, metrics, stopping or threading.Event())
    return hub


def damage(checkpoint: Path) -> None:
    """Turn one bit of a checkpoint's weights."""
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def ledger(folder: RunFolder) -> Iterator[tuple[object, ...]]:
    """(state, step, reason, how many) of all trees."""
    with Journal.open_read_only(folder.journal) as journal:
        yield from journal.rows("SELECT state, step, reason, COUNT(*) FROM trees GROUP BY 1, 2, 3 ORDER BY 2, 1")
