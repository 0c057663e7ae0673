"""The weights of a network that a plan codes, as matrices, and writing their coded values back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ...codecs.codec import Entry
from ...codecs.integers import Layout, Quantised
from ...codecs.plain import stored_bytes
from ...codecs.quantised import QUANTISED, layout_of, quantised_entry
from ...codecs.stream import unpack
from ...layers.ranked import groups_of, is_ranked, is_transposed
from ...network.layers import all_layers, stored_names
from ...network.state import tensors_of
from ..plan import LayerPlan, Plan
from .bits import Bits


@dataclass(frozen=True)
class CodedWeight:
    """One weight of a layer, or of several tied layers, that is coded.

    ``names``: of the layers. ``key``: of the tensor in the network's state. ``layout``: how the coefficients are
    arranged in groups, rows and columns. ``bits``: what the plan says.
    """

    names: tuple[str, ...]
    key: str
    parameter: nn.Parameter
    layout: Layout
    bits: Bits

    @property
    def count(self) -> int:
        """Return the number of weights."""
        return self.parameter.numel()

    def matrices(self) -> Tensor:
        """Return the coefficients as float64 (groups, rows, columns), on the CPU."""
        values = self.parameter.detach().to("cpu", torch.float64).numpy()
        return torch.from_numpy(np.ascontiguousarray(self.layout.to_matrices(values)))

    @torch.no_grad()
    def write(self, quantised: Quantised) -> None:
        """Set the coefficients to coded values, rounded to the dtype of the parameter."""
        values = torch.from_numpy(self.layout.from_matrices(quantised.values()))
        self.parameter.copy_(values.to(self.parameter.dtype))

    def entry(self, quantised: Quantised) -> Entry:
        """Return the entry of the tensor in the codec table of a file.

        Raises:
            ValueError: an integer or a step is out of range.
        """
        return quantised_entry(quantised, self.layout, self.parameter.dtype)

    def adopted(self, entry: Entry) -> Entry:
        """Return the entry for this weight of another tensor that holds the same integers, in another arrangement."""
        assert entry.stream is not None
        return self.entry(unpack(entry.stream.numpy().tobytes(), layout_of(entry)))

    @torch.no_grad()
    def restore(self, entry: Entry) -> Entry:
        """Set the coefficients to the values of an entry; return the entry for the dtype of the parameter."""
        own = replace(entry, dtype=self.parameter.dtype)
        assert entry.stream is not None
        self.parameter.copy_(QUANTISED.decode(entry.stream, own))
        return own


def coded_weights(model: nn.Module, plan: Plan) -> tuple[CodedWeight, ...]:
    """Return the weights of a converted network that the plan codes, in the order of the network.

    Weights that are not floating-point parameters in the network's state cannot be coded and are left out.
    """
    keys: dict[int, str] = {}
    for key, tensor in tensors_of(model, keep_vars=True).items():
        keys.setdefault(id(tensor), key)
    layers, planned = all_layers(model), cast("Mapping[str, Bits]", plan.on("precision"))
    weights: dict[int, CodedWeight] = {}
    for name, bits in planned.items():
        layer = layers[name]
        for stored in stored_names(layer):
            parameter = layer._parameters.get(stored)
            if parameter is None or id(parameter) not in keys or not parameter.is_floating_point():
                continue
            before = weights.get(id(parameter))
            if before is not None:
                weights[id(parameter)] = replace(before, names=(*before.names, name))
                continue
            key = keys[id(parameter)]
            weights[id(parameter)] = CodedWeight((name,), key, parameter, _layout(layer, parameter), bits)
    return tuple(weights.values())


def _layout(layer: nn.Module, parameter: nn.Parameter) -> Layout:
    # The matrices of a low rank have outputs before inputs, also those of a transposed convolution.
    return Layout(tuple(parameter.shape), groups_of(layer), is_transposed(layer) and not is_ranked(layer))


def with_coded_bits(plan: Plan, weights: tuple[CodedWeight, ...], entries: Mapping[str, Entry]) -> Plan:
    """Return the plan with the bits that the coded weights have; weights without an entry lose this axis."""
    sizes: dict[str, tuple[int, int]] = {}
    for weight in weights:
        for name in weight.names if weight.key in entries else ():
            size, count = sizes.get(name, (0, 0))
            sizes[name] = size + stored_bytes(weight.parameter, entries[weight.key]), count + weight.count
    actual = {name: Bits(round(8 * size / count, 4)) for name, (size, count) in sizes.items()}
    return _with_bits(plan, actual)


def _with_bits(plan: Plan, bits: Mapping[str, Bits]) -> Plan:
    def changed(layer: LayerPlan) -> LayerPlan:
        others = tuple(kept for kept in layer.keeps if kept.axis != Bits.axis)
        own = (bits[layer.name],) if layer.name in bits else ()
        return replace(layer, keeps=(*others, *own))

    return replace(plan, layers=tuple(layer for layer in map(changed, plan.layers) if layer.keeps))
