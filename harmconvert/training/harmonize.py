"""harmonize(): build the paper's Harm1-X or Harm-X of a network, for training from scratch (sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError, UsageError
from ..kernels.basis import Basis
from ..layers.block import HarmonicBlock2d, to_block
from ..layers.harmonic import is_harmonic_layer
from ..network.checks import check_network
from ..network.exchange import replace_module
from ..network.tracing import find_layers, trace_if_possible
from ..plan import Plan, apply_plan, make_plan, plannable

WHICH = ("first", "all")


def harmonize(
    model: nn.Module,
    which: str = "all",
    lam: str | int | Mapping[str, int] | Plan = "full",
    *,
    normalize_first: bool = True,
    pretrained: bool = False,
    basis: str = "dct",
    example_input: Any = None,
) -> nn.Module:
    """Return a copy of ``model`` in the harmonic form in which the paper trains networks; ``model`` is not changed.

    The convolution that reads the input becomes a `HarmonicBlock2d` with all frequencies and with spectrum
    normalisation (eq. 3). With ``which="all"``, every other convolution with a kernel larger than 1x1 becomes its
    merged harmonic counterpart (sec. 5.2), truncated by ``lam``. The weights of these layers are initialised with
    torch's global generator (`initialize`). All other layers stay the same.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    >>> [type(layer).__name__ for layer in harmonize(net, "all", lam=2)]
    ['HarmonicBlock2d', 'HarmonicConv2d']

    Args:
        which: ``"first"`` (Harm1-X) or ``"all"`` (Harm-X).
        lam, example_input: as in `harmconvert.convert`.
        normalize_first: False makes the first layer a merged convolution like the others ("no BN" in Table 1).
        pretrained: True projects the existing kernels instead of initialising them. It leaves out the spectrum
            normalisation of the first layer, because a pretrained network does not have the statistics of that batch
            norm.
        basis: basis of the merged layers, as in `harmconvert.convert`; the block always has the DCT.

    Raises:
        UsageError: ``which`` or lambda is unknown, the basis is fitted to kernels that are not trained yet, or no block
            can replace the first layer.
        InputError: no convolution with a kernel larger than 1x1 reads the input.
    """
    if which not in WHICH:
        raise UsageError(f"which (={which!r}) must be one of {', '.join(WHICH)}")
    kind = Basis(basis)
    if kind.fitted and not pretrained:
        raise UsageError(f"the {basis} basis is fitted to kernels, but these are not trained yet: use another basis")
    check_network(model)
    run = trace_if_possible(model, lam, example_input)
    layers = find_layers(model, run)
    plan = make_plan(layers, lam, basis=kind)
    first = next((layer.name for layer in plannable(layers) if layer.reads_input and layer.skip is None), None)
    if first is None:
        raise InputError(
            f"no convolution with a kernel larger than 1x1 reads the input of this {type(model).__name__}: it cannot "
            "be harmonized"
        )
    block = normalize_first and not pretrained
    chosen = [p for p in plan.layers if (p.name == first and not block) or (p.name != first and which == "all")]
    copied = apply_plan(model, replace(plan, layers=tuple(chosen)))
    if block:
        conv = dict(copied.named_modules())[first]
        copied = replace_module(copied, conv, to_block(conv))
    if not pretrained:
        initialize(copied)
    return copied


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Initialise harmonic layers as in the paper's implementation: weights from N(0, 2 / fan-out), biases zero.

    The fan-out of coefficients (O, I, F) is O x F; that of a block's 1x1 convolution is O. With the whole orthonormal
    basis, the merged kernels have the distribution of `nn.init.kaiming_normal_` with ``mode="fan_out"``.
    """
    for module in model.modules():
        if isinstance(module, HarmonicBlock2d):
            weight, bias, fan_out = module.mix.weight, module.mix.bias, module.mix.out_channels
        elif is_harmonic_layer(module):
            weight, bias = module.coefficients, module.bias
            fan_out = weight.shape[0] * weight.shape[2]
        else:
            continue
        weight.normal_(0, math.sqrt(2 / fan_out))
        if bias is not None:
            bias.zero_()
