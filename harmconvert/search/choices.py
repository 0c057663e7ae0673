"""What there is to choose: how many frequencies each layer may keep, and what each choice costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..errors import InputError
from ..kernels.basis import Basis, Frequency, all_frequencies, frequencies_below, level_count, scaled_levels
from ..network.layers import ConvSite
from ..network.tracing import Trace
from ..plan.cost import network_cost
from ..plan.plan import LayerPlan, Plan, make_plan

# With fewer levels than these there is little to choose: then halves of a lambda count, too.
FEW = 5
# Sizes of the sets chosen frequency by frequency: each is a probe, and large kernels have dozens.
MOST = 12


@dataclass(frozen=True)
class Item:
    """Layers that share their coefficients, and so one choice: the sets of frequencies, whole first, none larger than
    the one before."""

    names: tuple[str, ...]
    kernel_size: tuple[int, ...]
    sets: tuple[tuple[Frequency, ...], ...]


def whole_plan(
    sites: Sequence[ConvSite], include: Sequence[str] = (), exclude: Sequence[str] = (), family: Basis | None = None
) -> Plan:
    """The plan that cuts nothing, with notes on the layers that no search cuts: what a policy spares, but for depthwise
    layers, of which scores tell what cutting them costs (DESIGN 3)."""
    spared = make_plan(sites, 1, include, exclude, family)
    layers = (replace(layer, frequencies=all_frequencies(layer.kernel_size)) for layer in spared.layers)
    spared_by_search = {site.name for site in sites if site.reads_input or site.fixed}
    notes = {name: why for name, why in spared.notes.items() if name in spared_by_search}
    return replace(spared, layers=tuple(layers), notes=notes)


def items_of(whole: Plan, ties: Mapping[str, str]) -> tuple[Item, ...]:
    """An item for each convolution of a plan that may be cut (`Plan.notes` names those that stay whole).

    ``ties``: of layers whose coefficients are shared, the name of the first.
    """
    members: dict[str, list[LayerPlan]] = {}
    for layer in whole.layers:
        members.setdefault(ties.get(layer.name, layer.name), []).append(layer)
    spared = set(whole.notes)
    return tuple(
        Item(tuple(layer.name for layer in layers), layers[0].kernel_size, _sets(layers[0].kernel_size))
        for layers in members.values()
        if not any(layer.name in spared for layer in layers)
    )


def with_order(item: Item, order: Sequence[Frequency]) -> Item:
    """An item with more to choose from: of every size (of a large kernel, of some) what is left once the first of
    ``order`` are cut, beside the lambdas.

    Raises:
        InputError: the order, which may come from a file, is not one of all of its frequencies.
    """
    if sorted(order) != sorted(item.sets[0]):
        raise InputError(f"the order of the frequencies of {item.names[0]} lacks some or has others: remove --probes")
    count = len(order)
    sizes = {round(1 + (count - 1) * step / (MOST - 1)) for step in range(MOST)} if count > MOST else range(1, count)
    chain = [tuple(sorted(order[count - size :], key=item.sets[0].index)) for size in sizes]
    sets = sorted(dict.fromkeys([*item.sets, *chain]), key=len, reverse=True)
    return replace(item, sets=tuple(sets))


def plan_of(whole: Plan, items: Sequence[Item], chosen: Sequence[int], policy: str) -> Plan:
    """The plan that keeps what was chosen of every item, and all of the rest."""
    kept = {name: item.sets[choice] for item, choice in zip(items, chosen, strict=True) for name in item.names}
    layers = [replace(layer, frequencies=kept.get(layer.name, layer.frequencies)) for layer in whole.layers]
    return replace(whole, layers=tuple(layers), policy=policy)


def costs_of(
    model: nn.Module, whole: Plan, items: Sequence[Item], unit: str, trace: Trace | None
) -> tuple[int, list[list[int]]]:
    """What the whole plan costs in ``unit``, and by how much each choice of each item changes the total, from 0 for the
    whole; the costs of layers add up, because each is a sum over its own."""
    total = cost_in(model, whole, unit, trace)
    changes = []
    for index, item in enumerate(items):
        row = []
        for choice in range(len(item.sets)):
            chosen = [choice if other == index else 0 for other in range(len(items))]
            row.append(cost_in(model, plan_of(whole, items, chosen, ""), unit, trace) - total)
        changes.append(row)
    return total, changes


def cost_in(model: nn.Module, plan: Plan, unit: str, trace: Trace | None) -> int:
    """Parameters, bytes, or MACs of the factored form, of the whole network under a plan."""
    cost = network_cost(model, plan, trace if unit == "macs" else None)
    return {"params": cost.harmonic_parameters, "bytes": cost.harmonic_bytes, "macs": cost.factored_macs or 0}[unit]


def _sets(kernel_size: tuple[int, ...]) -> tuple[tuple[Frequency, ...], ...]:
    """What the lambdas 1 to 5, scaled with the kernel, keep of it, so that every uniform plan is among the choices; the
    zero frequency alone; and all."""
    whole = level_count(kernel_size)
    levels = {1, whole, *(scaled_levels(kernel_size, lam) for lam in range(1, 6))}
    if len(levels) < FEW:
        levels |= {min(math.ceil(halves * max(kernel_size) / 6), whole) for halves in range(1, 6)}
    return tuple(frequencies_below(kernel_size, count) for count in sorted(levels, reverse=True))
