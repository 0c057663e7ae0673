"""What layers and networks cost: parameters, bytes and multiply-adds of each form, before anything is converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs.codec import Entry
from ..codecs.plain import stored_bytes
from ..layers.factored import FACTORABLE
from ..network.layers import convolutions, kernel_size, weighted_layers
from ..network.other_convolutions import other_convolutions
from ..network.running import evaluating
from ..network.state import tensors_of
from ..network.tracing import Trace
from .axes import AXES, LayerCost, WeightShape
from .plan import Plan

_BASIS_ITEM_BYTES = stored_bytes(torch.empty(1, dtype=torch.float64))


@dataclass(frozen=True)
class Cost:
    """A network before and after a plan. Parameters: tied ones once, fitted bases with them. MACs: per example, None
    without a trace.

    ``over_1x1_*`` is what convolutions over 1x1 hold, those of classes that are not converted included; a plan can
    touch nothing else. The harmonic form costs the dense form's MACs plus ``merge_macs``, once per forward whatever the
    batch.
    """

    parameters: int
    harmonic_parameters: int
    over_1x1_parameters: int
    bytes: int
    harmonic_bytes: int
    merge_macs: int
    dense_macs: int | None = None
    factored_macs: int | None = None
    over_1x1_macs: int | None = None

    @property
    def parameter_share(self) -> float:
        """Share of the parameters in convolutions over 1x1."""
        return self.over_1x1_parameters / max(self.parameters, 1)

    @property
    def mac_share(self) -> float | None:
        """Share of the MACs in convolutions over 1x1, or None without a trace."""
        return None if self.over_1x1_macs is None else self.over_1x1_macs / max(self.dense_macs or 0, 1)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, tied ones once; those of lazy layers, which have no size yet, are not counted."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def tensor_bytes(model: nn.Module, coded: Mapping[str, Entry] | None = None) -> int:
    """Bytes of all parameters and persistent buffers as a file holds them, shared ones once.

    ``coded`` has an entry for each tensor that the file does not hold as it is.
    """
    entries = coded or {}
    tensors = tensors_of(model, keep_vars=True)
    unique = {id(tensor): (tensor, entries.get(key)) for key, tensor in reversed(tensors.items())}
    return sum(stored_bytes(tensor, entry) for tensor, entry in unique.values() if not is_lazy(tensor))


def layer_costs(model: nn.Module, plan: Plan, trace: Trace | None = None) -> dict[str, LayerCost]:
    """Cost of every planned layer of the original ``model``, by name."""
    layers = weighted_layers(model)
    costs = {}
    for planned in plan.layers:
        layer = layers[planned.name]
        weight = cast(Tensor, layer.weight)
        run = trace.layers.get(planned.name) if trace else None
        macs = None if trace is None else run.macs // trace.batch if run else 0
        positions = None if macs is None else macs // max(weight.numel(), 1)
        inputs = cast(int, getattr(layer, "in_channels", 0) or getattr(layer, "in_features", 0))
        shape = WeightShape(weight.numel(), planned.kernel_size, inputs, positions, type(layer) in FACTORABLE)
        size = stored_bytes(weight)
        cost = LayerCost(weight.numel(), weight.numel(), size, size, macs=macs, factored_macs=macs)
        for kept in planned.keeps:
            cost = AXES[kept.axis].cost(shape, kept, cost)
        costs[planned.name] = cost
    return costs


def network_cost(model: nn.Module, plan: Plan, trace: Trace | None = None) -> Cost:
    """Cost of the original ``model`` before and after ``plan``."""
    layers = layer_costs(model, plan, trace)
    weighted = weighted_layers(model)
    # A tied weight counts once, as its coefficients do: by identity, the last one standing for all.
    saved = {
        id(weighted[name].weight): (cost.parameters - cost.kept_parameters, cost.bytes - cost.kept_bytes)
        for name, cost in layers.items()
    }
    # A basis that is fitted to a layer has to be kept beside its coefficients, in float64.
    constants = sum(cost.constants for cost in layers.values())
    with evaluating(model):  # reading a spectrally normalised weight in training mode would change the network
        over_1x1 = {
            id(c._parameters.get("weight", c)): cast(Tensor, c.weight).numel()
            for c in _over_1x1(model).values()
            if not any(is_lazy(p) for p in c.parameters(recurse=False))
        }
        others = other_convolutions(model, trace.findings.others if trace else None)
        over_1x1 |= {id(kernel): kernel.numel() for other in others.values() for kernel in other.kernels}
    parameters, size = parameter_count(model), tensor_bytes(model)
    macs = {}
    if trace:
        total = trace.macs // trace.batch
        change = sum((c.factored_macs or 0) - (c.macs or 0) for c in layers.values())
        reach = sum(run.macs for name, run in trace.layers.items() if name in _over_1x1(model))
        reach = (reach + sum(run.macs for run in trace.findings.others.values())) // trace.batch
        macs = {"dense_macs": total, "factored_macs": total + change, "over_1x1_macs": reach}
    return Cost(
        parameters=parameters,
        harmonic_parameters=parameters - sum(count for count, _ in saved.values()) + constants,
        over_1x1_parameters=sum(over_1x1.values()),
        bytes=size,
        harmonic_bytes=size - sum(written for _, written in saved.values()) + _BASIS_ITEM_BYTES * constants,
        merge_macs=sum(cost.merge_macs for cost in layers.values()),
        **macs,
    )


def _over_1x1(model: nn.Module) -> dict[str, nn.Module]:
    return {name: conv for name, conv in convolutions(model).items() if prod(kernel_size(conv)) > 1}
