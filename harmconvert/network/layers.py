"""Find the layers of a network and name their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from ..layers.harmonic import CONVOLUTIONS


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution by its first name, shared ones once, in the network's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def kernel_size(conv: nn.Module) -> tuple[int, ...]:
    """A convolution's kernel size as a tuple of ints."""
    return tuple(cast("tuple[int, ...]", conv.kernel_size))


def state_key(layer: str, tensor: str) -> str:
    """The key of a layer's tensor in the state dict of its network, which may be the layer itself."""
    return f"{layer}.{tensor}" if layer else tensor


@dataclass(frozen=True)
class ConvSite:
    """A convolution over 1x1 as a policy sees it.

    ``output_size`` is its map's size (H, W), known after a run of the network; ``reads_input`` says that it reads the
    network's input or a fixed transform of it, ``fixed`` that it is itself a transform that is not trained; ``tied_to``
    names the first convolution with the same weight; ``skip`` is the reason why it cannot be converted.
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
