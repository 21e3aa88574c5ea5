"""The engines an actor may sample with, and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from matpo.section import Device, Section

STARTING: Final = frozenset({"servers", "gpus", "python", "threads", "memory_fraction", "arguments", "max_batch"})
"""Options of servers that the actor starts."""


class EmbeddedEngine(Section):
    """Continuous batching in the actor's own process, for CPU or one small GPU."""

    kind: Literal["embedded"] = "embedded"
    device: Device = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int = Field(default=1, ge=1)
    max_batch: int = Field(default=64, ge=1)
    """Sequences decoded together."""
    max_context_tokens: int = Field(default=1024, ge=16)
    """Key/value slots per sequence."""
    prefix_cache_tokens: int | None = Field(default=None, ge=0)
    """Finished tokens whose keys and values are kept for prompts that begin with them; None: half as many as running
    sequences may have; 0: no prompt reuses anything."""

    @property
    def kept_tokens(self) -> int:
        """`prefix_cache_tokens`, or what stands for None."""
        half = self.max_batch * self.max_context_tokens // 2
        return half if self.prefix_cache_tokens is None else self.prefix_cache_tokens


class SglangEngine(Section):
    """SGLang servers: started by the actor and restarted when they die, or somebody else's, which serve it alone."""

    kind: Literal["sglang"] = "sglang"
    servers: int = Field(default=1, ge=1)
    """How many the actor starts."""
    gpus: tuple[tuple[int, ...], ...] = ()
    """For each of them the GPUs it gets, `tensor_parallel` in number, as positions in CUDA_VISIBLE_DEVICES where that
    is set; empty: the first ones in order."""
    urls: tuple[str, ...] = ()
    """http://HOST:PORT of running servers, which with `handover` = "disk" must see `scratch` under the same path. Then
    the actor starts none."""
    router: str | None = None
    """http://HOST:PORT of a running smg or sglang-router in front of such servers; they come and go with it."""
    python: str = "python3"
    """Interpreter of the environment SGLang is installed in; `make sglang-cpu` makes .venv-sglang/bin/python."""
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = Field(default=1, ge=1)
    """OpenMP threads of the server's processes."""
    tensor_parallel: int = Field(default=1, ge=1)
    max_batch: int = Field(default=64, ge=1)
    """Sequences decoded together."""
    max_context_tokens: int = Field(default=4096, ge=16)
    """Prompt and answer of one request."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the device's memory for weights and key/value cache; None: SGLang decides."""
    arguments: tuple[str, ...] = ()
    """Passed on to `sglang.launch_server` as they are."""
    swap: Literal["retract", "in_place", "abort"] = "retract"
    """Running requests at a weight update: recompute their prompt with the new weights, keep old keys and values, or
    end and resubmit them from the tokens they have."""
    attest: bool = True
    """After every update, compare the server's checksums with those of the weights it was given, on every rank."""
    stream_tokens: int = Field(default=0, ge=0)
    """Report sampled tokens every so many, so that little is sampled again if the server dies; 0: only at the end."""
    handover: Literal["disk", "collective"] = "disk"
    """How weights reach the servers: as files they see under the same path, or broadcast through torch.distributed."""
    sender_address: str = "127.0.0.1"
    """`collective` only: where the servers reach this machine."""
    sender_backend: Literal["gloo", "nccl"] | None = None
    """`collective` only. None: gloo to CPU servers, nccl to CUDA servers. With nccl the sender uses the first GPU it
    sees, which must not be one of a server's."""
    scratch: Path | None = None
    """Where weights are handed to the server; None: /dev/shm, or the system's temporary folder."""
    start_timeout_s: float = Field(default=600.0, gt=0)

    @model_validator(mode="after")
    def _one_kind_of_server(self) -> Self:
        addresses = (*self.urls, *([] if self.router is None else [self.router]))
        for url in addresses:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"actor.engine: {url!r} is no http://HOST:PORT")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("actor.engine.urls names a server twice")
        if self.urls and self.router is not None:
            raise ValueError("actor.engine.urls and actor.engine.router exclude each other: a router knows its servers")
        if addresses:
            # The senders of `collective` need the interpreter too.
            given = self.model_dump(include=set(STARTING) - ({"python"} if self.handover == "collective" else set()))
            idle = sorted(name for name, value in given.items() if value != type(self).model_fields[name].default)
            if idle:
                raise ValueError(f"actor.engine: {idle} have no effect on servers that somebody else starts")
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> Self:
        if not self.gpus:
            return self
        if self.device == "cpu":
            raise ValueError("actor.engine.gpus has no effect with device cpu")
        sizes = [len(group) for group in self.gpus]
        if sizes != [self.tensor_parallel] * self.servers:
            raise ValueError(
                f"actor.engine.gpus has groups of {sizes} GPUs, but there are {self.servers} servers of"
                f" {self.tensor_parallel} each"
            )
        every = [gpu for group in self.gpus for gpu in group]
        if len(set(every)) < len(every) or min(every) < 0:
            raise ValueError(f"actor.engine.gpus names a GPU twice, or one below 0: {every}")
        return self

    @property
    def exclusive(self) -> bool:
        """Whether another actor with these settings would get in the way."""
        return bool(self.urls) or self.router is not None or self.device == "cuda"

    @model_validator(mode="after")
    def _sender_used(self) -> Self:
        if self.handover == "disk" and (self.sender_address != "127.0.0.1" or self.sender_backend is not None):
            raise ValueError('actor.engine: sender_address and sender_backend have no effect with handover = "disk"')
        return self

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """Of the process groups of `collective`."""
        return self.sender_backend or ("gloo" if self.device == "cpu" else "nccl")


Engine = Annotated[EmbeddedEngine | SglangEngine, Field(discriminator="kind")]
