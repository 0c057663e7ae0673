"""harmonize(): a network to be trained from scratch as Harm1-X or Harm-X of the paper (sec. 4)."""

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
from ..network.checks import check_network
from ..network.exchange import put_in_place
from ..network.layers import is_harmonic_layer
from ..network.tracing import find_layers, run_where_possible
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
    """A copy of ``model`` to be trained in harmonic form as the paper's networks are; ``model`` itself is not changed.

    The convolution that reads the input becomes a `HarmonicBlock2d` with spectrum normalisation (eq. 3), whole; with
    ``which="all"`` every other convolution over 1x1 becomes its merged harmonic counterpart (sec. 5.2), cut as ``lam``
    says. Their weights are drawn anew, with torch's global generator (`initialize`); all else stays as it is.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    >>> [type(layer).__name__ for layer in harmonize(net, "all", lam=2)]
    ['HarmonicBlock2d', 'HarmonicConv2d']

    Args:
        which: ``"first"`` (Harm1-X) or ``"all"`` (Harm-X).
        lam, example_input: as in `harmconvert.convert`.
        normalize_first: False makes the first layer a merged convolution like the others ("no BN" in Table 1).
        pretrained: True keeps what the kernels are, projected, and leaves the normalisation of the first layer out: a
            batch norm in its middle has statistics that no pretrained network can tell.
        basis: of the merged layers, as in `harmconvert.convert`; the block is of the DCT.

    Raises:
        UsageError: unknown ``which`` or lambda, a basis fitted to kernels that are yet to be drawn, or a first layer
            that no block can take the place of.
        InputError: the network has no convolution over 1x1.
    """
    if which not in WHICH:
        raise UsageError(f"which (={which!r}) must be one of {', '.join(WHICH)}")
    kind = Basis(basis)
    if kind.fitted and not pretrained:
        raise UsageError(f"the {basis} basis is fitted to kernels, and these are yet to be trained: use another")
    check_network(model)
    run = run_where_possible(model, lam, example_input)
    layers = find_layers(model, run)
    plan = make_plan(layers, lam, basis=kind)
    first = next((layer.name for layer in plannable(layers) if layer.reads_input and layer.skip is None), None)
    if first is None:
        raise InputError(f"this {type(model).__name__} has no convolution over 1x1 that reads its input")
    block = normalize_first and not pretrained
    chosen = [p for p in plan.layers if (p.name == first and not block) or (p.name != first and which == "all")]
    copied = apply_plan(model, replace(plan, layers=tuple(chosen)))
    if block:
        conv = dict(copied.named_modules())[first]
        copied = put_in_place(copied, conv, to_block(conv))
    if not pretrained:
        initialize(copied)
    return copied


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Draw the weights of harmonic layers anew as the paper's implementation does: from N(0, 2 / fan-out); biases zero.

    The fan-out of coefficients (O, I, F) is O x F, that of a block's 1x1 mixing O. With an orthonormal whole basis the
    merged kernels are so distributed as `nn.init.kaiming_normal_` by fan-out draws kernels.
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
