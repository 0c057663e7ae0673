"""The frequencies that the layers of a network use (paper fig. 3), as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...kernels.basis import Frequency, all_frequencies
from ...network.checks import check_network, check_weights
from ...plan import Skip
from ..text import size_text
from .kernels import Layer, layers_with_kernel, layers_without_spectrum, level


@dataclass(frozen=True)
class LayerSpectrum:
    """The mean |coefficient| of one layer over its filters and channels, for each frequency of its kernel.

    ``frequencies``: in the order of `all_frequencies`. ``kept``: for each frequency whether the layer keeps it.
    ``magnitudes``: the means, 0 for cut frequencies.
    """

    name: str
    kernel_size: tuple[int, ...]
    frequencies: tuple[Frequency, ...]
    kept: tuple[bool, ...]
    magnitudes: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """Return the magnitudes divided by the largest one, so that layers can be compared; 0 if all are 0."""
        largest = max(self.magnitudes)
        return tuple(value / largest if largest else 0.0 for value in self.magnitudes)

    @property
    def levels(self) -> tuple[int, ...]:
        """Return the level of each frequency."""
        return tuple(map(level, self.frequencies))


@dataclass(frozen=True)
class Spectrum:
    """The spectra of the layers with kernels larger than 1x1, in the order of the network, and the skipped layers."""

    layers: tuple[LayerSpectrum, ...]
    skipped: tuple[Skip, ...] = ()

    @property
    def panels(self) -> dict[tuple[int, ...], tuple[LayerSpectrum, ...]]:
        """Return the layers by kernel size, in the order in which the sizes first appear in the network."""
        sizes = dict.fromkeys(layer.kernel_size for layer in self.layers)
        return {size: tuple(layer for layer in self.layers if layer.kernel_size == size) for size in sizes}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each frequency of each layer."""
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
    """Compute the mean |coefficient| of every frequency in each layer; plain kernels are projected first.

    >>> conv = nn.Conv2d(1, 1, 2)
    >>> _ = nn.init.ones_(conv.weight)
    >>> [round(magnitude, 6) for magnitude in spectrum(conv).layers[0].magnitudes]
    [2.0, 0.0, 0.0, 0.0]

    Args:
        kernel_size: use only layers with this kernel size; None: all layers.

    Raises:
        InputError: the weights are not finite or have no values, or no kernel is larger than 1x1.
        UsageError: no layer has this kernel size.
    """
    check_network(model)
    check_weights(model)
    layers = layers_with_kernel(model, kernel_size)
    return Spectrum(tuple(map(_spectrum_of, layers)), layers_without_spectrum(model))


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
