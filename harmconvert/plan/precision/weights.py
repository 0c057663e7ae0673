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
from ...codecs.quantised import QUANTISED, quantised_entry
from ...network.layers import parameter_of, weighted_layers
from ...network.state import tensors_of
from ..plan import LayerPlan, Plan
from .bits import Bits


@dataclass(frozen=True)
class CodedWeight:
    """The weight of one layer, or of several tied layers, that is coded.

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
    layers, planned = weighted_layers(model), cast("Mapping[str, Bits]", plan.on("precision"))
    names: dict[int, list[str]] = {}
    for name in planned:
        parameter = parameter_of(layers[name])
        if isinstance(parameter, nn.Parameter) and id(parameter) in keys and parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(name)
    return tuple(
        CodedWeight(tuple(tied), keys[which], parameter_of(layers[tied[0]]), _layout(layers[tied[0]]), planned[tied[0]])
        for which, tied in names.items()
    )


def _layout(layer: nn.Module) -> Layout:
    shape = tuple(parameter_of(layer).shape)
    return Layout(shape, cast(int, getattr(layer, "groups", 1)), bool(getattr(layer, "transposed", False)))


def with_coded_bits(plan: Plan, weights: tuple[CodedWeight, ...], entries: Mapping[str, Entry]) -> Plan:
    """Return the plan with the bits that the coded weights have; weights without an entry lose this axis."""
    actual = {
        name: Bits(round(8 * stored_bytes(weight.parameter, entries[weight.key]) / weight.count, 4))
        for weight in weights
        if weight.key in entries
        for name in weight.names
    }

    return _with_bits(plan, actual)


def without_bits(plan: Plan) -> Plan:
    """Return the plan without this axis; layers that have no other axis are left out."""
    return _with_bits(plan, {})


def _with_bits(plan: Plan, bits: Mapping[str, Bits]) -> Plan:
    def changed(layer: LayerPlan) -> LayerPlan:
        others = tuple(kept for kept in layer.keeps if kept.axis != Bits.axis)
        own = (bits[layer.name],) if layer.name in bits else ()
        return replace(layer, keeps=(*others, *own))

    return replace(plan, layers=tuple(layer for layer in map(changed, plan.layers) if layer.keeps))
