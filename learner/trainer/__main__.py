"""The trainer, one process or several ranks: asks the hub for groups, takes steps on them, publishes weights; it can be
killed at any moment."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType

import structlog

from learner.trainer.checkpoint import Checkpoints
from learner.trainer.guard import Guard
from learner.trainer.hub import NoHub, Refused
from learner.trainer.intake import IntakeReport, StepInput, prepare, read_trees
from learner.trainer.ranks import ALONE, Ranks, joined
from learner.trainer.report import StepReport, merged
from learner.trainer.setup import Training
from learner.trainer.shared_hub import SharedHub
from learner.trainer.step import train_step
from learner.trainer.turn import only_trainer
from matpo.collapse import Vitals
from matpo.config import Config
from matpo.credit.scheme import NOTHING, Memory
from matpo.errors import run_command
from matpo.folder import RunFolder
from matpo.launched import code_for_launcher, launched_ranks, own_rank, rank_name
from matpo.load import load_config
from matpo.logs import configure_logs
from matpo.metrics import MetricsFile
from matpo.owner import LEAVE_LIMIT_S, Owner, add_owned
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
    vitals: Vitals
    """What the collapse watch looks at, over all roles."""


class Stopwatch:
    """Seconds between one lap and the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def lap(self, name: str) -> None:
        """End what `name` is the time of."""
        began, self._at = self._at, time.monotonic()
        self.seconds[name] = round(self._at - began, 4)


def train(
    folder: RunFolder, config: Config, metrics: MetricsFile, stopping: threading.Event, ranks: Ranks = ALONE
) -> bool:
    """Resume from the newest checkpoint and train until the last step, or until told to stop between two steps.

    All ranks run this loop in step; the first one talks to the hub and writes the files. The order inside a step makes
    every crash harmless: the ledger learns of the step before its weights are published, and a checkpoint is only ever
    of a step the ledger knows. True: the run went back to a checkpoint and is to be trained on from there.
    """
    guard = Guard.of(folder, config, ranks)
    config = guard.config
    training = Training.start(config, ranks)
    policy, optimizer, learner = training.policy, training.optimizer, config.learner
    checkpoints = Checkpoints(folder.checkpoints, learner.keep_checkpoints, ranks)
    state = checkpoints.restore(policy, optimizer)
    saved = None if state is None else state.step
    step = saved or 0
    memory: Memory = NOTHING if state is None else state.credit
    due = False
    save = partial(checkpoints.save, policy, optimizer, model=config.model.path)
    take = partial(prepare, config=config, shape=policy.shape, device=policy.device, ranks=ranks)
    with SharedHub.open(folder, config, ranks, stopping) as hub:
        lineage = hub.hello(step=step, config_digest=config.shared_digest)
        hub.publish(policy.published, version=version_of(lineage=lineage, step=step))
        log.info("trainer ready", step=step, lineage=lineage, resumed=state is not None, ranks=ranks.count)
        while step < config.run.steps:
            watch = Stopwatch()
            answer = hub.batch(step + 1, settled=min(step, checkpoints.oldest_step()))
            if answer is None:
                break
            watch.lap("wait_s")
            current = version_of(lineage=lineage, step=step)
            taken = take(read_trees(*answer), current=current, memory=memory)
            memory = taken.memory
            watch.lap("intake_s")
            step += 1
            report = shared_step(training, taken, config, step, ranks)
            watch.lap("step_s")
            hub.done(lineage, step, taken, answer[1])
            version = version_of(lineage=lineage, step=step)
            size = hub.publish(policy.published, version=version)
            watch.lap("publish_s")
            due = due or step % learner.checkpoint_every_steps == 0 or step == config.run.steps
            if due and save(step=step, lineage=lineage, memory=memory, required=step == config.run.steps):
                saved, due = step, False
            watch.lap("checkpoint_s")
            vitals = guard.see(step, report, taken.report)
            if ranks.first:
                line = {**taken.report.model_dump(), **report.model_dump(), **watch.seconds}
                metrics.append("trainer", TrainerMetrics(**line, version=version, published_bytes=size, vitals=vitals))
            log.info("step", step=step, loss=report.loss, grad_norm=report.grad_norm, reward=taken.report.reward_mean)
            if guard.raised:
                break
        if saved != step and not guard.goes_back:
            save(step=step, lineage=lineage, memory=memory)
    log.info("trainer done", step=step, stopped=stopping.is_set())
    return guard.conclude(checkpoints)


def shared_step(training: Training, taken: StepInput, config: Config, step: int, ranks: Ranks) -> StepReport:
    """Take a step on this rank's micro-batches; the report is that of all ranks."""
    mine = train_step(
        training.policy,
        training.optimizer,
        taken.micro_batches,
        config.learner,
        step=step,
        steps=config.run.steps,
        reference=training.reference,
        ranks=ranks,
    )
    return merged([StepReport.from_json(part) for part in ranks.gather(mine.to_json())])


def run(arguments: Sequence[str]) -> int:
    """Exit code 0: the last step is taken. 130: SIGTERM/SIGINT was obeyed. Both 1 and 130 let a supervisor that goes
    on itself start it again, 2 and 3 (the run paused) do not."""
    parser = argparse.ArgumentParser(prog="python -m learner.trainer", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    add_owned(parser)
    options = parser.parse_args(arguments)
    # A rank without its launcher ends at once: only all ranks together can end in order.
    leave_limit_s = LEAVE_LIMIT_S if launched_ranks() == 1 else 0.0
    Owner.at_standard_input(owned=options.owned, leave_limit_s=leave_limit_s)
    folder = RunFolder.existing(options.run)
    config = load_config(folder.config)
    name = rank_name(own_rank())
    configure_logs(folder.log(name), name)
    stopping = threading.Event()
    stop_on_signals(stopping)
    metrics = MetricsFile(folder.metrics)
    try:
        turn = only_trainer(folder.trainer_lock, stopping) if own_rank() == 0 else nullcontext()
        with turn, joined(config.learner) as ranks:
            while train(folder, config, metrics, stopping, ranks):
                log.info("training begins again")
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
    ended = run_command(lambda: run(sys.argv[1:]))
    sys.exit(code_for_launcher(ended) if own_rank() else ended)  # the first rank's supervisor is to know
