"""The trainer: asks the hub for groups, takes steps on them, publishes weights, and can be killed at any moment."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import structlog

from learner.trainer.checkpoint import Checkpoints
from learner.trainer.consumed import ConsumedLog
from learner.trainer.hub import Hub, NoHub, Refused
from learner.trainer.intake import IntakeReport, prepare, read_trees
from learner.trainer.publish import Publisher
from learner.trainer.report import StepReport
from learner.trainer.setup import Training
from learner.trainer.step import train_step
from matpo.config import Config
from matpo.errors import run_command
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.metrics import MetricsFile
from matpo.owner import Owner, add_owned
from protocols.channel import ChannelError
from protocols.records import version_of

log = structlog.get_logger()

INTERRUPTED = 130


class TrainerMetrics(StepReport, IntakeReport):
    """One line of stage `trainer` in metrics.jsonl."""

    version: int
    """Published after the step."""
    wait_s: float
    """For the hub to have a batch."""
    intake_s: float
    step_s: float
    publish_s: float
    checkpoint_s: float
    published_bytes: int


def train(folder: RunFolder, config: Config, metrics: MetricsFile, stopping: threading.Event) -> None:
    """Resume from the newest checkpoint and train until the last step, or until told to stop between two steps.

    The order inside a step makes every crash harmless: the ledger learns of the step before its weights are published,
    and a checkpoint is only ever of a step the ledger knows.
    """
    training = Training.start(config)
    policy, optimizer, learner = training.policy, training.optimizer, config.learner
    checkpoints = Checkpoints(folder.checkpoints, learner.keep_checkpoints)
    state = checkpoints.restore(policy, optimizer)
    step = 0 if state is None else state.step
    publisher = Publisher(
        folder.weights,
        dtype=learner.publish_dtype,
        keyframe_every=config.hub.keyframe_every_steps,
        threads=learner.threads,
    )
    with Hub(folder, stopping) as hub, ConsumedLog(folder.consumed) as consumed:
        lineage = hub.hello(step=step, config_digest=config.shared_digest)
        consumed.start(lineage, step)
        hub.publish(publisher.publish(policy.published, version=version_of(lineage=lineage, step=step)))
        log.info("trainer ready", step=step, lineage=lineage, resumed=state is not None)
        while step < config.run.steps:
            clock = [time.monotonic()]
            answer = hub.batch(step + 1, settled=min(step, checkpoints.oldest_step()))
            if answer is None:
                break
            clock.append(time.monotonic())
            current = version_of(lineage=lineage, step=step)
            taken = prepare(read_trees(*answer), config, current=current, shape=policy.shape, device=policy.device)
            clock.append(time.monotonic())
            step += 1
            report = train_step(
                policy,
                optimizer,
                taken.micro_batches,
                learner,
                step=step,
                steps=config.run.steps,
                reference=training.reference,
            )
            clock.append(time.monotonic())
            consumed.step(lineage, step, taken, answer[1])
            hub.done(step, taken)
            published = publisher.publish(policy.published, version=version_of(lineage=lineage, step=step))
            hub.publish(published)
            clock.append(time.monotonic())
            if step % learner.checkpoint_every_steps == 0 or step == config.run.steps or stopping.is_set():
                checkpoints.save(policy, optimizer, step=step, lineage=lineage, model=config.model.path)
            clock.append(time.monotonic())
            names = ("wait_s", "intake_s", "step_s", "publish_s", "checkpoint_s")
            seconds = {name: round(end - start, 4) for name, start, end in zip(names, clock, clock[1:], strict=False)}
            size = sum(item.size_bytes for item in published.objects)
            line = {**taken.report.model_dump(), **report.model_dump(), **seconds}
            metrics.append("trainer", TrainerMetrics(**line, version=published.version, published_bytes=size))
            log.info("step", step=step, loss=report.loss, grad_norm=report.grad_norm, reward=taken.report.reward_mean)
        newest = checkpoints.newest()
        if newest is None or newest.step != step:
            checkpoints.save(policy, optimizer, step=step, lineage=lineage, model=config.model.path)
    log.info("trainer done", step=step, stopped=stopping.is_set())


def run(arguments: Sequence[str]) -> int:
    """Exit code 0: the last step is taken. 130: SIGTERM/SIGINT was obeyed. Both 1 and 130 let a supervisor that goes
    on itself start it again."""
    parser = argparse.ArgumentParser(prog="python -m learner.trainer", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    add_owned(parser)
    options = parser.parse_args(arguments)
    owner = Owner.at_standard_input(owned=options.owned)
    folder = RunFolder.existing(options.run)
    config = load_config(folder.config)
    configure_logs(folder.log("trainer"), "trainer")
    stopping = threading.Event()
    stop_on_signals(stopping)
    owner.beat_from_a_thread()
    metrics = MetricsFile(folder.metrics)
    try:
        train(folder, config, metrics, stopping)
    except (ChannelError, NoHub, Refused, OSError) as error:
        log.error("trainer gives up", reason=str(error))
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        metrics.close()
    return INTERRUPTED if stopping.is_set() else 0


def stop_on_signals(stopping: threading.Event) -> None:
    """The first SIGTERM or SIGINT stops between two steps and saves; a second one ends the process at once."""

    def stop(number: int, _: FrameType | None) -> None:
        stopping.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
