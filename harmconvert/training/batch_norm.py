"""Batch norms in training: with statistics over the batch of all processes, or frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode

from ..network.distributed import world_size


def global_batch_norm() -> AbstractContextManager[Any]:
    """Make batch norms normalise by the batch of all processes, so that the result equals that of one process.

    This works for any class that calls torch's ``batch_norm``, and it replaces no module. torch's SyncBatchNorm needs a
    GPU and replaces modules.
    """
    return _GlobalBatchNorm() if world_size() > 1 else nullcontext()


@contextmanager
def train_mode(model: nn.Module, freeze: bool) -> Iterator[None]:
    """Put the network in train mode inside, in eval mode afterwards; with ``freeze``, batch norms stay in eval mode."""
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if freeze else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        model.eval()


class _GlobalBatchNorm(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm and (arguments := _Arguments(*args, **kwargs)).training:
            return _batch_norm(arguments)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Arguments:
    """The arguments of `torch.nn.functional.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def _batch_norm(arguments: _Arguments) -> Tensor:
    """Normalise by mean and variance over the (N, C, *) of all processes; all must have the same size."""
    x, weight, bias = arguments.input, arguments.weight, arguments.bias
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    values = x.float() if x.dtype.itemsize < 4 else x
    count = values.numel() // values.shape[1] * world_size()
    # Two passes, the mean first: E[x^2] - E[x]^2 loses precision where the mean is large.
    mean = _Sum.apply(values.sum(axes)) / count
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count
    normalised = centred * (variance + arguments.eps).rsqrt().view(shape)
    if arguments.running_mean is not None and arguments.running_var is not None:
        unbiased = variance * (count / max(count - 1, 1))
        with torch.no_grad():
            for running, new in ((arguments.running_mean, mean), (arguments.running_var, unbiased)):
                running.lerp_(new.to(running.dtype), arguments.momentum)
    if weight is not None and bias is not None:
        normalised = normalised * weight.view(shape) + bias.view(shape)
    return normalised.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; differentiable."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient
