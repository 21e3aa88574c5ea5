"""Adapters on their way into servers: each version is a new adapter beside the others, so that nothing is paused."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, Self

import anyio.to_thread
import numpy as np

from actors.engines.sglang.client import ServerRefused, SglangClient
from actors.engines.sglang.handover import Parcel, scratch_folder
from actors.engines.sglang.model import ModelFacts
from matpo.adapters import CONFIG_FILE, TENSOR_FILE, adapter_shapes, check_shapes, only, peft_config
from matpo.config import PROJECTIONS, Lora
from matpo.config import SglangEngine as Settings
from protocols.weights import Tensor, WeightDtype, Weights, weights_digest, write_keyframe

FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""The server holds each of these as one projection, and fails when an adapter has only some of them."""


class AdapterHandover:
    """PEFT folders. Running requests finish with the adapter they began with; new ones name the newest."""

    pauses = False

    def __init__(self, folder: Path, facts: ModelFacts, lora: Lora) -> None:
        self.folder = folder
        self._facts = facts
        self._lora = lora
        self._shapes = adapter_shapes(facts.shapes, lora)
        self._served = served(lora)
        self._served_shapes = adapter_shapes(facts.shapes, self._served)

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, facts: ModelFacts, lora: Lora) -> AsyncIterator[Self]:
        """In a `scratch_folder`."""
        with scratch_folder(settings) as folder:
            yield cls(folder, facts, lora)

    def check(self, weights: Weights) -> None:
        """See `Handover.check`."""
        check_shapes(weights, self._shapes)

    async def prepare(self, weights: Weights, *, version: int, file: Path | None) -> Parcel:
        """A new PEFT folder. `file` is not used: an adapter is small."""
        return await anyio.to_thread.run_sync(self._prepare, weights, version)

    async def meet(self, client: SglangClient) -> None:
        """Nothing."""

    async def deliver(self, parcel: Parcel, client: SglangClient, *, flush: bool, deadline_s: float) -> None:
        """Load the adapter beside the ones the server has."""
        for served_as in parcel.adapters.values():
            body = {"lora_name": served_as, "lora_path": str(parcel.folder / served_as)}
            try:
                await client.command("/load_lora_adapter", body, deadline_s=deadline_s)
            except ServerRefused:  # it may have it already, from a delivery whose answer was lost
                with suppress(ServerRefused):
                    await _unload(served_as, client, deadline_s=deadline_s)
                await client.command("/load_lora_adapter", body, deadline_s=deadline_s)

    async def held(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> bool:
        """By the adapters the server lists."""
        return set(parcel.adapters.values()) <= set(await client.models(deadline_s=deadline_s))

    async def retire(self, parcel: Parcel, client: SglangClient, *, deadline_s: float) -> None:
        """Unload its adapters, each whether or not the server still has the others."""
        for served_as in parcel.adapters.values():
            with suppress(ServerRefused):
                await _unload(served_as, client, deadline_s=deadline_s)

    def keep_only(self, *parcels: Parcel) -> None:
        """Remove all other folders."""
        kept = {parcel.folder for parcel in parcels}
        for other in self.folder.iterdir():
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def _prepare(self, weights: Weights, version: int) -> Parcel:
        # A name is never used twice: another actor may have given the server its adapter of the same version.
        name = f"version-{version}-{uuid.uuid4().hex}"
        adapters = {adapter: f"{name}-{adapter}" if adapter else name for adapter in self._lora.adapters}
        dtype = next(iter(weights.values())).dtype
        zeros = {n: _zeros(dtype, shape) for n, shape in self._served_shapes.items() if n not in weights}
        for adapter, served_as in adapters.items():
            folder = self.folder / name / served_as
            folder.mkdir(parents=True)
            (folder / CONFIG_FILE).write_bytes(peft_config(self._served, base=self._facts.folder.resolve()))
            write_keyframe(folder / TENSOR_FILE, only({**weights, **zeros}, adapter), version=version)
        return Parcel(version, weights_digest(weights), None, self.folder / name, adapters=adapters)


async def _unload(served_as: str, client: SglangClient, *, deadline_s: float) -> None:
    await client.command("/unload_lora_adapter", {"lora_name": served_as}, deadline_s=deadline_s)


def served(lora: Lora) -> Lora:
    """The adapter as servers must be told of it: with all parts of the projections they hold as one."""
    chosen = set(lora.target_modules)
    for group in FUSED:
        chosen |= set(group) if chosen & set(group) else set()
    return lora.model_copy(update={"target_modules": tuple(module for module in PROJECTIONS if module in chosen)})


def _zeros(dtype: WeightDtype, shape: tuple[int, ...]) -> Tensor:
    if dtype == "float32":
        return Tensor(dtype, np.zeros(shape, dtype=np.float32))
    return Tensor(dtype, np.zeros(shape, dtype=np.uint16))
