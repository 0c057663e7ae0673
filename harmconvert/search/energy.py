"""Scores without images: the kernel energy that a cut removes, relative to the variance at the next batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.basis import largest_of
from ..network.layers import weighted_layers
from ..plan.axes import projections
from .choices import Choice


def energy_scores(model: nn.Module, names: Sequence[str], choices: Sequence[Choice]) -> list[float]:
    """Return the score of each choice: the energy that it cuts, relative to each output channel's variance.

    The score is the mean over output channels of |cut part of the kernel|^2 / (running variance of the next batch
    norm), or / |kernel|^2 where there is no batch norm. Layers that share a kernel use the first layer's score.

    For white inputs of variance one, the score is the share of the variance that is lost. Images have less energy at
    high frequencies, so the score ranks layers; it does not predict accuracy.
    """
    name = names[0]
    layer = weighted_layers(model)[name]
    transposed = bool(getattr(layer, "transposed", False))
    weight = cast(Tensor, layer.weight).detach().to(torch.float64)
    filters = weight.transpose(0, 1) if transposed else weight
    scale_O = _variance_behind(model, name, len(filters))
    if scale_O is None:  # then only proportions matter; scaled, small weights stay above the floor below
        weight = weight / largest_of(weight)
        filters = weight.transpose(0, 1) if transposed else weight
        scale_O = filters.flatten(1).square().sum(1)
    scores = []
    for nearest in projections(weight, choices):
        cut = weight - nearest
        cut_O = (cut.transpose(0, 1) if transposed else cut).flatten(1).square().sum(1)
        scores.append(float((cut_O / scale_O.to(cut_O).clamp_min(1e-12)).mean()))
    return scores


def _variance_behind(model: nn.Module, name: str, channels: int) -> Tensor | None:
    """Return the running variance of the batch norm that the network defines next, if it has as many channels.

    In most networks this batch norm follows the convolution in the forward pass, too.
    """
    passed = False
    for other, module in model.named_modules():
        if passed and isinstance(module, nn.modules.batchnorm._BatchNorm):
            variance = module.running_var if module.num_features == channels else None
            return None if variance is None else variance.detach().to(torch.float64)
        passed = passed or other == name
    return None
