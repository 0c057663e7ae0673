"""Cuts of other methods for `ranks.py`: Tucker-2 and pruned channels, as plain networks that can be trained.

Each function returns a network that needs at most a share of the parameters or multiply-adds of the original. Layers
that `harmconvert` leaves whole under a bare share (the input layer, depthwise layers, the classifier) stay whole here,
too, except where channels that are pruned are their inputs or outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harmconvert.calibration import reestimate_batch_norm
from harmconvert.network import replace_module

STEPS = 12


def macs(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of a network for one batch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2


def shares(original: nn.Module, model: nn.Module, example: Tensor) -> tuple[float, float]:
    """Return the shares of parameters and multiply-adds that a plain network needs."""
    parameters = [sum(p.numel() for p in one.parameters()) for one in (model, original)]
    return parameters[0] / parameters[1], macs(model, example) / macs(original, example)


def largest_within(original: nn.Module, budget: str, example: Tensor, cut: Callable[[float], nn.Module]) -> nn.Module:
    """Return the network for the largest share, from 0 to 1, that meets a budget."""
    unit, text = budget.split("=")
    limit, which = float(text.rstrip("%")) / 100, 0 if unit == "params" else 1
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        share = (low + high) / 2
        model = cut(share)
        if shares(original, model, example)[which] <= limit:
            low, best = share, model
        else:
            high = share
    if best is None:
        raise ValueError(f"no share meets {budget}")
    return best


def tucker2(
    original: nn.Module, names: Iterable[str], budget: str, example: Tensor, moments: Mapping[str, Tensor] | None
) -> nn.Module:
    """Return a network whose layers are products over both channel axes, with the same share of weights in each layer.

    Args:
        names: the layers to decompose.
        moments: second moments of the inputs of each layer (I x K, I x K); None: without inputs.
    """

    def cut(share: float) -> nn.Module:
        model = copy.deepcopy(original)
        for name in names:
            layer = model.get_submodule(name)
            made = _decomposed(layer, share, None if moments is None else moments[name])
            model = replace_module(model, layer, made)
        return model

    return largest_within(original, budget, example, cut)


def _decomposed(layer: nn.Module, share: float, moments: Tensor | None) -> nn.Module:
    weight = cast(Tensor, layer.weight).detach()
    allowed = int(share * weight.numel())
    kernel = (weight if weight.dim() > 2 else weight[..., None]).double().flatten(2)
    out, inside, size = kernel.shape
    if size == 1:  # one matrix: two factors
        rank = max(1, allowed // (out + inside))
        if rank >= out * inside / (out + inside):
            return layer
        left, right = _pair(kernel[..., 0], rank, moments)
        return _chain(layer, [right, left], kernel_at=None)
    if moments is not None:
        gram = moments.view(inside, size, inside, size).diagonal(dim1=1, dim2=3).sum(-1)
        root, inverse = _root(gram)
    else:
        root = inverse = torch.eye(inside, dtype=torch.float64)
    ranks = _ranks(out, inside, size, allowed)
    if ranks[0] * out + ranks[1] * inside + ranks[0] * ranks[1] * size >= weight.numel():
        return layer
    white = torch.einsum("oik,ij->ojk", kernel, root)
    right = torch.linalg.svd(white.transpose(0, 1).flatten(1), full_matrices=False)[0][:, : ranks[1]]
    # The outputs in the metric of the inputs, or of the weights.
    outputs = kernel.flatten(1) if moments is None else kernel.flatten(1) @ _root(moments)[0]
    left = torch.linalg.svd(outputs, full_matrices=False)[0][:, : ranks[0]]
    core = torch.einsum("oik,or,iq->rqk", white, left, right)
    return _chain(layer, [right.T @ inverse, core.view(*core.shape[:2], *weight.shape[2:]), left], kernel_at=1)


def _ranks(out: int, inside: int, size: int, allowed: int) -> tuple[int, int]:
    """Return the largest ranks, in proportion to the channels, whose factors fit."""
    for share in torch.linspace(1, 0, 1001).tolist():
        r, q = max(1, int(share * out)), max(1, int(share * inside))
        if r * out + q * inside + r * q * size <= allowed:
            return r, q
    return 1, 1


def _pair(matrix: Tensor, rank: int, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return two factors of a matrix, the best in the metric of the inputs."""
    white = matrix if moments is None else matrix @ _root(moments)[0]
    left = torch.linalg.svd(white, full_matrices=False)[0][:, :rank]
    return left, left.T @ matrix


def _root(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of a metric and its inverse; directions without power get a millionth of the mean."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(1e-6 * float(values.mean())).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _chain(layer: nn.Module, weights: Sequence[Tensor], kernel_at: int | None) -> nn.Module:
    """Return layers one after the other with these weights; the one at ``kernel_at`` has the kernel of ``layer``."""
    made: list[nn.Module] = []
    for number, weight in enumerate(weights):
        own: Any
        bias = number == len(weights) - 1 and layer.bias is not None
        if isinstance(layer, nn.Linear):
            own = nn.Linear(weight.shape[1], weight.shape[0], bias)
        else:
            conv: Any = layer
            # A 1x1 convolution keeps its stride in the first of the two.
            whole = number == (kernel_at or 0)
            own = nn.Conv2d(
                weight.shape[1], weight.shape[0], conv.kernel_size if number == kernel_at else 1,
                conv.stride if whole else 1, conv.padding if whole and kernel_at is not None else 0,
                conv.dilation if whole else 1, bias=bias,
            )  # fmt: skip
        own.weight.data.copy_(weight.view_as(own.weight))
        if bias:
            own.bias.data.copy_(cast(Tensor, layer.bias).data)
        made.append(own)
    return nn.Sequential(*made)


def pruned(original: nn.Module, whole: Sequence[str], budget: str, batches: Sequence[Tensor]) -> nn.Module:
    """Return a network without the channels of least norm (Torch-Pruning), with re-estimated batch norms.

    Args:
        whole: the layers whose outputs keep all channels, such as the classifier.
    """
    import torch_pruning as tp

    def cut(share: float) -> nn.Module:
        model = copy.deepcopy(original)
        ignored = [model.get_submodule(name) for name in whole]
        tp.pruner.BasePruner(
            model, batches[0][:1], importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=1 - share,
            ignored_layers=ignored,
        ).step()  # fmt: skip
        return model.eval()

    model = largest_within(original, budget, batches[0][:1], cut)
    reestimate_batch_norm(model, batches)
    return model
