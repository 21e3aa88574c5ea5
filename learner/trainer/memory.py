"""How much memory there is, how much is free and how much a step took at its peak: a GPU's own, else the host's."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_HOST = Path("/proc/meminfo")
_RESET_PEAK = "5"
"""See proc(5)."""


def total_bytes(device: torch.device) -> int:
    """Of the device, used or not: the same at every moment, so what follows from it does not vary between runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: torch.device) -> int:
    """That new tensors could take now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kilobytes(_HOST, "MemAvailable") * 1024 if _HOST.is_file() else total_bytes(device)


def reset_peak(device: torch.device) -> None:
    """Start of what `peak_bytes` covers."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.is_file():
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Most memory at once since `reset_peak`: tensors on a GPU, otherwise all the process has resident (0 where the
    system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(_STATUS, "VmHWM") * 1024 if _STATUS.is_file() else 0


def _kilobytes(file: Path, name: str) -> int:
    """A line `name: 123 kB`."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise ValueError(f"{file} has no line {name!r}")
