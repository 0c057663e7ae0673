"""Replace the layers of low rank of a network by others that compute the same."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, cast

from torch import nn

from ..layers.low_rank import LowRank, empty_low_rank, from_low_rank, to_low_rank
from ..layers.ranked import RankedMixin, empty_full_rank, empty_ranked_of, is_ranked, to_full_rank
from .exchange import exchange


def ranked_layers(model: nn.Module) -> dict[str, RankedMixin]:
    """Return the layers of low rank of a network by name. A shared one has only its first name."""
    return {name: module for name, module in model.named_modules() if is_ranked(module)}


def at_full_rank(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose layers of low rank hold the product of their matrices in one weight.

    The network itself is returned if it has no such layers.
    """
    return in_two_layers(model, ())


def in_two_layers(model: nn.Module, names: Collection[str], harmonic: bool = False) -> nn.Module:
    """Return a copy of a network with the named layers of low rank as two layers, and the others at full rank.

    The network itself is returned if it has no layers of low rank.

    Args:
        harmonic: the layers with the kernel of a harmonic convolution are harmonic, too; else they are plain.
    """
    if not (ranked := ranked_layers(model)):
        return model
    split = {layer for name, layer in ranked.items() if name in names}
    fill: dict[nn.Module, Any] = {
        layer: partial(to_low_rank, layer, harmonic=harmonic) if layer in split else partial(to_full_rank, layer)
        for layer in ranked.values()
    }
    return exchange(model, fill, lambda layer: empty_low_rank() if layer in split else empty_full_rank(layer))


def in_one_layer(model: nn.Module) -> nn.Module:
    """Return a copy of a network in which layers of low rank that were split into two layers are one layer again.

    The network itself is returned if it has no such layers.
    """
    fill: dict[nn.Module, Any] = {
        module: partial(from_low_rank, module) for module in model.modules() if isinstance(module, LowRank)
    }
    if not fill:
        return model
    return exchange(
        model, fill, lambda low: empty_ranked_of(cast(LowRank, low).base, cast(LowRank, low).spectrum is not None)
    )
