"""A policy spread over ranks with FSDP2: every rank keeps 1/N of each parameter, gradient and optimizer moment.

`fully_shard` is used directly, not through accelerate's plugin: our step never calls the model's own forward (the loss
and its gradient are taken inside the head), gradients are sums over ranks instead of means, and the optimizer stays
ours. accelerate launches the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from transformers import PreTrainedModel

from learner.trainer.head import Head, output_projection
from learner.trainer.ranks import Ranks


def shard(model: PreTrainedModel, *, ranks: Ranks, dtype: torch.dtype) -> None:
    """Spread a model over the ranks; each decoder layer is gathered for its own forward and backward pass only.

    The first rank's values become everyone's; the other ranks' model may be on the `meta` device. Layers travel in
    `dtype`; what is outside them (embeddings, last norm) stays float32, as under autocast on one rank. Gradients are
    summed in float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    values = {name: parameter.detach() for name, parameter in model.named_parameters()} if ranks.first else {}
    buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]
    layers = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    body, projection = model.base_model, output_projection(model)
    tied = projection.weight is model.get_input_embeddings().weight
    for part in body.modules():
        if type(part).__name__ in (model._no_split_modules or ()):  # a decoder layer, by its class
            fully_shard(part, mesh=mesh, mp_policy=layers)
    for unit in (body,) if tied else (body, projection):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)  # by default the last pass's weights would stay
        for part in unit.modules():
            if isinstance(part, FSDPModule):  # gloo sums, but knows no scaled sum
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
    if not ranks.first:
        model.to_empty(device=ranks.device)
    if tied:
        model.tie_weights()
    for name, parameter in model.named_parameters():
        load(parameter, name, values.pop if ranks.first else None)
    for module, name, value in buffers:
        if value is not None:
            here = value.to(ranks.device) if ranks.first else torch.empty_like(value, device=ranks.device)
            dist.broadcast(here, 0)
            module.register_buffer(name, here, persistent=name not in module._non_persistent_buffers_set)


Read = Callable[[str], Tensor]
"""From the name of a tensor to its values."""


def load(target: Tensor, name: str, read: Read | None) -> None:
    """Overwrite a tensor with what the first rank reads; `read` is None on the others. Collective if it is spread."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            device, dtype = target.device, target.dtype
            whole = torch.empty(target.shape, device=device, dtype=dtype) if read is None else read(name)
            part = distribute_tensor(whole.to(device, dtype), target.device_mesh, target.placements)
            target.to_local().copy_(part.to_local())
        elif read is not None:
            target.copy_(read(name))


class Whole(Mapping[str, Tensor]):
    """Tensors as if they were on one rank: each is gathered when it is asked for, by all ranks together.

    The first rank reads them in order of their names, all and each once; the others `help` meanwhile.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return _whole(tensor) if isinstance(tensor, DTensor) else tensor.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def kinds(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor's type and whole shape, in order, without its values."""
        for name in self:
            yield name, torch.empty(self._tensors[name].shape, dtype=self._tensors[name].dtype, device="meta")

    def help(self) -> None:
        """Take part in what the first rank reads."""
        for name in self:
            self[name]


@contextmanager
def whole_head(head: Head) -> Iterator[Head]:
    """The output projection, whole on every rank; a gradient added to it inside the block is summed over the ranks."""
    if not isinstance(head.weight, DTensor):
        yield head
        return
    weight, bias = _gathered(head.weight), None if head.bias is None else _gathered(head.bias)
    yield Head(weight, bias, head.dtype)
    _add_sum(head.weight, weight.grad)
    if head.bias is not None and bias is not None:
        _add_sum(head.bias, bias.grad)


def _gathered(spread: torch.nn.Parameter) -> torch.nn.Parameter:
    assert isinstance(spread, DTensor)
    return torch.nn.Parameter(_whole(spread), requires_grad=spread.requires_grad)


def _whole(spread: DTensor) -> Tensor:
    whole: Tensor = spread.full_tensor()
    return whole.detach()


def _add_sum(spread: torch.nn.Parameter, grad: Tensor | None) -> None:
    """Add the ranks' gradients of a whole parameter to the gradient of the one that is spread."""
    if grad is None:
        return
    assert isinstance(spread, DTensor)
    partial = DTensor.from_local(grad, spread.device_mesh, [Partial()], run_check=False)
    total = partial.redistribute(placements=spread.placements)
    spread.grad = total if spread.grad is None else spread.grad.add_(total)
