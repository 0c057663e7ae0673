"""A score without images: the energy that a cut takes from a kernel, as the batch norm behind it sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.basis import largest_of
from ..network.layers import weighted_layers
from ..plan.axes import projected
from .choices import Choice


def energy_scores(model: nn.Module, names: Sequence[str], choices: Sequence[Choice]) -> list[float]:
    """For each choice the mean over output channels of |what is cut|^2 over the variance that the batch norm behind the
    layer divides by; without one over |kernel|^2. For layers that share a kernel, the first one's score is used.

    White inputs of variance one would lose that share of each channel's variance. Images hold less at high frequencies,
    so this is good for an order of layers, not for the accuracy that a cut will cost.
    """
    name = names[0]
    layer = weighted_layers(model)[name]
    transposed = bool(getattr(layer, "transposed", False))
    weight = cast(Tensor, layer.weight).detach().to(torch.float64)
    filters = weight.transpose(0, 1) if transposed else weight
    scale_O = _variance_behind(model, name, len(filters))
    if scale_O is None:  # then only proportions matter, and the floor below is not to meet small weights
        weight = weight / largest_of(weight)
        filters = weight.transpose(0, 1) if transposed else weight
        scale_O = filters.flatten(1).square().sum(1)
    scores = []
    for choice in choices:
        cut = weight - projected(weight, choice)
        cut_O = (cut.transpose(0, 1) if transposed else cut).flatten(1).square().sum(1)
        scores.append(float((cut_O / scale_O.to(cut_O).clamp_min(1e-12)).mean()))
    return scores


def _variance_behind(model: nn.Module, name: str, channels: int) -> Tensor | None:
    """Running variance of the batch norm that the network defines next, if it has as many channels: in most networks
    the one that the convolution feeds."""
    found = False
    for other, module in model.named_modules():
        if found and isinstance(module, nn.modules.batchnorm._BatchNorm):
            variance = module.running_var if module.num_features == channels else None
            return None if variance is None else variance.detach().to(torch.float64)
        found = found or other == name
    return None
