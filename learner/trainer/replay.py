"""Train again from a run's journal alone: the same trees in the same order give the same weights, bit for bit.

With overrides it trains another way on the same episodes, to compare credit rules or objectives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from learner.hub.batches import STALE, split_frames
from learner.hub.journal import Journal, JournalUnreadable, integer, text
from learner.hub.settled import read_settled
from learner.trainer.checkpoint import Checkpoints
from learner.trainer.intake import prepare
from learner.trainer.publish import parameters_digest
from learner.trainer.setup import Training
from learner.trainer.step import train_step
from matpo.collapse import read_rollbacks, rollbacks_before, slowed
from matpo.credit.scheme import NOTHING, Memory
from matpo.errors import UserError, run_command
from matpo.folder import RunFolder
from matpo.load import load_config
from protocols.codec import decode_tree
from protocols.records import EpisodeTree, version_of


def trained_batches(journal: Journal, *, after: int = 0) -> Iterator[tuple[int, tuple[EpisodeTree, ...]]]:
    """Every later step of the surviving weights and the trees its trainer was given, in the order it was given them."""
    for step, groups in journal.rows(
        "SELECT step, groups FROM batches WHERE step > ? AND step IN (SELECT step FROM steps WHERE undone = 0)"
        " ORDER BY step",
        (after,),
    ):
        trees: list[EpisodeTree] = []
        for group in orjson.loads(text(groups)):
            rows = journal.rows(
                "SELECT sizes, data FROM trees JOIN frames ON tree_seq = seq WHERE group_seq = ? AND step = ?"
                " AND state IN ('trained', 'filtered') AND reason IS NOT ? ORDER BY episode, tree_id",
                (int(group), step, STALE),
            )
            trees += [decode_tree(split_frames(row)) for row in rows]
        yield integer(step), tuple(trees)


def start(journal: Journal, archive: Path, checkpoints: Checkpoints, training: Training) -> tuple[int, Memory]:
    """The step to replay from: 0 while all episodes are there, else that of the oldest checkpoint, which is loaded.

    With it what the credit scheme remembered then.
    """
    gone = read_settled(journal).upto_step
    if gone == 0 or (archive.is_file() and journal.row("SELECT 1 FROM batches WHERE step = 1") is not None):
        return 0, NOTHING
    state = checkpoints.restore(training.policy, training.optimizer, oldest=True)
    if state is None or state.step < gone:
        raise UserError(
            f"the episodes of steps 1 to {gone} were dropped (hub.keep_trained) and no checkpoint of step {gone} or"
            f" later is in {str(checkpoints.folder)!r}; there is nothing to replay from"
        )
    print(
        f"the episodes of steps 1 to {gone} were dropped (hub.keep_trained); from the checkpoint of step {state.step}"
    )
    return state.step, state.credit


def replay(folder: RunFolder, overrides: Sequence[str]) -> int:
    """Train from the journal, print both digests; returns 1 if they should agree and do not."""
    config = load_config(folder.config, overrides)
    checkpoints = Checkpoints(folder.checkpoints, config.learner.keep_checkpoints)
    saved = checkpoints.newest()
    training, rollbacks = Training.start(config), read_rollbacks(folder.rollbacks)
    with Journal.open_read_only(folder.journal, folder.archive) as journal, journal.snapshot():
        first, memory = start(journal, folder.archive, checkpoints, training)
        last = first
        for step, trees in trained_batches(journal, after=first):
            if saved is not None and step > saved.step and not overrides:
                break
            if step != last + 1:
                raise UserError(f"journal {str(folder.journal)!r} lacks the batch of step {last + 1}; it was cut short")
            started = time.monotonic()
            # The lineage numbers versions and changes no arithmetic.
            current = version_of(lineage=0, step=step - 1)
            policy = training.policy
            taken = prepare(trees, config, current=current, shape=policy.shape, device=policy.device, memory=memory)
            memory = taken.memory
            report = train_step(
                training.policy,
                training.optimizer,
                taken.micro_batches,
                slowed(config, rollbacks_before(rollbacks, step)).learner,
                step=step,
                steps=config.run.steps,
                reference=training.reference,
            )
            last = step
            print(
                f"step {step:4d}  reward {taken.report.reward_mean:.3f}  loss {report.loss:+.5f}"
                f"  grad norm {report.grad_norm:.4f}  {time.monotonic() - started:.2f} s",
                flush=True,
            )
    digest = parameters_digest(training.policy.parameters, "float32")
    print(f"replayed {last - first} steps: weights {digest}")
    if overrides:
        return 0
    if saved is None or saved.step != last:
        raise UserError(
            f"run {str(folder.path)!r} has no checkpoint of step {last} to compare with;"
            " let it end, or stop it with Ctrl-C"
        )
    same = digest == saved.weights
    print(f"checkpoint of step {saved.step}: weights {saved.weights}: {'equal' if same else 'DIFFERENT'}")
    return 0 if same else 1


def run(arguments: Sequence[str]) -> int:
    """Entry point of `python -m learner.trainer.replay RUN [section.key=value …] [--objective NAME]`."""
    parser = argparse.ArgumentParser(prog="matpo replay", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="train another way")
    parser.add_argument("--objective", metavar="NAME", help="short for learner.objective.name=NAME, with its defaults")
    options = parser.parse_intermixed_args(arguments)
    overrides = list(options.overrides)
    if options.objective is not None:
        overrides.insert(0, f'learner.objective={{name = "{options.objective}"}}')
    try:
        return replay(RunFolder.existing(options.run), overrides)
    except JournalUnreadable as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))
