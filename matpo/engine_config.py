"""The engines an actor may sample with, and their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from matpo.section import Section


class EmbeddedEngine(Section):
    """Continuous batching in the actor's own process, for CPU or one small GPU."""

    kind: Literal["embedded"] = "embedded"
    device: str = "cpu"
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
    """A SGLang server: started by the actor and restarted when it dies, or somebody else's at `url`."""

    kind: Literal["sglang"] = "sglang"
    url: str | None = None
    """http://HOST:PORT of a running server; it must see `scratch` under the same path. None: the actor starts one."""
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
    """After every update, compare the server's checksums with those of the weights it was given (CPU servers only)."""
    stream_tokens: int = Field(default=0, ge=0)
    """Report sampled tokens every so many, so that little is sampled again if the server dies; 0: only at the end."""
    scratch: Path | None = None
    """Where weights are handed to the server; None: /dev/shm, or the system's temporary folder."""
    start_timeout_s: float = Field(default=600.0, gt=0)

    @property
    def attested(self) -> bool:
        """Whether checksums are compared: those of CUDA servers, and of parts of tensors, are of another make."""
        return self.attest and self.device == "cpu" and self.tensor_parallel == 1


Engine = Annotated[EmbeddedEngine | SglangEngine, Field(discriminator="kind")]
