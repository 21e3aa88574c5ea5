"""Lets the published SGLang and torchvision wheels, which are built for CUDA, run beside a CPU build of torch.

A .pth file imports this module at the start of every interpreter of `.venv-sglang`, so the server's spawned processes
have it too. It costs nothing until torchvision or sglang is imported, and does nothing beside a CUDA build of torch.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

PINNING = ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like")
"""Functions of torch that SGLang calls with pin_memory=True, an error where there is no accelerator."""


def declare_vision_operators(torch: ModuleType) -> None:
    """torchvision describes these two operators without looking whether its compiled half, built for CUDA, loaded."""
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", schema)


def forget_pinning(torch: ModuleType) -> None:
    """Page-locked memory means nothing on a CPU: create plain tensors, register nothing with CUDA."""

    def unpinned(create: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(create)
        def plain(*arguments: object, pin_memory: bool = False, **options: object) -> object:
            return create(*arguments, **options)

        return plain

    for name in PINNING:
        setattr(torch, name, unpinned(vars(torch)[name]))
    torch.Tensor.pin_memory = lambda tensor, *_arguments, **_options: tensor
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    torch.cuda.cudart = lambda: runtime


class Preparation:
    """An import hook that finds nothing itself: it prepares torch just before a package that needs it is imported."""

    def __init__(self) -> None:
        self._due = {"torchvision": declare_vision_operators, "sglang": forget_pinning}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        prepare = self._due.pop(name, None)
        if prepare is not None:
            torch = importlib.import_module("torch")
            if torch.version.cuda is None:
                prepare(torch)
        return None


sys.meta_path.insert(0, Preparation())
