"""Find the layers of a network and name their tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers.harmonic import CONVOLUTIONS, HarmonicMixin, is_harmonic_layer
from ..layers.low_rank import LowRank
from ..layers.ranked import is_ranked

# Modules that are no convolution or linear layer but have weight matrices, and the names of these parameters. The first
# axis of a matrix is that of its outputs. Only the precision axis changes them: their values, not their shapes.
_RECURRENT = r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?"
_MATRICES: dict[type[nn.Module], str] = {
    nn.RNNBase: _RECURRENT, nn.RNNCellBase: _RECURRENT, nn.Embedding: "weight", nn.EmbeddingBag: "weight",
    nn.MultiheadAttention: "(in|q|k|v)_proj_weight",
}  # fmt: skip


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions of a network by name, in order of registration. A shared one has only its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers of a network by name; see `convolutions`."""
    kinds: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def all_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that a plan may contain, by name: `weighted_layers` and those of `matrix_names`."""
    weighted = {id(layer) for layer in weighted_layers(model).values()}
    return {n: module for n, module in model.named_modules() if id(module) in weighted or matrix_names(module)}


def matrix_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weight matrices of a recurrent layer, an embedding or an attention module.

    Empty for any other module. Matrices without values, or computed from others (weight norm, pruning), are left out.

    >>> matrix_names(nn.LSTM(2, 3)), matrix_names(nn.Embedding(4, 5)), matrix_names(nn.Linear(2, 3))
    (('weight_ih_l0', 'weight_hh_l0'), ('weight',), ())
    """
    pattern = next((names for kind, names in _MATRICES.items() if isinstance(module, kind)), None)
    if pattern is None:
        return ()
    own = {name: tensor for name, tensor in module._parameters.items() if tensor is not None and not is_lazy(tensor)}
    return tuple(name for name, tensor in own.items() if re.fullmatch(pattern, name) and tensor.numel())


def observable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers by name whose inputs determine the best weight.

    A linear layer that shares its weight with an embedding is none of them.
    """
    shared = {
        id(tensor)
        for module in model.modules()
        for name in matrix_names(module)
        if (tensor := module._parameters[name]) is not None
    }
    return {
        n: layer for n, layer in weighted_layers(model).items() if id(layer._parameters.get("weight")) not in shared
    }


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


def parameter_of(layer: nn.Module) -> nn.Parameter:
    """Return the parameter that holds a layer's kernels: the coefficients of a harmonic layer, or else the weight."""
    return layer.coefficients if is_harmonic_layer(layer) else cast(nn.Parameter, layer.weight)


def stored_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters from which a layer's kernels are computed."""
    if is_ranked(layer):
        return ("coefficients_in", "coefficients_out")
    return ("coefficients",) if is_harmonic_layer(layer) else matrix_names(layer) or ("weight",)


def weights_of(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return the weight of a convolution or linear layer (merged if it is harmonic), or the matrices of another one."""
    return tuple(cast(Tensor, getattr(layer, name)) for name in matrix_names(layer) or ("weight",))


def kernel_size(layer: nn.Module) -> tuple[int, ...]:
    """Return the kernel size of a convolution as a tuple of ints; () for other layers."""
    return () if matrix_names(layer) else tuple(cast("tuple[int, ...]", getattr(layer, "kernel_size", ())))


def state_key(layer: str, tensor: str) -> str:
    """Return the key of a layer's tensor in the network's state dict. ``layer`` is "" if the network is the layer."""
    return f"{layer}.{tensor}" if layer else tensor


@dataclass(frozen=True)
class LayerInfo:
    """Facts about one layer that a plan needs.

    ``reads_input``: the layer reads the network's input or a fixed transform of it. ``fixed``: the layer is itself a
    transform that is not trained. ``output_size``: the size of its output map (H, W), known after a run of the network.
    ``tied_to``: the first layer that has the same weight. ``skip``: why the layer cannot be converted. ``inputs``,
    ``outputs``: its channels. ``classifier``: it computes the network's logits. ``kept_positions``: how many positions
    of its kernel the axes before the present one keep; None: all. ``matrices``: names of the weight matrices of a layer
    whose inputs do not determine them (`observable_layers`); few axes take such a layer (`Axis.matrices`).
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
    matrices: tuple[str, ...] = ()
