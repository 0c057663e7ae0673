"""Apply a plan to a network, and read the plan of a converted network."""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from ..network.exchange import exchange
from ..network.layers import kernel_size, matrix_names, weighted_layers
from .axes import AXES, kept_by
from .plan import LayerPlan, Plan


def apply_plan(model: nn.Module, plan: Plan, *, values: bool = True) -> nn.Module:
    """Return a copy of ``model`` whose layers keep what the plan says. The axes are applied one after the other.

    >>> from harmconvert.plan import Plan, cut_layer
    >>> apply_plan(nn.Sequential(nn.Conv2d(1, 2, 3)), Plan((cut_layer("0", (3, 3), ((0, 0),)),)))
    Sequential(
      (0): HarmonicConv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), frequencies=1/9)
    )

    Args:
        values: if False, the values of converted layers are not computed, because they will be loaded.

    Raises:
        InputError: the network cannot be copied.
    """
    converted = None
    for name, axis in AXES.items():
        if kept := plan.on(name):
            converted = axis.convert(model if converted is None else converted, kept, values)
    return exchange(model, {}) if converted is None else converted


def fits(planned: LayerPlan, layer: nn.Module) -> bool:
    """Return whether a layer has the kernel size of a layer of a plan and, if it has several matrices, its axes."""
    axes = (AXES[kept.axis] for kept in planned.keeps)
    return kernel_size(layer) == planned.kernel_size and (
        not matrix_names(layer) or all(axis.matrices for axis in axes)
    )


def plan_of_model(model: nn.Module, known: Plan | None = None) -> Plan:
    """Return the plan of a converted network, read from its layers.

    Args:
        known: a plan that may have more information, such as a policy. It is returned if it agrees with the layers.

    Raises:
        UsageError: no layer of the network is converted, and ``known`` does not say that it is coded.
    """
    layers = []
    for name, module in weighted_layers(model).items():
        if keeps := kept_by(module):
            layers.append(LayerPlan(name, kernel_size(module), keeps))
    if known is not None and known.layers and _readable(known) == {layer.name: layer for layer in layers}:
        return known
    if not layers:
        raise UsageError(f"this {type(model).__name__} has no harmonic convolution: convert it first")
    return Plan(tuple(layers))


def _readable(plan: Plan) -> dict[str, LayerPlan]:
    """Return the layers of a plan, each with only those axes that can be read from a converted layer."""
    layers = [
        LayerPlan(layer.name, layer.kernel_size, tuple(kept for kept in layer.keeps if AXES[kept.axis].readable))
        for layer in plan.layers
    ]
    return {layer.name: layer for layer in layers if layer.keeps}
