"""What each of two ranks does in test_ranks.py: `python -m tests.learner.trainer.rank_cases` is one of them.

A rank reads the name of a case, a folder and perhaps what is trained from a line of its input, and prints what it found
as a line of JSON.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from learner.trainer.__main__ import train
from learner.trainer.checkpoint import Checkpoints
from learner.trainer.model import Policy
from learner.trainer.pack import MicroBatch, micro_batch, pack
from learner.trainer.plan import Sample
from learner.trainer.ranks import Ranks, joined
from learner.trainer.report import StepReport, merged
from learner.trainer.setup import make_deterministic
from learner.trainer.sharding import Whole
from learner.trainer.step import accumulate, make_optimizer, train_step
from matpo.config import Dppo, Gspo, Learner, Lora, Objective, Tis
from matpo.errors import Paused
from matpo.folder import RunFolder
from matpo.load import load_config
from matpo.metrics import MetricsFile
from tests.learner.trainer.models import GPU_HEAD_WIDTH, Family, tiny_model
from tests.learner.trainer.test_exactness import random_rows

Found = dict[str, Any]  # JSON of a case's own shape
ADAM = Learner(lr=1e-2, optimizer_steps_per_batch=2)
TRAINED = {"all": None, "adapter": Lora(rank=2)}
OF_TRAJECTORIES: dict[str, Objective] = {"gspo": Gspo(clip_low=0.3, clip_high=0.3), "masked": Dppo(sequence_mask=0.1)}
"""Objectives that look at whole trajectories."""


def model_of(family: Family, *, tied: bool = True) -> PreTrainedModel:
    """With heads that a GPU takes too."""
    return tiny_model(family, tied=tied, head_width=GPU_HEAD_WIDTH)


def policy_of(
    ranks: Ranks, learner: Learner, family: Family = "qwen3", *, tied: bool = True, lora: Lora | None = None
) -> Policy:
    """A tiny policy over the ranks; the others have no weights of their own."""
    model = model_of(family, tied=tied)
    if not ranks.first:
        torch.nn.Module.to(model, "meta")
        model.tie_weights()
    return Policy.of(model, learner.model_copy(update={"device": ranks.device.type}), lora, ranks=ranks)


def step_rows(step: int) -> list[Sample]:
    return random_rows(12, seed=40 + step)


def batches_of(ranks: Ranks, rows: Sequence[Sample]) -> tuple[MicroBatch, ...]:
    return pack(rows, limit_tokens=40, device=ranks.device, ranks=ranks.count, rank=ranks.rank)


def write_gradients(ranks: Ranks, policy: Policy, path: Path) -> None:
    grads = Whole({name: p.grad for name, p in policy.parameters.items() if p.grad is not None})
    if ranks.first:
        save_file(dict(grads), path)
    else:
        grads.help()


def gradients(ranks: Ranks, folder: Path) -> Found:
    """Of three models over the planner's micro-batches, then over ones of which the second rank has none to score."""
    losses: list[float] = []
    kinds: list[tuple[Family, bool]] = [("qwen3", True), ("llama", False)]
    for family, tied in kinds:
        policy = policy_of(ranks, Learner(), family, tied=tied)
        losses.append(accumulate(policy, batches_of(ranks, random_rows(12, seed=3)), Tis()).loss)
        write_gradients(ranks, policy, folder / f"{family}.safetensors")
    policy = policy_of(ranks, Learner())
    batch = micro_batch(random_rows(5, seed=4) if ranks.first else [], ranks.device)
    losses.append(accumulate(policy, [batch], Tis()).loss)
    write_gradients(ranks, policy, folder / "uneven.safetensors")
    policy = policy_of(ranks, Learner(dtype="bfloat16"))
    accumulate(policy, batches_of(ranks, random_rows(12, seed=3)), Tis())
    write_gradients(ranks, policy, folder / "bfloat16.safetensors")
    local = sum(p.to_local().numel() for p in policy.parameters.values() if isinstance(p, DTensor))
    return {"losses": losses, "local": local}


def trajectory_gradients(ranks: Ranks, folder: Path) -> Found:
    """Of objectives that look at whole trajectories."""
    for name, objective in OF_TRAJECTORIES.items():
        policy = policy_of(ranks, Learner())
        accumulate(policy, batches_of(ranks, random_rows(12, seed=3)), objective)
        write_gradients(ranks, policy, folder / f"{name}.safetensors")
    return {}


def guarded_rates(ranks: Ranks, _: Path) -> Found:
    """Learning rates of two steps with the ESS guard; in the second one rank has no sampled tokens at all."""
    learner = ADAM.model_copy(update={"ess_guard": True, "warmup_steps": 0, "optimizer_steps_per_batch": 1})
    policy = policy_of(ranks, learner)
    optimizer = make_optimizer(policy, learner)
    few = micro_batch(random_rows(5, seed=4) if ranks.first else [], ranks.device)
    rows = (batches_of(ranks, step_rows(1)), [few])
    steps = [
        train_step(policy, optimizer, batches, learner, step=step, steps=10, ranks=ranks)
        for step, batches in enumerate(rows, 1)
    ]
    return {"rates": [report.lr for report in steps]}


def finish(
    ranks: Ranks, checkpoints: Path, trained: str, *, start: int, end: int, save_at: int | None = None
) -> Policy:
    """Take steps `start` + 1 … `end` from the newest checkpoint, or from the beginning."""
    policy = policy_of(ranks, ADAM, lora=TRAINED[trained])
    optimizer = make_optimizer(policy, ADAM)
    kept = Checkpoints(checkpoints, 2, ranks)
    state = kept.restore(policy, optimizer)
    assert (0 if state is None else state.step) == start
    for step in range(start + 1, end + 1):
        train_step(policy, optimizer, batches_of(ranks, step_rows(step)), ADAM, step=step, steps=10)
        if step == save_at:
            kept.save(policy, optimizer, step=step, lineage=0, model=checkpoints)
    kept.save(policy, optimizer, step=end, lineage=0, model=checkpoints)
    return policy


def save_at_2_and_go_on_to_4(ranks: Ranks, folder: Path, trained: str) -> Found:
    finish(ranks, folder, trained, start=0, end=4, save_at=2)
    return {}


def resume_at_2(ranks: Ranks, folder: Path, trained: str) -> Found:
    finish(ranks, folder, trained, start=2, end=4)
    return {}


def load_and_save_again(ranks: Ranks, folder: Path, trained: str) -> Found:
    finish(ranks, folder, trained, start=2, end=2)
    return {}


def one_step(ranks: Ranks, _: Path) -> Found:
    policy = policy_of(ranks, ADAM)
    mine = train_step(policy, make_optimizer(policy, ADAM), batches_of(ranks, step_rows(1)), ADAM, step=1, steps=10)
    return merged([StepReport.from_json(part) for part in ranks.gather(mine.to_json())]).model_dump()


def step_on_an_infinite_advantage_of_one_rank(ranks: Ranks, _: Path) -> Found:
    policy = policy_of(ranks, ADAM)
    before = [p.to_local().clone() for p in policy.parameters.values() if isinstance(p, DTensor)]
    rows = random_rows(4, seed=9)
    if not ranks.first:
        rows[0] = replace(rows[0], advantage=float("inf"))
    report = train_step(policy, make_optimizer(policy, ADAM), [micro_batch(rows, ranks.device)], ADAM, step=1, steps=10)
    after = [p.to_local() for p in policy.parameters.values() if isinstance(p, DTensor)]
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return {"updates": report.updates, "same": same}


def say(ranks: Ranks, _: Path) -> Found:
    parts = ranks.share([b"ab", b"", b"c"] if ranks.first else None)
    nothing = ranks.share([] if ranks.first else None)
    return {
        "shared": [bytes(part).decode() for part in parts],
        "nothing": len(nothing),
        "gathered": [part.decode() for part in ranks.gather(b"x" * (3 + ranks.rank))],
        "most": list(ranks.most([ranks.rank, -ranks.rank])),
    }


def run_trainer(ranks: Ranks, folder: Path) -> Found:
    """As the trainer's `run` does: from the start again after a rollback, until the last step or a pause."""
    run, stopping, starts = RunFolder.existing(folder), threading.Event(), 1
    with closing(MetricsFile(run.metrics)) as metrics:
        try:
            while train(run, load_config(run.config), metrics, stopping, ranks):
                starts += 1
        except Paused as error:
            return {"starts": starts, "paused": str(error)}
    return {"starts": starts}


def die_on_the_second_rank(ranks: Ranks, _: Path) -> Found:
    if not ranks.first:
        os._exit(9)
    try:
        ranks.most([0.0])
    except RuntimeError as error:
        return {"error": type(error).__name__}
    return {}


def stand_still_on_the_second_rank(ranks: Ranks, _: Path) -> Found:
    if not ranks.first:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        ranks.most([0.0])
    except RuntimeError as error:
        return {"error": type(error).__name__}
    return {}


CASES: dict[str, Callable[..., Found]] = {
    case.__name__: case
    for case in (
        gradients,
        trajectory_gradients,
        guarded_rates,
        save_at_2_and_go_on_to_4,
        resume_at_2,
        load_and_save_again,
        one_step,
        step_on_an_infinite_advantage_of_one_rank,
        say,
        run_trainer,
        die_on_the_second_rank,
        stand_still_on_the_second_rank,
    )
}


def main() -> None:
    make_deterministic(threads=1, seed=0)
    with joined(Learner(rank_timeout_s=float(sys.argv[1]), device=sys.argv[2])) as ranks:
        for line in sys.stdin:
            name, folder, *trained = line.split()
            sys.stdout.write(orjson.dumps(CASES[name](ranks, Path(folder), *trained)).decode() + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
