"""The choices of a search: what each layer may keep on the axes that save the budget's unit, and what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from ..kernels.basis import Basis
from ..network.layers import LayerInfo
from ..network.tracing import Trace
from ..plan import AXES, Kept, LayerPlan, Plan, RankSetting, make_plan, network_cost

Choice = tuple[Kept, ...]
# The shares of the parameters with which choices of two axes are combined.
_COMBINED = (0.6, 0.35)


@dataclass(frozen=True)
class Item:
    """Layers that share one weight, and what they may keep; the first choice keeps everything."""

    names: tuple[str, ...]
    choices: tuple[Choice, ...]


def whole_plan(
    layers: Sequence[LayerInfo],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: Basis | None = None,
    axes: Collection[str] = ("space",),
) -> Plan:
    """Return the plan that cuts nothing, with a note for each layer that the search must leave whole.

    These are the layers that a policy leaves whole, except depthwise layers: the search scores cuts of those.

    Args:
        axes: names of the axes on which the search chooses.
    """
    never_cut = {layer.name for layer in layers if layer.reads_input or layer.fixed}
    ranks = RankSetting(whole=True) if "channels" in axes else None
    notes = make_plan(layers, 1, include, exclude, basis, rank=RankSetting(1) if ranks else None).notes
    whole = make_plan(layers, "full", include, exclude, basis, rank=ranks)
    return replace(whole, notes={name: why for name, why in notes.items() if name in never_cut})


def items_of(
    whole: Plan, ties: Mapping[str, str], unit: str = "params", axes: Collection[str] | None = None
) -> tuple[Item, ...]:
    """Return an item for each layer that may be cut; `Plan.notes` names the layers that stay whole.

    Args:
        ties: for each layer that shares its weight, the name of the first layer with that weight.
        unit: unit of the budget; an axis that cannot save it offers no choice.
        axes: names of the axes that offer choices; None: all.
    """
    members: dict[str, list[LayerPlan]] = {}
    for layer in whole.layers:
        members.setdefault(ties.get(layer.name, layer.name), []).append(layer)
    items = (
        Item(tuple(layer.name for layer in together), _choices(together[0], unit, axes))
        for together in members.values()
        if not any(layer.name in whole.notes for layer in together)
    )
    return tuple(item for item in items if len(item.choices[0]))


def _choices(whole: LayerPlan, unit: str, axes: Collection[str] | None) -> tuple[Choice, ...]:
    """Return combinations of the choices of all axes; the first one keeps everything.

    Each choice is probed on the network. So choices whose share of the parameters is known are combined with others
    only if their share is nearest to one of `_COMBINED`.
    """
    offered = [
        AXES[kept.axis].choices(kept)
        if unit in AXES[kept.axis].budget_units and (axes is None or kept.axis in axes)
        else (kept,)
        for kept in whole.keeps
    ]
    combined = {
        id(min(known, key=lambda kept: abs(cast(float, kept.share) - share)))
        for own in offered
        for share in _COMBINED
        if (known := [kept for kept in own if kept.share is not None and not kept.whole])
    }
    return tuple(choice for choice in itertools.product(*offered) if _sensible(choice, combined))


def _sensible(choice: Choice, combined: Collection[int]) -> bool:
    """Return whether a combination is allowed, and is one of those that are tried."""
    cut = [kept for kept in choice if not kept.whole]
    tried = len(cut) < 2 or all(kept.share is None or id(kept) in combined for kept in cut)
    return tried and all(AXES[k.axis].allows(k, [other for other in choice if other is not k]) for k in cut)


def plan_of(whole: Plan, items: Sequence[Item], chosen: Sequence[int], policy: str) -> Plan:
    """Return the plan with the chosen choice of each item; all other layers stay whole."""
    kept = {name: item.choices[choice] for item, choice in zip(items, chosen, strict=True) for name in item.names}
    return replace(
        without_unused_axes(whole.map_layers(lambda layer: layer.keeping(*kept.get(layer.name, ())))), policy=policy
    )


def without_unused_axes(plan: Plan) -> Plan:
    """Return the plan without the axes that need a setting and on which a layer keeps everything."""
    layers = (
        replace(layer, keeps=tuple(k for k in layer.keeps if not (k.whole and AXES[k.axis].needs_setting)))
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layer for layer in layers if layer.keeps))


def costs_of(
    model: nn.Module, whole: Plan, items: Sequence[Item], unit: str, trace: Trace | None
) -> tuple[int, list[list[int]]]:
    """Return the cost of the whole plan, in ``unit``, and by how much each choice of each item changes it.

    The first choice of an item keeps everything, so its change is 0. The changes of several items add up, because the
    cost of a network is a sum over its layers.
    """
    total = cost_in(model, whole, unit, trace)
    changes = []
    for index, item in enumerate(items):
        row = []
        for choice in range(len(item.choices)):
            chosen = [choice if other == index else 0 for other in range(len(items))]
            row.append(cost_in(model, plan_of(whole, items, chosen, ""), unit, trace) - total)
        changes.append(row)
    return total, changes


def cost_in(model: nn.Module, plan: Plan, unit: str, trace: Trace | None) -> int:
    """Return the cost of the network under a plan: parameters, bytes, or MACs of the factored form."""
    cost = network_cost(model, plan, trace if unit == "macs" else None)
    return {"params": cost.harmonic_parameters, "bytes": cost.harmonic_bytes, "macs": cost.factored_macs or 0}[unit]
