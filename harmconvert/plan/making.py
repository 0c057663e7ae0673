"""Make a plan by a policy, or check an existing plan against the network.

A plan is made from facts about the layers (`LayerInfo`), not from the network itself.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ..errors import UsageError
from ..kernels.basis import Basis
from ..network.layers import LayerInfo
from .axes import AXES, has_axis
from .channels.ranks import RankSetting
from .plan import LayerPlan, Plan, Skip
from .precision.bits import BitsSetting
from .space.policies import Lambda, no_match


def make_plan(
    layers: Sequence[LayerInfo],
    lam: str | int | Mapping[str, int] | Plan = "full",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: Basis | None = None,
    bits: BitsSetting | None = None,
    rank: RankSetting | None = None,
) -> Plan:
    """Make a plan by a lambda policy.

    Args:
        layers: the network's layers. ``progressive`` needs their output sizes.
        lam: ``"full"``; an integer, meant for 3x3 and scaled with the kernel; ``"progressive"``; a dict from
            shell-style pattern to literal levels (a layer that no pattern matches stays whole); or a Plan to follow.
        include: patterns. If given, only layers that match one are converted. The policy also cuts those of them that
            it would leave whole otherwise (the input layer, depthwise layers).
        exclude: patterns of layers that are not converted.
        basis: the basis of the kernels; the DCT if None. A Plan has its own bases.
        bits: bits per weight, also of layers without a kernel larger than 1x1; None: nothing is quantised.
        rank: ranks, also of layers without a kernel larger than 1x1; None: no rank is reduced.

    Raises:
        UsageError: the lambda is unknown, a pattern matches nothing, a kernel has fewer levels, or the plan does not
            fit the network.
    """
    settings: dict[str, Any] = {"space": Lambda(lam, basis or Basis()), "channels": rank, "precision": bits}
    all_layers, layers = layers, plannable(layers, settings)
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
    chosen, skipped = _skip_with_tied_layers(chosen, skipped, layers)
    if isinstance(lam, Plan):
        if basis is not None and (other := _other_basis(lam, basis)):
            raise UsageError(f"the plan uses the basis {other}, not {basis}: leave out the plan or the basis")
        cannot_convert = {layer.tied_to or layer.name for layer in layers if layer.skip}
        others = [layer for layer in all_layers if layer not in layers]
        not_convertible = {layer.name for layer in layers if (layer.tied_to or layer.name) in cannot_convert}
        followed = _follow(lam, [*chosen, *others], skipped, not_convertible)
        return _with_settings(followed, chosen, {"channels": rank, "precision": bits}, named)
    notes: dict[str, str] = {}
    planned = [LayerPlan(layer.name, layer.kernel_size) for layer in chosen]
    planned = _planned(chosen, planned, settings, AXES, named, notes)
    planned = [layer for layer in planned if layer.keeps]
    policy = str(settings["space"]) + (f", rank {rank}" if rank is not None else "")
    return Plan(tuple(_same_for_tied_layers(planned, chosen)), tuple(skipped), policy, notes)


def _planned(
    layers: Sequence[LayerInfo],
    planned: Sequence[LayerPlan],
    settings: Mapping[str, Any],
    axes: Iterable[str],
    named: Collection[str],
    notes: dict[str, str],
) -> list[LayerPlan]:
    """Return the plans of the layers with what they keep on these axes.

    The axes are applied in turn. The facts of a layer say how many positions of its kernel the earlier axes keep.
    """
    plans = {layer.name: layer for layer in planned}
    for axis in axes:
        infos = [
            replace(layer, kept_positions=plans[layer.name].kept_share(prod(layer.kernel_size)))
            for layer in layers
            if has_axis(layer, axis)
        ]
        for name, kept in AXES[axis].plan(infos, settings.get(axis), named, notes).items():
            plans[name] = plans[name].keeping(kept)
    return list(plans.values())


def plannable(layers: Sequence[LayerInfo], settings: Mapping[str, Any] | None = None) -> list[LayerInfo]:
    """Return the layers that have at least one axis, with the settings of the axes by name."""
    given = {name for name, setting in (settings or {}).items() if setting is not None}
    axes = [name for name, axis in AXES.items() if not axis.needs_setting or name in given]
    return [layer for layer in layers if any(has_axis(layer, axis) for axis in axes)]


def _with_settings(
    plan: Plan, layers: Sequence[LayerInfo], settings: Mapping[str, Any], named: Collection[str]
) -> Plan:
    """Return the plan with ranks and bits for its layers and for the other ``layers``."""
    given = {name: setting for name, setting in settings.items() if setting is not None}
    if not given:
        return plan
    before, notes = {layer.name: layer for layer in plan.layers}, dict(plan.notes)
    plans = [before.get(layer.name, LayerPlan(layer.name, layer.kernel_size)) for layer in layers]
    plans = _planned(layers, plans, given, given, named, notes)
    changed = [layer for layer in plans if layer.keeps or layer.name in before]
    names = {layer.name for layer in changed}
    return replace(
        plan,
        layers=tuple(_same_for_tied_layers(changed, layers)),
        skipped=tuple(skip for skip in plan.skipped if skip.name not in names),
        notes=notes,
    )


def _other_basis(plan: Plan, basis: Basis) -> Basis | None:
    """Return a basis of the plan that differs from ``basis``; None if all agree or ``basis`` is the default."""
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


def _skip_with_tied_layers(
    chosen: Sequence[LayerInfo], skipped: Sequence[Skip], layers: Sequence[LayerInfo]
) -> tuple[list[LayerInfo], list[Skip]]:
    """Skip a layer if a layer with the same weight is skipped: they can only be converted together."""
    tie = {layer.name: layer.tied_to or layer.name for layer in layers}
    skipped_by_tie = {tie[skip.name]: skip.name for skip in skipped}
    kept = [layer for layer in chosen if tie[layer.name] not in skipped_by_tie]
    also_skipped = [
        Skip(layer.name, layer.kind, layer.kernel_size,
             f"its weight is tied to {skipped_by_tie[tie[layer.name]]}, which is skipped")
        for layer in chosen
        if tie[layer.name] in skipped_by_tie
    ]  # fmt: skip
    return kept, [*skipped, *also_skipped]


def _same_for_tied_layers(planned: Sequence[LayerPlan], layers: Sequence[LayerInfo]) -> list[LayerPlan]:
    """Let all layers that share a weight keep everything that any of them keeps."""
    tie = {layer.name: layer.tied_to or layer.name for layer in layers}
    members: dict[str, list[LayerPlan]] = {}
    for layer in planned:
        members.setdefault(tie[layer.name], []).append(layer)
    shared = {}
    for first, tied in members.items():
        axes = [axis for name, axis in AXES.items() if all(layer.on(name) for layer in tied)]
        shared[first] = [axis.shared([kept for layer in tied if (kept := layer.on(axis.name))]) for axis in axes]
    return [layer.keeping(*shared[tie[layer.name]]) for layer in planned]


def _follow(plan: Plan, layers: Sequence[LayerInfo], skipped: Sequence[Skip], not_convertible: set[str]) -> Plan:
    """Check a plan against the network and remove the layers that the user excluded.

    Raises:
        UsageError: the plan has a layer that cannot be converted, is not in the network, has another kernel size, or
            does not have an axis of the plan; or layers with the same weight keep different things.
    """
    skip_reasons = {skip.name: skip.why for skip in skipped}
    for layer in plan.layers:
        if layer.name in skip_reasons and layer.name in not_convertible:
            reason = skip_reasons[layer.name]
            raise UsageError(f"the plan does not fit this network: layer {layer.name} is skipped ({reason})")
    notes = {name: why for name, why in plan.notes.items() if name not in skip_reasons}
    plan = replace(plan, layers=tuple(layer for layer in plan.layers if layer.name not in skip_reasons), notes=notes)
    layers_by_name = {layer.name: layer for layer in layers}
    for layer in plan.layers:
        if (info := layers_by_name.get(layer.name)) is None:
            raise UsageError(f"the plan does not fit this network: {no_match(layer.name, list(layers_by_name))}")
        if layer.kernel_size != info.kernel_size:
            raise UsageError(
                f"the plan does not fit this network: layer {layer.name} has kernel {info.kernel_size}, "
                f"the plan says {layer.kernel_size}"
            )
        if others := [kept.axis for kept in layer.keeps if not has_axis(info, kept.axis)]:
            raise UsageError(
                f"the plan does not fit this network: layer {layer.name} ({info.kind}) has no axis {others[0]}"
            )
    if _same_for_tied_layers(plan.layers, layers) != list(plan.layers):
        raise UsageError("the plan does not fit this network: layers that share a weight keep different things")
    not_in_plan = layers_by_name.keys() - {layer.name for layer in plan.layers}
    skips = [
        Skip(layer.name, layer.kind, layer.kernel_size, "not in the plan")
        for layer in layers
        if layer.name in not_in_plan and layer in plannable(layers)
    ]
    return replace(plan, skipped=(*skipped, *skips))
