"""Find the layers of a network and name their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard, cast

from torch import nn

from ..layers.harmonic import CONVOLUTIONS, HarmonicMixin


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution by its first name, shared ones once, in the network's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer by its first name, shared ones once, in the network's own order."""
    kinds: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def harmonic_layers(model: nn.Module) -> dict[str, HarmonicMixin]:
    """Every harmonic convolution by its first name, shared ones once, in the network's own order."""
    return {name: module for name, module in model.named_modules() if is_harmonic_layer(module)}


def is_harmonic_layer(module: nn.Module) -> TypeGuard[HarmonicMixin]:
    """Whether a module is a harmonic convolution."""
    return isinstance(module, HarmonicMixin)


def kernel_size(layer: nn.Module) -> tuple[int, ...]:
    """The kernel size of a convolution as a tuple of ints; () for a linear layer."""
    return tuple(cast("tuple[int, ...]", getattr(layer, "kernel_size", ())))


def state_key(layer: str, tensor: str) -> str:
    """The key of a layer's tensor in the state dict of its network, which may be the layer itself."""
    return f"{layer}.{tensor}" if layer else tensor


@dataclass(frozen=True)
class LayerInfo:
    """What a plan needs to know of one convolution or linear layer.

    ``output_size`` is the size of its map (H, W), known after a run of the network; ``reads_input`` says that it reads
    the network's input or a fixed transform of it, ``fixed`` that it is itself a transform that is not trained;
    ``tied_to`` names the first layer with the same weight; ``skip`` is the reason why it cannot be converted.
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
