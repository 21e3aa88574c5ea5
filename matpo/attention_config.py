"""The ways of attending over shared prefixes that a learner may be told to use."""

from __future__ import annotations

from typing import Literal

TreeAttention = Literal["rectangle", "flex", "varlen"]
"""Ways that compute a shared prefix once: rectangles on the CPU, FlexAttention or variable-length flash on a GPU."""
Attention = Literal[TreeAttention, "packed"]
"""… or every sequence by itself with the model's own attention."""
AttentionChoice = Literal["auto", Attention]


def check_attention(attention: AttentionChoice, *, device: str, dtype: str) -> None:
    """Refuse, by ValueError, a way that cannot run on the device."""
    on_cpu = device.split(":")[0] == "cpu"
    if attention == "rectangle" and not on_cpu:
        raise ValueError(
            f'learner.attention = "rectangle" runs on the CPU, and learner.device is {device!r}; set it to "auto"'
        )
    if attention in ("flex", "varlen") and on_cpu:
        raise ValueError(
            f'learner.attention = "{attention}" needs a GPU, and learner.device is {device!r}; set it to "auto"'
        )
    if attention == "varlen" and dtype != "bfloat16":
        raise ValueError(
            f'learner.attention = "varlen" computes in bfloat16, and learner.dtype is {dtype!r};'
            ' set learner.dtype = "bfloat16"'
        )
