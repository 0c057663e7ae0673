"""Which frequencies the layers of a network live on (paper fig. 3), as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..kernels.basis import Frequency, all_frequencies
from ..network.checks import check_network, check_weights
from ..plan.plan import Skip
from .kernels import Layer, layers_of, level, size_text, strangers_in, with_kernel


@dataclass(frozen=True)
class LayerSpectrum:
    """Mean |coefficient| of one layer over its filters and channels, for each of ``frequencies`` (all those of its
    kernel, in the house order); ``kept`` says which it has, the others are 0."""

    name: str
    kernel_size: tuple[int, ...]
    frequencies: tuple[Frequency, ...]
    kept: tuple[bool, ...]
    magnitudes: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """The magnitudes over the largest of them, so that layers of large and small weights, and cut and whole ones
        compare (0 where all are 0)."""
        largest = max(self.magnitudes)
        return tuple(value / largest if largest else 0.0 for value in self.magnitudes)

    @property
    def levels(self) -> tuple[int, ...]:
        """The level of each frequency."""
        return tuple(map(level, self.frequencies))


@dataclass(frozen=True)
class Spectrum:
    """The layers with kernels over 1x1 in the order of the network, and what was left out."""

    layers: tuple[LayerSpectrum, ...]
    skipped: tuple[Skip, ...] = ()

    @property
    def panels(self) -> dict[tuple[int, ...], tuple[LayerSpectrum, ...]]:
        """The layers by kernel size, sizes in the order in which they come."""
        sizes = dict.fromkeys(layer.kernel_size for layer in self.layers)
        return {size: tuple(layer for layer in self.layers if layer.kernel_size == size) for size in sizes}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each frequency of each layer."""
        return [
            {
                "layer": layer.name,
                "kernel": size_text(layer.kernel_size),
                "frequency": str(frequency),
                "level": at,
                "kept": kept,
                "mean_abs": magnitude,
                "relative": relative,
            }
            for layer in self.layers
            for frequency, at, kept, magnitude, relative in zip(
                layer.frequencies, layer.levels, layer.kept, layer.magnitudes, layer.relative, strict=True
            )
        ]


def spectrum(model: nn.Module, kernel_size: Sequence[int] | None = None) -> Spectrum:
    """Mean |coefficient| of every frequency, layer by layer; plain kernels are projected first.

    >>> conv = nn.Conv2d(1, 1, 2)
    >>> _ = nn.init.ones_(conv.weight)
    >>> [round(magnitude, 6) for magnitude in spectrum(conv).layers[0].magnitudes]
    [2.0, 0.0, 0.0, 0.0]

    Args:
        kernel_size: only layers with that kernel.

    Raises:
        InputError: weights that are not finite or have no values, or no kernel over 1x1.
        UsageError: no layer has that kernel.
    """
    check_network(model)
    check_weights(model)
    layers = with_kernel(layers_of(model), kernel_size)
    return Spectrum(tuple(map(_spectrum_of, layers)), strangers_in(model))


def _spectrum_of(layer: Layer) -> LayerSpectrum:
    means = dict(zip(layer.frequencies, layer.coefficients().abs().mean((0, 1)).tolist(), strict=True))
    frequencies = all_frequencies(layer.kernel_size)
    return LayerSpectrum(
        layer.name,
        layer.kernel_size,
        frequencies,
        tuple(f in means for f in frequencies),
        tuple(means.get(f, 0.0) for f in frequencies),
    )
