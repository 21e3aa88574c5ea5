"""Weights cut into equal parts, so that threads share the work evenly however large one tensor is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from protocols.ulp import Bits
from protocols.weights import Tensor, TensorIdentity, Weights, tensor_identity

T = TypeVar("T")
R = TypeVar("R")


class Slice(NamedTuple):
    """Elements [start, stop) of a tensor laid flat."""

    name: str
    start: int
    stop: int


Part = tuple[Slice, ...]


def cut(weights: Weights, part_elements: int) -> Iterator[Part]:
    """The tensors by name, laid end to end and cut every `part_elements` elements; empty tensors are in no part."""
    part: list[Slice] = []
    room = part_elements
    for name in sorted(weights):
        start, size = 0, weights[name].data.size
        while start < size:
            stop = min(size, start + room)
            part.append(Slice(name, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield tuple(part)
                part, room = [], part_elements
    if part:
        yield tuple(part)


def bits(tensor: Tensor) -> Bits:
    """The tensor's bit patterns, flat and not copied."""
    flat = tensor.data.reshape(-1)
    return flat.view(np.uint16) if tensor.dtype == "bfloat16" else flat.view(np.uint32)


def slices(weights: Weights, part: Part) -> list[Bits]:
    """The bit patterns of a part, not copied."""
    return [bits(weights[name])[start:stop] for name, start, stop in part]


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The results of `work`, done by so many threads. Items are drawn by the caller's thread, as many ahead as there
    are threads and no more, so that neither items nor results pile up."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def identities(weights: Weights, threads: int) -> list[TensorIdentity]:
    """`tensor_identity` of every tensor."""
    return list(in_order(lambda item: tensor_identity(*item), weights.items(), threads))
