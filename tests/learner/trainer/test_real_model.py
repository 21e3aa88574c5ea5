"""The benchmark of a real model, on a tiny one: the same code that runs SmolLM2 on a CPU or a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.real_model import distance, exactness, peak_tflops, timed
from matpo.config import Config, Learner
from tests.learner.trainer.models import GPU_HEAD_WIDTH, tiny_model
from tests.learner.trainer.test_exactness import random_rows
from tests.learner.trainer.test_step import config_with


def config_of(folder: Path) -> Config:
    tiny_model("llama", head_width=GPU_HEAD_WIDTH).save_pretrained(folder)
    given = config_with()
    return given.model_copy(update={"model": given.model.model_copy(update={"path": folder})})


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_timed_and_measured_against_the_machine(tmp_path: Path, device: str) -> None:
    rows = random_rows(6, seed=1)
    learner = Learner(device=device, dtype="bfloat16")
    figures = timed(config_of(tmp_path), learner, rows, steps=1, peak=1e-6)
    assert figures.report.tokens == sum(len(row.inputs) for row in rows)
    assert figures.step_s > 0 and figures.peak_gb > 0
    assert figures.peak_share == pytest.approx(figures.achieved_tflops / 1e-6)
    assert figures.achieved_tflops == pytest.approx(figures.report.flops / figures.step_s / 1e12)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_gradients_are_compared_with_float32_ones(tmp_path: Path, device: str) -> None:
    learners = {f"tree_{dtype}": Learner.model_validate({"device": device, "dtype": dtype})
                for dtype in ("float32", "bfloat16")}  # fmt: skip
    found = exactness(config_of(tmp_path), learners, random_rows(6, seed=2))
    assert found.keys() == {"tree_bfloat16"}
    assert isinstance(found["tree_bfloat16"], float) and 1e-5 < found["tree_bfloat16"] < 0.05


def test_distance_is_relative_to_the_whole_gradient() -> None:
    expected = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert distance({"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}, expected) == pytest.approx(0.1)


def test_the_machines_rate_is_measured_where_no_table_or_flag_gives_it() -> None:
    assert peak_tflops(torch.device("cpu"), "float32", 7.0) == 7.0
    assert 1e-3 < peak_tflops(torch.device("cpu"), "float32", None) < 100
