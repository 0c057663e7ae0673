"""Apply a plan to a network, and read the plan that a converted network follows."""

from __future__ import annotations

from torch import nn

from ..errors import UsageError
from ..network.exchange import exchange
from ..network.layers import kernel_size, weighted_layers
from .axes import AXES, kept_by
from .plan import LayerPlan, Plan


def apply_plan(model: nn.Module, plan: Plan, *, values: bool = True) -> nn.Module:
    """A copy of a network whose layers keep what a plan says, one axis after the other; ``model`` is not changed.

    >>> from harmconvert.plan import Plan, cut_layer
    >>> apply_plan(nn.Sequential(nn.Conv2d(1, 2, 3)), Plan((cut_layer("0", (3, 3), ((0, 0),)),)))
    Sequential(
      (0): HarmonicConv2d(1, 2, kernel_size=(3, 3), stride=(1, 1), frequencies=1/9)
    )

    Args:
        values: False leaves the values of converted layers to be loaded.

    Raises:
        InputError: the network cannot be copied.
    """
    converted = None
    for name, axis in AXES.items():
        if kept := plan.on(name):
            converted = axis.convert(model if converted is None else converted, kept, values)
    return exchange(model, {}) if converted is None else converted


def plan_of_model(model: nn.Module, known: Plan | None = None) -> Plan:
    """The plan that a converted network follows: ``known`` where its layers say the same, else what they say.

    Raises:
        UsageError: no layer of the network says what it keeps.
    """
    layers = []
    for name, module in weighted_layers(model).items():
        if keeps := kept_by(module):
            layers.append(LayerPlan(name, kernel_size(module), keeps))
    if not layers:
        raise UsageError(f"this {type(model).__name__} has no harmonic convolution: convert it first")
    if known is not None and _readable(known) == {layer.name: layer for layer in layers}:
        return known
    return Plan(tuple(layers))


def _readable(plan: Plan) -> dict[str, LayerPlan]:
    """The layers of a plan, each with what its module can say of it."""
    layers = [
        LayerPlan(layer.name, layer.kernel_size, tuple(kept for kept in layer.keeps if AXES[kept.axis].readable))
        for layer in plan.layers
    ]
    return {layer.name: layer for layer in layers if layer.keeps}
