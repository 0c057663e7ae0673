"""The layers with a kernel larger than 1x1, and the DCT filters of a kernel size, for figures and facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ...errors import InputError, UsageError
from ...kernels.basis import Frequency, all_frequencies, dct_basis
from ...kernels.projection import project
from ...layers.block import HarmonicBlock2d
from ...layers.harmonic import CONVOLUTIONS, is_harmonic_layer
from ...network.layers import convolutions, kernel_size
from ...network.tracing import find_layers
from ...plan import Skip, plannable
from ..text import layer_name, size_text


@dataclass(frozen=True)
class Layer:
    """A plain or harmonic convolution, or a `HarmonicBlock2d`, and the frequencies that it keeps."""

    name: str
    module: nn.Module
    kernel_size: tuple[int, ...]
    frequencies: tuple[Frequency, ...]

    @property
    def harmonic(self) -> bool:
        """Return whether the layer has coefficients instead of a kernel."""
        return is_harmonic_layer(self.module) or isinstance(self.module, HarmonicBlock2d)

    def coefficients(self) -> Tensor:
        """Return the coefficients (O, I, F) of orthonormal filters, float64; for a block its 1x1 weights, unchanged."""
        if isinstance(self.module, HarmonicBlock2d):
            weights_OX = self.module.mix.weight.detach().flatten(1)
            coefficients_OIF = weights_OX.unflatten(1, (-1, len(self.frequencies))).to(torch.float64)
        else:
            weight = self.module.weight
            assert isinstance(weight, Tensor)
            # Project the merged kernel: with l1 normalization, the layer's coefficients have another scale for each
            # frequency.
            coefficients_OIF = project(weight.detach().to(torch.float64), dct_basis(self.kernel_size, self.frequencies))
        if coefficients_OIF.is_meta:
            raise InputError(f"layer {layer_name(self.name)} is on the meta device, where weights have no values")
        return coefficients_OIF


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """Return the layers with a kernel larger than 1x1, in the order of the network; shared layers appear once."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, HarmonicBlock2d) or (isinstance(module, CONVOLUTIONS) and prod(kernel_size(module)) > 1):
            size = kernel_size(module)
            if is_harmonic_layer(module) or isinstance(module, HarmonicBlock2d):
                kept = module.frequencies
            else:
                kept = all_frequencies(size)
            layers.append(Layer(name, module, size, kept))
    return tuple(layers)


def layers_without_spectrum(model: nn.Module) -> tuple[Skip, ...]:
    """Return the layers that compute a convolution, but are of a class without a spectrum, with the reason."""
    convs = convolutions(model)
    others = [layer for layer in plannable(find_layers(model)) if layer.name not in convs]
    return tuple(Skip(layer.name, layer.kind, layer.kernel_size, layer.skip or "") for layer in others)


def filters_of(size: Sequence[int]) -> tuple[tuple[Frequency, tuple[float, ...]], ...]:
    """Return each frequency, in the order of `all_frequencies`, with the values of its filter in C order."""
    return tuple(zip(all_frequencies(size), map(tuple, dct_basis(size).tolist()), strict=True))


def level(frequency: Frequency) -> int:
    """Return the level of a frequency: a lambda keeps the frequencies with lower levels."""
    return sum(frequency)


def layers_with_kernel(model: nn.Module, size: Sequence[int] | None) -> tuple[Layer, ...]:
    """Return the layers of `layers_of` with this kernel size (one number: the length of every axis); all for None.

    Raises:
        InputError: the network has no kernel larger than 1x1. UsageError: no layer has this kernel size.
    """
    layers = layers_of(model)
    if not layers:
        raise InputError(f"this {type(model).__name__} has no convolution over 1x1: there is nothing to draw")
    if size is None:
        return layers
    matches = tuple(
        layer
        for layer in layers
        if layer.kernel_size == tuple(size) or (len(size) == 1 and set(layer.kernel_size) == set(size))
    )
    if not matches:
        sizes = ", ".join(dict.fromkeys(size_text(layer.kernel_size) for layer in layers))
        raise UsageError(f"no layer has a kernel of {size_text(size)} (there are: {sizes})")
    return matches
