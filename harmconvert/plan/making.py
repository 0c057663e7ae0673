"""make_plan(): what each layer keeps under policies, or a given plan checked against the network.

A plan is made from facts about the layers (`LayerInfo`), not from the network itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import UsageError
from ..kernels.basis import Basis
from ..network.layers import LayerInfo
from .axes import AXES
from .plan import LayerPlan, Plan, Skip
from .space.policies import Lambda, no_match


def make_plan(
    layers: Sequence[LayerInfo],
    lam: str | int | Mapping[str, int] | Plan = "full",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: Basis | None = None,
) -> Plan:
    """Turn a lambda policy into a plan.

    Args:
        layers: the network's layers. ``progressive`` needs their output sizes.
        lam: ``"full"``; an integer, meant for 3x3 and scaled with the kernel; ``"progressive"``; a dict from
            shell-style pattern to literal levels (a layer that no pattern matches stays whole); or a Plan to follow.
        include: patterns; where given, only layers that match one are converted, and they count as named: the policy
            cuts them even where it would leave them whole (input layer, depthwise layers).
        exclude: patterns of layers to leave as they are.
        basis: the basis of the kernels; the DCT where None. A Plan to follow has its own.

    Raises:
        UsageError: an unknown lambda, a pattern that matches nothing, more levels than a kernel has, or a plan that
            does not fit the network.
    """
    every, layers = layers, plannable(layers)
    names = [layer.name for layer in layers]
    for pattern in (*include, *exclude):
        if not fnmatch.filter(names, pattern):
            raise UsageError(no_match(pattern, names))
    named = {name for pattern in include for name in fnmatch.filter(names, pattern)}
    chosen, skipped = [], []
    for layer in layers:
        if reason := _reason_to_skip(layer, include, exclude):
            skipped.append(Skip(layer.name, layer.kind, layer.kernel_size, reason))
        else:
            chosen.append(layer)
    chosen, skipped = _skip_torn_ties(chosen, skipped, layers)
    if isinstance(lam, Plan):
        if basis is not None and (other := _other_basis(lam, basis)):
            raise UsageError(f"the plan is of the basis {other}, not {basis}: leave out one of the two")
        cannot = {layer.tied_to or layer.name for layer in layers if layer.skip}
        others = [layer for layer in every if layer not in layers]
        return _follow(lam, [*chosen, *others], skipped, {s.name for s in layers if (s.tied_to or s.name) in cannot})
    notes: dict[str, str] = {}
    settings: dict[str, Any] = {"space": Lambda(lam, basis or Basis())}
    keeps = {axis.name: axis.plan(chosen, settings.get(axis.name), named, notes) for axis in AXES.values()}
    planned = [
        LayerPlan(layer.name, layer.kernel_size, own)
        for layer in chosen
        if (own := tuple(kept[layer.name] for kept in keeps.values() if layer.name in kept))
    ]
    return Plan(tuple(_same_for_ties(planned, chosen)), tuple(skipped), str(settings["space"]), notes)


def plannable(layers: Sequence[LayerInfo]) -> list[LayerInfo]:
    """The layers for which there is something to choose on any axis."""
    return [layer for layer in layers if any(axis.applies(layer) for axis in AXES.values())]


def _other_basis(plan: Plan, basis: Basis) -> Basis | None:
    """A basis of the plan's that is not ``basis``, where the user asked for one that is not the default."""
    own = {kept.basis for kept in plan.on("space").values()}
    return next(iter(own - {basis}), None) if basis != Basis() else None


def _reason_to_skip(layer: LayerInfo, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if layer.skip:
        return layer.skip
    for pattern in exclude:
        if fnmatch.fnmatchcase(layer.name, pattern):
            return f"excluded by {pattern}"
    if include and not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in include):
        return "not among those to include"
    return None


def _skip_torn_ties(
    chosen: Sequence[LayerInfo], skipped: Sequence[Skip], layers: Sequence[LayerInfo]
) -> tuple[list[LayerInfo], list[Skip]]:
    """Layers that share a weight are converted together or not at all."""
    tie = {layer.name: layer.tied_to or layer.name for layer in layers}
    torn = {tie[skip.name]: skip.name for skip in skipped}
    kept = [layer for layer in chosen if tie[layer.name] not in torn]
    left = [
        Skip(layer.name, layer.kind, layer.kernel_size, f"its weight is tied to {torn[tie[layer.name]]}, "
             "which is skipped")
        for layer in chosen
        if tie[layer.name] in torn
    ]  # fmt: skip
    return kept, [*skipped, *left]


def _same_for_ties(planned: Sequence[LayerPlan], layers: Sequence[LayerInfo]) -> list[LayerPlan]:
    """Layers that share a weight keep together what any of them keeps."""
    tie = {layer.name: layer.tied_to or layer.name for layer in layers}
    members: dict[str, list[LayerPlan]] = {}
    for layer in planned:
        members.setdefault(tie[layer.name], []).append(layer)
    shared = {}
    for first, together in members.items():
        axes = [axis for name, axis in AXES.items() if all(layer.on(name) for layer in together)]
        shared[first] = [axis.shared([kept for p in together if (kept := p.on(axis.name))]) for axis in axes]
    return [layer.keeping(*shared[tie[layer.name]]) for layer in planned]


def _follow(plan: Plan, layers: Sequence[LayerInfo], skipped: Sequence[Skip], cannot: set[str]) -> Plan:
    """A given plan, checked against the network; it loses the layers that are skipped, if they could be converted."""
    out = {skip.name: skip.why for skip in skipped}
    for layer in plan.layers:
        if layer.name in out and layer.name in cannot:
            raise UsageError(f"the plan does not fit this network: layer {layer.name} is skipped ({out[layer.name]})")
    notes = {name: why for name, why in plan.notes.items() if name not in out}
    plan = replace(plan, layers=tuple(layer for layer in plan.layers if layer.name not in out), notes=notes)
    known = {layer.name: layer for layer in layers}
    for layer in plan.layers:
        if (info := known.get(layer.name)) is None:
            raise UsageError(f"the plan does not fit this network: {no_match(layer.name, list(known))}")
        if layer.kernel_size != info.kernel_size:
            raise UsageError(
                f"the plan does not fit this network: layer {layer.name} has kernel {info.kernel_size}, "
                f"the plan says {layer.kernel_size}"
            )
    if _same_for_ties(plan.layers, layers) != list(plan.layers):
        raise UsageError("the plan does not fit this network: layers that share a weight keep different things")
    left = known.keys() - {layer.name for layer in plan.layers}
    skips = [
        Skip(layer.name, layer.kind, layer.kernel_size, "not in the plan")
        for layer in layers
        if layer.name in left and layer in plannable(layers)
    ]
    return replace(plan, skipped=(*skipped, *skips))
