"""Compute the cost of layers and networks before conversion: parameters, bytes, and multiply-adds of each form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs.codec import Entry
from ..codecs.packed import entry_in_file
from ..codecs.plain import stored_bytes
from ..layers.factored import FACTORABLE
from ..layers.low_rank import SPLITTABLE
from ..layers.ranked import channels_of
from ..network.layers import all_layers, convolutions, kernel_size, matrix_names, weights_of
from ..network.other_convolutions import other_convolutions
from ..network.running import evaluating
from ..network.state import tensors_of
from ..network.tracing import Trace
from .axes import AXES, LayerCost, WeightShape
from .plan import Plan

_BASIS_ITEM_BYTES = stored_bytes(torch.empty(1, dtype=torch.float64))


@dataclass(frozen=True)
class Cost:
    """The cost of a network before and after a plan.

    Tied parameters count once. Fitted bases count as parameters. MACs are per example and None without a trace.
    ``over_1x1_*``: the part of convolutions with kernels larger than 1x1, including classes that cannot be converted;
    the space axis can reduce only this part. The harmonic form needs the MACs of the dense form, plus ``merge_macs``
    once per forward for any batch size.
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
        """Return the share of the parameters in convolutions with kernels larger than 1x1."""
        return self.over_1x1_parameters / max(self.parameters, 1)

    @property
    def mac_share(self) -> float | None:
        """Return the share of the MACs in convolutions with kernels larger than 1x1; None without a trace."""
        return None if self.over_1x1_macs is None else self.over_1x1_macs / max(self.dense_macs or 0, 1)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters. Tied ones count once; those of lazy layers have no size yet and do not count."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def tensor_bytes(model: nn.Module, coded: Mapping[str, Entry] | None = None) -> int:
    """Return the bytes that all parameters and persistent buffers need in a file; shared ones count once.

    ``coded``: entries of the tensors that the file stores encoded.
    """
    entries = coded or {}
    tensors = tensors_of(model, keep_vars=True)
    unique = {id(tensor): (key, tensor) for key, tensor in reversed(tensors.items()) if not is_lazy(tensor)}
    return sum(stored_bytes(tensor, entry_in_file(key, tensor, entries)) for key, tensor in unique.values())


def layer_costs(model: nn.Module, plan: Plan, trace: Trace | None = None) -> dict[str, LayerCost]:
    """Return the cost of every planned layer of the original ``model``, by name."""
    layers = all_layers(model)
    costs = {}
    for planned in plan.layers:
        layer = layers[planned.name]
        weights, other = weights_of(layer), bool(matrix_names(layer))
        count, size = sum(weight.numel() for weight in weights), sum(map(stored_bytes, weights))
        run = trace.layers.get(planned.name) if trace else None
        macs = None if trace is None or other else run.macs // trace.batch if run else 0
        positions = None if macs is None else macs // max(count, 1)
        inputs = 0 if other else channels_of(layer)[0]
        stride = prod(cast("tuple[int, ...]", getattr(layer, "stride", ())))
        shape = WeightShape(
            count, planned.kernel_size, inputs, positions, type(layer) in FACTORABLE, stride, type(layer) in SPLITTABLE,
        )  # fmt: skip
        cost = LayerCost(count, count, size, size, macs=macs, factored_macs=macs)
        for kept in planned.keeps:
            cost = AXES[kept.axis].cost(shape, kept, cost)
        costs[planned.name] = cost
    return costs


def network_cost(model: nn.Module, plan: Plan, trace: Trace | None = None) -> Cost:
    """Return the cost of the original ``model`` before and after ``plan``."""
    layers = layer_costs(model, plan, trace)
    modules, larger = all_layers(model), _over_1x1(model)
    # A tied weight counts once, and so do its coefficients: its id is the key, so the last layer's entry remains.
    saved = {
        tuple(map(id, weights_of(modules[name]))): (
            cost.parameters - cost.kept_parameters,
            cost.bytes - cost.kept_bytes,
        )
        for name, cost in layers.items()
    }
    # A basis that is fitted to a layer is stored with its coefficients, in float64.
    constants = sum(cost.constants for cost in layers.values())
    with evaluating(model):  # in training mode, reading a weight with spectral norm would change the network
        over_1x1 = {
            id(c._parameters.get("weight", c)): cast(Tensor, c.weight).numel()
            for c in larger.values()
            if not any(is_lazy(p) for p in c.parameters(recurse=False))
        }
        others = other_convolutions(model, trace.findings.others if trace else None)
        over_1x1 |= {id(kernel): kernel.numel() for other in others.values() for kernel in other.kernels}
    parameters, size = parameter_count(model), tensor_bytes(model)
    macs = {}
    if trace:
        total = trace.macs // trace.batch
        change = sum((c.factored_macs or 0) - (c.macs or 0) for c in layers.values())
        over_1x1_macs = sum(run.macs for name, run in trace.layers.items() if name in larger)
        over_1x1_macs = (over_1x1_macs + sum(run.macs for run in trace.findings.others.values())) // trace.batch
        macs = {"dense_macs": total, "factored_macs": total + change, "over_1x1_macs": over_1x1_macs}
    return Cost(
        parameters=parameters,
        harmonic_parameters=parameters - sum(count for count, _ in saved.values()) + constants,
        over_1x1_parameters=sum(over_1x1.values()),
        bytes=size,
        harmonic_bytes=size - sum(bytes_saved for _, bytes_saved in saved.values()) + _BASIS_ITEM_BYTES * constants,
        merge_macs=sum(cost.merge_macs for cost in layers.values()),
        **macs,
    )


def _over_1x1(model: nn.Module) -> dict[str, nn.Module]:
    return {name: conv for name, conv in convolutions(model).items() if prod(kernel_size(conv)) > 1}
