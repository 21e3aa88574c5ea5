"""Stands in for SGLang's compiled kernel package, of which no CPU build is published.

SGLang's CPU path imports the names below when it starts and calls only the first one without speculative decoding.
No `torch.ops.sgl_kernel.*` is registered, so every layer takes SGLang's own plain-PyTorch path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

__version__ = "0.0.0+matpo.cpu"


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    stops: torch.Tensor,
    places: torch.Tensor,
    _width: int,
) -> None:
    """Write each request's new cache places into its row of the request-to-token table.

    `places` holds the requests' places one after the other: stops[i] - starts[i] of them for request i.
    """
    counts = (stops - starts).tolist()
    firsts = starts.tolist()
    for row, first, new in zip(rows.tolist(), firsts, places.split(counts), strict=True):
        table[row, first : first + len(new)] = new.to(table.dtype)


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(*_arguments: object, **_options: object) -> NoReturn:
        raise NotImplementedError(f"{name} belongs to speculative decoding, which the CPU stand-in does not have")

    return refuse


assign_draft_cache_locs_contiguous_cpu = _refuse("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _refuse("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _refuse("build_tree_kernel_efficient_cpu")
copy_all_layer_kv_cache_cpu = _refuse("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _refuse("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _refuse("fill_bonus_tokens_cpu")
rotate_input_ids_cpu = _refuse("rotate_input_ids_cpu")
verify_tree_greedy_cpu = _refuse("verify_tree_greedy_cpu")
