"""Does asynchrony pay? The same steps synchronously and asynchronously, against tools with a heavy-tailed latency, and
what generation alone and training alone could reach. `python -m benchmarks.async_efficiency [--quick]`; the last line
is one JSON object."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from benchmarks.runs import ROOT, metrics, print_result, run_matpo
from learner.hub.journal import Journal, integer, real
from learner.trainer.intake import prepare
from learner.trainer.publish import Publisher
from learner.trainer.replay import trained_batches
from learner.trainer.setup import Training
from learner.trainer.step import train_step
from matpo.config import Config
from matpo.folder import RunFolder
from matpo.freshness import forecast
from matpo.load import load_config
from protocols.channel import TrainerLink
from protocols.codec import decode_header
from protocols.messages import (
    PROTOCOL,
    Batch,
    BatchRequest,
    HubMessage,
    NotYet,
    StepDone,
    TrainerHello,
    TrainerMessage,
)
from protocols.records import version_of

CONFIG = ROOT / "configs" / "quickstart.toml"
UNBOUNDED = 10_000
"""Generation alone: an admission bound and a staleness limit that are never reached."""
ANSWER_LIMIT_S = 120.0
RUN_LIMIT_S = 400.0


@dataclass(frozen=True)
class Setting:
    """How much is played, and how slow the tool is."""

    steps: int
    median_s: float
    sigma: float = 1.0
    warm_up: int = 1
    """Steps before the measured interval."""
    groups_per_step: int = 4
    group_size: int = 8
    actors: int = 2
    concurrency: int = 12
    runs_at_once: int = 1
    """Of the synchronous run and generation alone; 2 saves time, and the synchronous one leaves the cores idle."""

    @property
    def trees_per_step(self) -> int:
        return self.groups_per_step * self.group_size

    @property
    def slots(self) -> int:
        """Episodes all actors play at once."""
        return self.actors * self.concurrency

    @property
    def eta(self) -> int:
        """By the design's rule of thumb."""
        return forecast(in_flight=self.slots, trees_per_step=self.trees_per_step, eta=0).eta_needed

    def overrides(self, **more: str) -> list[str]:
        """The quick start with a slow tool and nothing else to do; the learning rate is next to nothing, so that the
        policy, and with it the length of an episode, is the same in all runs."""
        server = [str(ROOT / "benchmarks" / "slow_server.py"), "--median-s", str(self.median_s)]
        arguments = ", ".join(f'"{word}"' for word in [*server, "--sigma", str(self.sigma)])
        settings = {
            "run.steps": self.steps,
            "evaluation.questions": 0,
            "evaluation.every_steps": 0,
            "learner.lr": 1e-7,
            "learner.groups_per_step": self.groups_per_step,
            "learner.group_size": self.group_size,
            "learner.checkpoint_every_steps": 1000,
            "learner.zero_variance": "keep",  # the same trees in every run
            "actor.count": self.actors,
            "actor.concurrency": self.concurrency,
            "tools.mcpServers.search.args": f"[{arguments}]",
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        return [f"{key}={value}" for key, value in settings.items()]


QUICK = Setting(steps=6, median_s=0.25, groups_per_step=2, actors=1, runs_at_once=2)
FULL = Setting(steps=8, median_s=1.0)


@dataclass(frozen=True)
class Timeline:
    """What the journal of a run says of when things happened; Unix seconds."""

    began: float
    """The first lease."""
    done: tuple[float, ...]
    """When step 1, 2, … was recorded."""
    last_lease: float
    """From here on slots stay empty, because the run needs no more episodes."""
    trees: tuple[tuple[float, float], ...]
    """Beginning and end of every episode."""
    staleness_max: int
    filtered: int

    @classmethod
    def of(cls, folder: RunFolder) -> Timeline:
        with Journal.open_read_only(folder.journal) as journal, journal.snapshot():
            trees = journal.rows("SELECT received_at - seconds, received_at FROM trees WHERE state = 'trained'")
            staleness = journal.number("SELECT MAX(staleness) FROM trees WHERE state = 'trained'")
            ((began, last_lease),) = journal.rows("SELECT MIN(granted_at), MAX(granted_at) FROM leases")
            return cls(
                began=real(began),
                done=tuple(real(at) for (at,) in journal.rows("SELECT done_at FROM steps ORDER BY step")),
                last_lease=real(last_lease),
                trees=tuple((real(start), real(end)) for start, end in trees),
                staleness_max=integer(staleness),
                filtered=journal.number("SELECT COUNT(*) FROM trees WHERE state = 'filtered'"),
            )

    @property
    def seconds(self) -> float:
        """From the first lease to the last step."""
        return self.done[-1] - self.began

    def interval(self, setting: Setting) -> tuple[float, float]:
        """From the end of the warm-up to the last lease: start-up and the emptying pipeline at the end are left out."""
        return self.done[setting.warm_up - 1], self.last_lease

    def rate(self, setting: Setting) -> float:
        """Trees per second that came in during the interval; every one of them was trained on."""
        start, end = self.interval(setting)
        return sum(start < tree_end <= end for _, tree_end in self.trees) / (end - start)

    def busy(self, setting: Setting) -> float:
        """Fraction of the actors' slots that held an episode during the interval."""
        start, end = self.interval(setting)
        held = sum(max(0.0, min(end, tree_end) - max(start, tree_start)) for tree_start, tree_end in self.trees)
        return held / (setting.slots * (end - start))


def full_run(setting: Setting, parent: Path, *, eta: int) -> RunFolder:
    """`matpo run` to its end."""
    overrides = setting.overrides(freshness__eta=str(eta))
    return RunFolder(run_matpo(CONFIG, overrides, parent, limit_s=RUN_LIMIT_S))


def generation_only(setting: Setting, parent: Path) -> RunFolder:
    """Real hub and actors, and a stand-in that trains nothing and publishes nothing after version 0."""
    unbounded = str(UNBOUNDED)
    overrides = setting.overrides(
        freshness__eta=unbounded, freshness__max_staleness_steps=unbounded, run__dir=str(parent)
    )
    config = load_config(CONFIG, overrides)
    folder = RunFolder.create(config)
    (folder.path / "logs").mkdir(exist_ok=True)
    with child(folder, "hub", "learner.hub", "--run", str(folder.path)):
        address = folder.hub_address()
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while address is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the hub did not listen within {ANSWER_LIMIT_S:g} s; see {folder.path / 'logs'}")
            time.sleep(0.05)  # another process writes hub.json; there is nothing to wait on
            address = folder.hub_address()
        place = [str(folder.config), "--hub", address.endpoint, "--state", str(folder.path), "--actor-id"]
        with ExitStack() as stack:
            for number in range(setting.actors):
                stack.enter_context(child(folder, f"actor-{number}", "actors", *place, f"actor-{number}"))
            stand_in(folder, config, address.trainer_endpoint)
    return folder


@contextmanager
def child(folder: RunFolder, name: str, *arguments: str) -> Iterator[None]:
    """A process of the run for the length of the block."""
    with (folder.path / "logs" / f"{name}.out").open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, stdout=sink, stderr=sink, env=os.environ
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stand_in(folder: RunFolder, config: Config, endpoint: str) -> None:
    """A trainer that needs no time: every batch is trained the moment it is there."""
    policy = Training.start(config).policy
    publisher = Publisher(folder.weights, dtype=config.learner.publish_dtype, keyframe_every=1)
    with TrainerLink(endpoint) as link:
        ask(link, TrainerHello(protocol=PROTOCOL, step=0, config_digest=config.shared_digest))
        ask(link, publisher.publish(policy.parameters, version=version_of(lineage=0, step=0)))
        for step in range(1, config.run.steps + 1):
            answer, frames = ask(link, BatchRequest(step=step))
            while isinstance(answer, NotYet):
                answer, frames = ask(link, BatchRequest(step=step))
            assert isinstance(answer, Batch), answer
            ask(link, StepDone(lineage=0, step=step, trained=tuple(tree_ids(answer, frames)), filtered=()))


def tree_ids(batch: Batch, frames: Sequence[memoryview]) -> Iterator[str]:
    """The trees of a batch; each begins with its header."""
    start = 0
    for count in batch.frame_counts:
        yield decode_header(frames[start]).tree_id
        start += count


def ask(link: TrainerLink, message: TrainerMessage) -> tuple[HubMessage, tuple[memoryview, ...]]:
    return link.request(message, deadline_s=ANSWER_LIMIT_S, waiting_for=message.kind)


def training_only(setting: Setting, folder: RunFolder, parent: Path) -> float:
    """Trees per second of the trainer on the journal of a run after the warm-up: intake, step, publication."""
    config = load_config(folder.config)
    training = Training.start(config)
    policy, learner = training.policy, config.learner
    publisher = Publisher(
        parent / "weights", dtype=learner.publish_dtype, keyframe_every=config.hub.keyframe_every_steps
    )
    publisher.publish(policy.parameters, version=version_of(lineage=0, step=0))
    seconds = 0.0
    with Journal.open_read_only(folder.journal) as journal, journal.snapshot():
        for step, trees in trained_batches(journal):
            began = time.monotonic()
            current = version_of(lineage=0, step=step - 1)
            taken = prepare(trees, config, current=current, shape=policy.shape, device=policy.device)
            train_step(policy, training.optimizer, taken.micro_batches, learner, step=step, steps=setting.steps)
            publisher.publish(policy.parameters, version=version_of(lineage=0, step=step))
            if step > setting.warm_up:
                seconds += time.monotonic() - began
    return (setting.steps - setting.warm_up) * setting.trees_per_step / seconds


def mean_of(lines: Sequence[dict[str, JsonValue]], name: str, setting: Setting) -> float:
    """Mean of a trainer figure over the steps after the warm-up."""
    values = [line[name] for line in lines[setting.warm_up :]]
    return sum(float(value) for value in values if isinstance(value, int | float)) / len(values)


def print_row(name: str, timeline: Timeline, setting: Setting) -> None:
    start, end = timeline.interval(setting)
    figures = f"{timeline.rate(setting):9.2f}{timeline.busy(setting):12.0%}{timeline.seconds:10.1f}"
    print(f"{name:38}{end - start:12.1f}{figures}{timeline.staleness_max:11d}")


def measure(setting: Setting, parent: Path) -> dict[str, JsonValue]:
    """Run all four, print the table and return the figures."""
    asynchronous_folder = full_run(setting, parent / "asynchronous", eta=setting.eta)
    asynchronous = Timeline.of(asynchronous_folder)
    training = training_only(setting, asynchronous_folder, parent)
    with ThreadPoolExecutor(setting.runs_at_once) as pool:
        generation_run = pool.submit(generation_only, setting, parent / "generation")
        synchronous_run = pool.submit(full_run, setting, parent / "synchronous", eta=0)
    generation, synchronous = Timeline.of(generation_run.result()), Timeline.of(synchronous_run.result())
    rate, generated = asynchronous.rate(setting), generation.rate(setting)
    print(f"{'':38}{'interval, s':>12}{'trees/s':>9}{'slots busy':>12}{'s in all':>10}{'staleness':>11}")
    print_row(f"(a) synchronous, eta 0, {setting.steps} steps", synchronous, setting)
    print_row(f"(b) asynchronous, eta {setting.eta}, {setting.steps} steps", asynchronous, setting)
    print_row("(c) generation only (never publishes)", generation, setting)
    print(f"{'(d) training only':38}{'':12}{training:9.2f}")
    lines = metrics(asynchronous_folder.path, "trainer")
    stages = {name: round(mean_of(lines, name, setting), 3) for name in ("wait_s", "intake_s", "step_s", "publish_s")}
    print(f"trainer in (b), seconds a step: {', '.join(f'{name} {value:.2f}' for name, value in stages.items())}")
    return {
        "fraction_of_bound": round(rate / min(generated, training), 3),
        "speedup_vs_sync": round(synchronous.seconds / asynchronous.seconds, 2),
        "staleness_max": asynchronous.staleness_max,
        "async_trees_per_s": round(rate, 2),
        "generation_trees_per_s": round(generated, 2),
        "training_trees_per_s": round(training, 2),
        "sync_s": round(synchronous.seconds, 1),
        "async_s": round(asynchronous.seconds, 1),
        "slots_busy_async": round(asynchronous.busy(setting), 3),
        "slots_busy_generation": round(generation.busy(setting), 3),
        "filtered_trees": asynchronous.filtered,
        "eta": setting.eta,
        **stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps and a faster tool, within 50 s")
    parser.add_argument("--keep", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each run (default: {FULL.steps})")
    parser.add_argument("--median-s", type=float, help=f"of the tool's latency (default: {FULL.median_s:g})")
    options = parser.parse_args()
    setting = QUICK if options.quick else FULL
    setting = replace(setting, steps=options.steps or setting.steps, median_s=options.median_s or setting.median_s)
    print(
        f"{setting.steps} steps of {setting.groups_per_step} x {setting.group_size} trees; {setting.actors} actors of"
        f" {setting.concurrency} episodes each; tool latency lognormal, median {setting.median_s:g} s, sigma"
        f" {setting.sigma:g}"
    )
    print(
        f"interval: from the end of step {setting.warm_up} to the last lease (start-up and the emptying pipeline at the"
        " end left out); s in all: first lease to last step",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="matpo-") as folder:
        print_result(measure(setting, options.keep or Path(folder)))


if __name__ == "__main__":
    main()
