"""Lambda policies: how many frequency levels each layer keeps (sec. 4 and 5)."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from ...errors import Argument, UsageError, shortened
from ...kernels.basis import Basis, all_frequencies, dct_basis, frequencies_below, scaled_levels
from ...kernels.projection import energy_kept
from ...network.layers import LayerInfo
from .frequencies import Frequencies


@dataclass(frozen=True)
class Lambda:
    """The setting of the space axis: a lambda policy and the basis of the frequencies."""

    lam: str | int | Mapping[str, int] | Any = "full"
    basis: Basis = field(default_factory=Basis)

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.lam.items()) if isinstance(self.lam, Mapping) else str(self.lam)


def energies_kept(weight: Tensor, lambdas: Sequence[int]) -> tuple[float, ...]:
    """Return the share of a kernel's energy that each lambda (scaled with the kernel) keeps with the DCT.

    >>> import torch
    >>> [round(energy, 6) for energy in energies_kept(torch.ones(1, 1, 3, 3), [1, 2])]
    [1.0, 1.0]
    """
    size = tuple(weight.shape[2:])
    kept = [frequencies_below(size, scaled_levels(size, lam)) for lam in lambdas]
    return tuple(energy_kept(weight, dct_basis(size, frequencies)) for frequencies in kept)


def planned(
    layers: Sequence[LayerInfo], setting: Lambda, named: Collection[str], notes: dict[str, str]
) -> dict[str, Frequencies]:
    """Return what each layer keeps under a lambda policy, by layer name.

    Raises:
        UsageError: the lambda is unknown, a pattern matches nothing, or a kernel has fewer levels.
    """
    lam, basis = setting.lam, setting.basis
    if lam == "full":
        return {layer.name: whole(layer, basis) for layer in layers}
    if lam == "progressive":
        return _progressive(layers, basis, named, notes)
    if isinstance(lam, Mapping):
        return _by_pattern(layers, lam, basis)
    if isinstance(lam, int) and not isinstance(lam, bool):
        return _uniform(layers, lam, basis, named, notes)
    raise UsageError(
        f"unknown lambda {lam!r}: use 'full', 'progressive', an integer, a dict {{pattern: levels}} or a Plan"
    )


def whole(layer: LayerInfo, basis: Basis) -> Frequencies:
    """Return all frequencies of a layer."""
    return Frequencies(layer.kernel_size, all_frequencies(layer.kernel_size), basis)


def _scaled(layer: LayerInfo, lam: int, basis: Basis) -> Frequencies:
    return Frequencies.below(layer.kernel_size, scaled_levels(layer.kernel_size, lam), basis)


def stays_whole(layer: LayerInfo, named: Collection[str], notes: dict[str, str]) -> bool:
    """Return whether a policy that does not name this layer leaves it whole; write the reason to ``notes``."""
    if layer.name in named or not (layer.reads_input or layer.fixed or layer.depthwise):
        return False
    what = "a fixed transform, which is not trained" if layer.fixed else "depthwise, unless a pattern names it"
    if layer.reads_input:
        what = "it reads the network's input" if layer.output_size else "taken for the layer that reads the input"
    notes[layer.name] = f"whole: {what}"
    return True


def _uniform(
    layers: Sequence[LayerInfo], lam: int, basis: Basis, named: Collection[str], notes: dict[str, str]
) -> dict[str, Frequencies]:
    if not 1 <= lam <= 5:
        raise UsageError(
            f"lambda {lam} is out of range: a bare number is meant for 3x3 kernels, which have levels 1 to 5"
        )
    return {
        layer.name: whole(layer, basis) if stays_whole(layer, named, notes) else _scaled(layer, lam, basis)
        for layer in layers
    }


def _progressive(
    layers: Sequence[LayerInfo], basis: Basis, named: Collection[str], notes: dict[str, str]
) -> dict[str, Frequencies]:
    """Keep lambda 2 in layers with the smallest maps, 3 in the next smallest, everything in all others (sec. 5).

    The size of a map is its number of positions.
    """
    unknown = [layer.name for layer in layers if layer.output_size is None]
    if unknown and len(unknown) == len(layers):
        what = "lambda progressive follows the sizes of the maps: give an example input ("
        raise UsageError(what, Argument("example_input"), ")")
    sizes = sorted({prod(layer.output_size) for layer in layers if layer.output_size is not None})
    lam_by_size = dict(zip(sizes, (2, 3), strict=False))
    kept = {}
    for layer in layers:
        if layer.output_size is None:
            notes[layer.name] = "whole: it did not run on the example input"
            kept[layer.name] = whole(layer, basis)
            continue
        lam = lam_by_size.get(prod(layer.output_size))
        keep_whole = lam is None or stays_whole(layer, named, notes)
        kept[layer.name] = whole(layer, basis) if keep_whole or lam is None else _scaled(layer, lam, basis)
    return kept


def _by_pattern(layers: Sequence[LayerInfo], lam: Mapping[str, int], basis: Basis) -> dict[str, Frequencies]:
    """Apply the patterns in order: the last one that matches a layer decides, so exceptions can follow a rule."""
    names = [layer.name for layer in layers]
    levels_by_name: dict[str, int] = {}
    for pattern, levels in lam.items():
        if not isinstance(levels, int) or isinstance(levels, bool):
            raise UsageError(f"lambda of {pattern!r} is {levels!r}: give a whole number of levels")
        if not (matches := fnmatch.filter(names, pattern)):
            raise UsageError(no_match(pattern, names))
        levels_by_name.update(dict.fromkeys(matches, levels))
    kept = {}
    for layer in layers:
        try:
            if layer.name in levels_by_name:
                kept[layer.name] = Frequencies.below(layer.kernel_size, levels_by_name[layer.name], basis)
            else:
                kept[layer.name] = whole(layer, basis)
        except UsageError as error:
            raise UsageError(f"layer {layer.name}: {error}") from error
    return kept


def no_match(pattern: str, names: Sequence[str]) -> str:
    """Return the message for a pattern that matches no layer."""
    return f"{pattern!r} matches no convolution over 1x1 (there are: {shortened(list(names), 5) or 'none'})"
