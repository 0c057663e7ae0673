"""harmonize(): a network to be trained from scratch as Harm1-X or Harm-X of the paper (sec. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from .block import to_block
from .conv import to_harmonic
from .convert import check_network, run_where_possible
from .errors import InputError, UsageError
from .plan import Plan, make_plan
from .surgery import convolutions, exchange, find_sites, put_in_place

WHICH = ("first", "all")


def harmonize(
    model: nn.Module,
    which: str = "all",
    lam: str | int | Mapping[str, int] | Plan = "full",
    *,
    normalize_first: bool = True,
    example_input: Any = None,
) -> nn.Module:
    """A copy of ``model`` to be trained from scratch in harmonic form; ``model`` itself is not changed.

    The convolution that reads the input becomes a `HarmonicBlock2d` with spectrum normalisation (eq. 3), whole; with
    ``which="all"`` every other convolution over 1x1 becomes its merged harmonic counterpart (sec. 5.2), cut as ``lam``
    says. Kernels start as the network drew them, projected.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    >>> [type(layer).__name__ for layer in harmonize(net, "all", lam=2)]
    ['HarmonicBlock2d', 'HarmonicConv2d']

    Args:
        which: ``"first"`` (Harm1-X) or ``"all"`` (Harm-X).
        lam, example_input: as in `harmconvert.convert`.
        normalize_first: False makes the first layer a merged convolution like the others ("no BN" in Table 1).

    Raises:
        UsageError: unknown ``which`` or lambda, or a first layer that no block can take the place of.
        InputError: the network has no convolution over 1x1.
    """
    if which not in WHICH:
        raise UsageError(f"which (={which!r}) must be one of {', '.join(WHICH)}")
    check_network(model)
    run = run_where_possible(model, lam, example_input)
    sites = find_sites(model, run)
    plan = make_plan(sites, lam)
    first = next((site.name for site in sites if site.reads_input and site.skip is None), None)
    if first is None:
        raise InputError(f"this {type(model).__name__} has no convolution over 1x1 that reads its input")
    chosen = [
        p for p in plan.layers if (which == "all" or p.name == first) and not (p.name == first and normalize_first)
    ]
    convs = convolutions(model)
    copied = exchange(
        model, {convs[p.name]: partial(to_harmonic, convs[p.name], p.frequencies, plan.normalization) for p in chosen}
    )
    if not normalize_first:
        return copied
    conv = dict(copied.named_modules())[first]
    return put_in_place(copied, conv, to_block(conv))
