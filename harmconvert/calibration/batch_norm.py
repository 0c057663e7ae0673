"""Re-estimate batch-norm statistics, because a cut changes the activations from which they were estimated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UsageError
from ..network.distributed import all_or_none, sum_over_ranks
from ..network.values import tensors_in
from .capture import forward
from .reading import Reader

_AT_ONCE = 1 << 18  # values that are converted to float64 at a time; they fit into a processor's cache


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms with running statistics, by name. Frozen batch norms have other classes: not included."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every batch norm by averages over ``batches``; return how many were replaced.

    Each batch is normalised by its own statistics, as in training. Everything else stays in eval mode, so that dropout
    is off. Means and unbiased variances are averaged over the batches, weighted by batch size. Batch norms that do not
    run, and batches with one value per channel, do not change any statistics.

    Args:
        batches: the same as for calibration: tensors, (input, target) pairs whose target is ignored, dicts of keywords.

    Raises:
        UsageError: the network does not run on the batches.
    """
    return reestimate(model, (input for _, input in Reader(model).all(batches)))


def reestimate(model: nn.Module, inputs: Iterable[Any]) -> int:
    """Do the same as `reestimate_batch_norm` with inputs in the form that `network.running.call` accepts."""
    norms = batch_norms(model)
    counting = False
    sums = {name: torch.zeros(2 * n.num_features + 1, dtype=torch.float64) for name, n in norms.items()}

    def watch(name: str) -> Any:
        def hook(norm: _BatchNorm, args: Any, kwargs: Any) -> None:
            if not counting:  # a run in which the reader finds out how to read an input
                return
            x = next(iter(tensors_in([kwargs.get("input"), args, kwargs])), torch.empty(0)).detach()
            norm.training = x.dim() > 1 and x.numel() > x.shape[1] == norm.num_features
            if norm.training:
                mean, var = _moments(x)
                sums[name] += torch.cat([mean, var, mean.new_ones(1)]).cpu() * len(x)

        return hook

    def run() -> None:
        nonlocal counting
        for input in inputs:
            counting = True
            try:
                forward(model, input, undo=True)
            finally:
                counting = False

    before = {name: _statistics(norm) for name, norm in norms.items()}
    handles = [norm.register_forward_pre_hook(watch(name), with_kwargs=True) for name, norm in norms.items()]
    try:
        all_or_none(run, UsageError("another process could not run the network on its batches"))
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():  # in training mode the forwards also updated the running statistics
            _restore(norm, before[name])
    sum_over_ranks(sums.values())
    count = 0
    for name, norm in norms.items():
        weight = sums[name][-1]
        if weight > 0:
            mean, var = (sums[name][:-1] / weight).chunk(2)
            _restore(norm, (mean, var, None))
            count += 1
    return count


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance (C,) of each channel of x (N, C, *size), in float64."""
    others = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1]
    # Subtract an estimate of the mean first: without it the variance is the difference of two large numbers.
    first = x[:1].to(torch.float64).mean(others, keepdim=True)
    sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(max(1, _AT_ONCE // max(x[0].numel(), 1))):
        moved = part.to(torch.float64) - first
        sums += torch.stack([moved.sum(others), moved.square().sum(others)])
    mean = sums[0] / count
    return mean + first.flatten(), (sums[1] - count * mean.square()).clamp_min(0) / (count - 1)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor | None]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    tracked = norm.num_batches_tracked
    return norm.running_mean.clone(), norm.running_var.clone(), None if tracked is None else tracked.clone()


def _restore(norm: _BatchNorm, statistics: tuple[Tensor, Tensor, Tensor | None]) -> None:
    mean, var, tracked = statistics
    with torch.no_grad():
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(var)  # type: ignore[union-attr]
        if tracked is not None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.copy_(tracked)
