"""Which way of attending a device gets, and what is refused because it could not work there."""

from __future__ import annotations

import torch
from torch.utils._triton import has_triton

from matpo.attention_config import Attention
from matpo.config import Learner
from matpo.errors import UserError


def choose_attention(learner: Learner) -> Attention:
    """`auto` resolved: rectangles on the CPU, FlexAttention on a GPU, or the varlen kernel where nothing compiles it.

    Raises `UserError` for what this machine cannot do.
    """
    wanted = learner.attention
    device = torch.device(learner.device)
    if wanted == "packed" or device.type == "cpu":
        return "rectangle" if wanted == "auto" else wanted
    if device.type != "cuda":
        raise UserError(
            f"learner.device {learner.device!r} has no kernel that shares prefixes;"
            ' set learner.attention = "packed" to train every sequence by itself'
        )
    if wanted == "auto":
        wanted = "flex" if has_triton() else "varlen"
    if wanted == "flex" and not has_triton():
        raise UserError('learner.attention "flex" needs triton to compile its kernel; install triton, or use "varlen"')
    if wanted == "varlen" and learner.dtype != "bfloat16":
        raise UserError(
            'learner.attention "auto" finds no triton to compile FlexAttention, and the other kernel is for bfloat16;'
            ' install triton, or set learner.dtype = "bfloat16"'
        )
    return wanted
