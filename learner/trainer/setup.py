"""What training and replay start from: settled arithmetic, the policy and its optimizer."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from learner.trainer.model import Policy
from learner.trainer.ranks import ALONE, Ranks
from learner.trainer.reference import Reference, load_reference
from learner.trainer.step import make_optimizer
from matpo.config import Config
from matpo.errors import UserError
from matpo.model_files import model_folder


@dataclass(frozen=True, slots=True, eq=False)
class Training:
    """A policy and the optimizer that moves it."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    reference: Reference | None

    @classmethod
    def start(cls, config: Config, ranks: Ranks = ALONE) -> Training:
        """Load the configured model. The same config gives the same weights, bit for bit, on one kind of machine."""
        make_deterministic(threads=config.learner.threads, seed=config.run.seed)
        _check_device(config.learner.device)
        folder, lora = model_folder(config.model), config.model.lora
        policy = Policy.load(folder, config.learner, lora, seed=config.run.seed, ranks=ranks)
        return cls(policy, make_optimizer(policy, config.learner), load_reference(config, policy, ranks))


def make_deterministic(*, threads: int, seed: int) -> None:
    """Fix what could make two runs of the same step differ: random state, reduction order, kernel choice."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another order of sums
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Debugging aid that costs 4 % of a step: every tensor made empty here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set at import time
    torch.backends.cudnn.benchmark = False


def _check_device(name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"learner.device {name!r} cannot be used: {str(error).splitlines()[0]}; try 'cpu'") from error
