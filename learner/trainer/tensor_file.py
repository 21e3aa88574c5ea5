"""Safetensors files written and read one tensor at a time, so that a spread model is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import orjson
import torch
from safetensors import safe_open
from torch import Tensor

from learner.trainer.sharding import Whole

CODES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def write_tensors(path: Path, tensors: Whole) -> Iterator[tuple[str, Tensor]]:
    """Write every tensor, and yield it in host memory once it is written; the file is whole when the last was taken.

    Format: 8 bytes length of the header, the header (JSON, padded to 8 bytes), then the tensors by name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in tensors.kinds():
        start, end = end, end + kind.numel() * kind.element_size()
        header[name] = {"dtype": CODES[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, end]}
    content = orjson.dumps(header)
    content = content.ljust(-(-len(content) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, tensor in tensors.items():
            here = tensor.cpu().contiguous()
            file.write(here.reshape(-1).view(torch.uint8).numpy().data)
            yield name, here


class TensorFile:
    """The tensors of a file by name."""

    def __init__(self, opened: safe_open) -> None:
        self._opened = opened
        self.names: list[str] = sorted(opened.keys())  # type: ignore[no-untyped-call]  # safetensors leaves it bare

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[TensorFile]:
        """Read the names; the file is mapped into memory."""
        with safe_open(path, "pt") as opened:
            yield cls(opened)

    def read(self, name: str) -> Tensor:
        """A copy in host memory."""
        tensor: Tensor = self._opened.get_tensor(name)  # type: ignore[no-untyped-call]  # safetensors leaves it bare
        return tensor
