"""Find the layers of a network and name their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard, cast

from torch import nn

from ..layers.harmonic import CONVOLUTIONS, HarmonicMixin
from ..layers.low_rank import LowRank
from ..layers.ranked import is_ranked


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions of a network by name, in order of registration. A shared one has only its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a network by name; see `convolutions`."""
    kinds: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def harmonic_layers(model: nn.Module) -> dict[str, HarmonicMixin]:
    """Return the harmonic convolutions of a network by name; see `convolutions`."""
    return {name: module for name, module in model.named_modules() if is_harmonic_layer(module)}


def converted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the harmonic convolutions and the layers of low rank of a network by name; see `convolutions`.

    A layer of low rank that was split into two layers is one layer here.
    """
    parts = {id(part) for module in model.modules() if isinstance(module, LowRank) for part in module.children()}
    return {
        name: module
        for name, module in model.named_modules()
        if (is_harmonic_layer(module) or is_ranked(module) or isinstance(module, LowRank)) and id(module) not in parts
    }


def is_harmonic_layer(module: nn.Module) -> TypeGuard[HarmonicMixin]:
    """Return whether a module is a harmonic convolution."""
    return isinstance(module, HarmonicMixin)


def parameter_of(layer: nn.Module) -> nn.Parameter:
    """Return the parameter that holds a layer's kernels: the coefficients of a harmonic layer, or else the weight."""
    return layer.coefficients if is_harmonic_layer(layer) else cast(nn.Parameter, layer.weight)


def stored_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters from which a layer's kernels are computed."""
    if is_ranked(layer):
        return ("coefficients_in", "coefficients_out")
    return ("coefficients",) if is_harmonic_layer(layer) else ("weight",)


def kernel_size(layer: nn.Module) -> tuple[int, ...]:
    """Return the kernel size of a convolution as a tuple of ints; () for a linear layer."""
    return tuple(cast("tuple[int, ...]", getattr(layer, "kernel_size", ())))


def state_key(layer: str, tensor: str) -> str:
    """Return the key of a layer's tensor in the network's state dict. ``layer`` is "" if the network is the layer."""
    return f"{layer}.{tensor}" if layer else tensor


@dataclass(frozen=True)
class LayerInfo:
    """Facts about one convolution or linear layer that a plan needs.

    ``reads_input``: the layer reads the network's input or a fixed transform of it. ``fixed``: the layer is itself a
    transform that is not trained. ``output_size``: the size of its output map (H, W), known after a run of the network.
    ``tied_to``: the first layer that has the same weight. ``skip``: why the layer cannot be converted. ``inputs``,
    ``outputs``: its channels. ``classifier``: it computes the network's logits. ``kept_positions``: how many positions
    of its kernel the axes before the present one keep; None: all.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    depthwise: bool = False
    reads_input: bool = False
    fixed: bool = False
    output_size: tuple[int, ...] | None = None
    tied_to: str | None = None
    skip: str | None = None
    groups: int = 1
    inputs: int = 1
    outputs: int = 1
    transposed: bool = False
    classifier: bool = False
    kept_positions: int | None = None
