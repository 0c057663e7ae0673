"""The kernels of a network as figures see them. What the figures know of the basis, they know from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ..errors import InputError, UsageError
from ..kernels.basis import Frequency, all_frequencies, dct_basis
from ..kernels.projection import project
from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import CONVOLUTIONS
from ..network.layers import convolutions, is_harmonic_layer, kernel_size
from ..network.tracing import find_layers
from ..plan import Skip, plannable


@dataclass(frozen=True)
class Layer:
    """A convolution over 1x1, plain or harmonic, or a `HarmonicBlock2d`, and the frequencies that it keeps."""

    name: str
    module: nn.Module
    kernel_size: tuple[int, ...]
    frequencies: tuple[Frequency, ...]

    @property
    def harmonic(self) -> bool:
        """Whether it has coefficients already."""
        return is_harmonic_layer(self.module) or isinstance(self.module, HarmonicBlock2d)

    def coefficients(self) -> Tensor:
        """Coefficients (O, I, F) of orthonormal filters, float64; of a block its mixing weights, as they are."""
        if isinstance(self.module, HarmonicBlock2d):
            weights_OX = self.module.mix.weight.detach().flatten(1)
            coefficients_OIF = weights_OX.unflatten(1, (-1, len(self.frequencies))).to(torch.float64)
        else:
            weight = self.module.weight
            assert isinstance(weight, Tensor)
            # Of the merged kernel: an l1 basis would scale each frequency its own way.
            coefficients_OIF = project(weight.detach().to(torch.float64), dct_basis(self.kernel_size, self.frequencies))
        if coefficients_OIF.is_meta:
            raise InputError(f"layer {self.name or '(root)'} is on the meta device, where weights have no values")
        return coefficients_OIF


def layers_of(model: nn.Module) -> tuple[Layer, ...]:
    """Every layer with a kernel over 1x1, in the network's own order, shared ones once.

    Raises:
        InputError: there is none.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, HarmonicBlock2d) or (isinstance(module, CONVOLUTIONS) and prod(kernel_size(module)) > 1):
            size = kernel_size(module)
            kept = (
                module.frequencies
                if (is_harmonic_layer(module) or isinstance(module, HarmonicBlock2d))
                else all_frequencies(size)
            )
            layers.append(Layer(name, module, size, kept))
    if not layers:
        raise InputError(f"this {type(model).__name__} has no convolution over 1x1: there is nothing to draw")
    return tuple(layers)


def strangers_in(model: nn.Module) -> tuple[Skip, ...]:
    """What convolves but is no convolution that a figure can show, and why."""
    convs = convolutions(model)
    others = [layer for layer in plannable(find_layers(model)) if layer.name not in convs]
    return tuple(Skip(layer.name, layer.kind, layer.kernel_size, layer.skip or "") for layer in others)


def filters_of(size: Sequence[int]) -> tuple[tuple[Frequency, tuple[float, ...]], ...]:
    """Each frequency of a kernel in the house order, and the values of its filter, the last axis running fastest."""
    return tuple(zip(all_frequencies(size), map(tuple, dct_basis(size).tolist()), strict=True))


def level(frequency: Frequency) -> int:
    """The level of a frequency: a lambda keeps those below it."""
    return sum(frequency)


def with_kernel(layers: Sequence[Layer], size: Sequence[int] | None) -> tuple[Layer, ...]:
    """The layers whose kernel has that size (one number: that along every axis); all of them for None.

    Raises:
        UsageError: there is none.
    """
    if size is None:
        return tuple(layers)
    found = tuple(
        layer
        for layer in layers
        if layer.kernel_size == tuple(size) or (len(size) == 1 and set(layer.kernel_size) == set(size))
    )
    if not found:
        there = ", ".join(dict.fromkeys(size_text(layer.kernel_size) for layer in layers))
        raise UsageError(f"no layer has a kernel of {size_text(size)} (there are: {there})")
    return found


def size_text(size: Sequence[int]) -> str:
    """3x3; of one axis 64."""
    return "x".join(map(str, size))
