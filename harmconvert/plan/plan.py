"""Plan: which frequencies each convolution keeps; and the lambda policies that make one (paper sec. 4 and 5).

A plan is data: it prints, compares, and saves as JSON. Making one needs only facts about the convolutions (`ConvSite`),
not the network itself.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..arguments import parse_lambda as parse_lambda
from ..documents import check, count, reading
from ..errors import InputError, UsageError, counted, shortened
from ..files import read_json, write_text
from ..kernels.basis import (
    Basis,
    Frequency,
    all_frequencies,
    check_frequencies,
    frequencies_below,
    scaled_levels,
)
from ..network.layers import ConvSite

MAX_KERNEL_POSITIONS = 1 << 16  # a plan read from a file may ask for anything; no kernel in use comes near this


@dataclass(frozen=True)
class LayerPlan:
    """What one convolution keeps: its name, kernel size, and frequencies in the house order."""

    name: str
    kernel_size: tuple[int, ...]
    frequencies: tuple[Frequency, ...]

    def __post_init__(self) -> None:
        check_frequencies(self.kernel_size, self.frequencies)

    @property
    def whole(self) -> bool:
        """Whether it keeps every frequency."""
        return len(self.frequencies) == prod(self.kernel_size)

    @property
    def levels(self) -> int | None:
        """The literal lambda that keeps just these frequencies, or None where none does."""
        levels = sum(self.frequencies[-1]) + 1
        return levels if self.frequencies == frequencies_below(self.kernel_size, levels) else None


@dataclass(frozen=True)
class Skip:
    """A convolution left as it is, and why."""

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Plan:
    """Frequencies kept per convolution, for one network, and the basis that they are of.

    ``notes`` gives a reason for layers that the policy treats in a way of their own, by name.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skip, ...] = ()
    policy: str = "custom"
    family: Basis = field(default_factory=Basis)
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def basis(self) -> str:
        """Name of the basis."""
        return self.family.name

    @property
    def normalization(self) -> str:
        """Scale of the basis kernels, ``"ortho"`` or ``"l1"``."""
        return self.family.normalization

    @property
    def whole(self) -> bool:
        """Whether nothing is cut."""
        return all(layer.whole for layer in self.layers)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"plan {self.policy}: {counted(len(self.layers), 'convolution')}, {len(self.skipped)} skipped"]
        for layer in self.layers:
            whole, kept = prod(layer.kernel_size), len(layer.frequencies)
            lines.append(f"  {layer.name:<{width}}  {'x'.join(map(str, layer.kernel_size))}  keeps {kept} of {whole}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `from_json`."""
        return {
            "policy": self.policy,
            "basis": self.family.name,
            "normalization": self.family.normalization,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [asdict(skip) for skip in self.skipped],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            InputError: anything in it is not what a plan holds.
        """
        with reading("this is not a plan"):
            plan = cls(
                tuple(_layer_from_json(layer) for layer in data["layers"]),
                tuple(
                    Skip(str(s["name"]), str(s["kind"]), _kernel_size(s), str(s["why"]))
                    for s in data.get("skipped", [])
                ),
                str(data.get("policy", "custom")),
                Basis(str(data.get("basis", "dct")), str(data.get("normalization", "ortho"))),
                {str(k): str(v) for k, v in data.get("notes", {}).items()},
            )
        names = [layer.name for layer in plan.layers]
        if len(set(names)) < len(names):
            raise InputError(f"this is not a plan: layer {max(names, key=names.count)!r} stands in it twice")
        return plan

    def save(self, path: str | Path, force: bool = True) -> None:
        """Write the plan as JSON; raises as `files.write_file`."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n", force)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote, or a report holds; raises InputError where the file is missing or no plan."""
        try:
            data = read_json(path)
            return cls.from_json(data.get("plan", data) if isinstance(data, dict) else data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the plan {path}: {error}") from error


def make_plan(
    sites: Sequence[ConvSite],
    lam: str | int | Mapping[str, int] | Plan = "full",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    family: Basis | None = None,
) -> Plan:
    """Turn a lambda policy into a plan (DESIGN 3).

    Args:
        sites: the network's convolutions over 1x1. ``progressive`` needs their output sizes.
        lam: ``"full"``; an integer, meant for 3x3 and scaled with the kernel; ``"progressive"``; a dict from
            shell-style pattern to literal levels (what none matches stays whole); or a Plan to follow.
        include: patterns; where given, only convolutions that match one are converted, and they count as named, so
            that the policy cuts them even where it would spare them (input layer, depthwise).
        exclude: patterns of convolutions to leave as they are.
        family: the basis; the DCT where None. A Plan to follow has its own.

    Raises:
        UsageError: unknown lambda, a pattern that matches nothing, more levels than a kernel has, or a plan that does
            not fit the network.
    """
    names = [site.name for site in sites]
    for pattern in (*include, *exclude):
        if not fnmatch.filter(names, pattern):
            raise UsageError(_no_match(pattern, names))
    named = {name for pattern in include for name in fnmatch.filter(names, pattern)}
    chosen, skipped = [], []
    for site in sites:
        if reason := _reason_to_skip(site, include, exclude):
            skipped.append(Skip(site.name, site.kind, site.kernel_size, reason))
        else:
            chosen.append(site)
    chosen, skipped = _skip_torn_ties(chosen, skipped, sites)
    if isinstance(lam, Plan):
        if family not in (None, Basis(), lam.family):
            raise UsageError(f"the plan is of the basis {lam.family}, not {family}: leave out one of the two")
        cannot = {site.tied_to or site.name for site in sites if site.skip}
        return _follow(lam, chosen, skipped, {s.name for s in sites if (s.tied_to or s.name) in cannot})
    notes: dict[str, str] = {}
    if lam == "full":
        layers = [_whole(site) for site in chosen]
    elif lam == "progressive":
        layers = _progressive(chosen, named, notes)
    elif isinstance(lam, Mapping):
        layers = _by_pattern(chosen, lam, names)
    elif isinstance(lam, int) and not isinstance(lam, bool):
        layers = _uniform(chosen, lam, named, notes)
    else:
        raise UsageError(
            f"unknown lambda {lam!r}: use 'full', 'progressive', an integer, a dict {{pattern: levels}} or a Plan"
        )
    policy = ",".join(f"{k}={v}" for k, v in lam.items()) if isinstance(lam, Mapping) else str(lam)
    return Plan(
        tuple(_same_for_ties(layers, chosen)), tuple(skipped), policy, Basis() if family is None else family, notes
    )


def _reason_to_skip(site: ConvSite, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if site.skip:
        return site.skip
    for pattern in exclude:
        if fnmatch.fnmatchcase(site.name, pattern):
            return f"excluded by {pattern}"
    if include and not any(fnmatch.fnmatchcase(site.name, pattern) for pattern in include):
        return "not among those to include"
    return None


def _skip_torn_ties(
    chosen: Sequence[ConvSite], skipped: Sequence[Skip], sites: Sequence[ConvSite]
) -> tuple[list[ConvSite], list[Skip]]:
    """Convolutions that share a weight are converted together or not at all."""
    tie = {site.name: site.tied_to or site.name for site in sites}
    torn = {tie[skip.name]: skip.name for skip in skipped}
    kept = [site for site in chosen if tie[site.name] not in torn]
    left = [
        Skip(site.name, site.kind, site.kernel_size, f"its weight is tied to {torn[tie[site.name]]}, which is skipped")
        for site in chosen
        if tie[site.name] in torn
    ]
    return kept, [*skipped, *left]


def _same_for_ties(layers: Sequence[LayerPlan], sites: Sequence[ConvSite]) -> list[LayerPlan]:
    """Convolutions that share a weight keep the frequencies that any of them keeps."""
    tie = {site.name: site.tied_to or site.name for site in sites}
    union: dict[str, set[Frequency]] = {}
    for layer in layers:
        union.setdefault(tie[layer.name], set()).update(layer.frequencies)
    return [
        LayerPlan(
            layer.name,
            layer.kernel_size,
            tuple(f for f in all_frequencies(layer.kernel_size) if f in union[tie[layer.name]]),
        )
        for layer in layers
    ]


def _whole(site: ConvSite) -> LayerPlan:
    return LayerPlan(site.name, site.kernel_size, all_frequencies(site.kernel_size))


def _cut(site: ConvSite, levels: int) -> LayerPlan:
    return LayerPlan(site.name, site.kernel_size, frequencies_below(site.kernel_size, levels))


def _spared(site: ConvSite, named: set[str], notes: dict[str, str]) -> bool:
    """Whether a policy that was given no layer names leaves this one whole; notes the reason."""
    if site.name in named or not (site.reads_input or site.fixed or site.depthwise):
        return False
    what = "a fixed transform, which is not trained" if site.fixed else "depthwise, unless a pattern names it"
    if site.reads_input:
        what = "it reads the network's input" if site.output_size else "taken for the layer that reads the input"
    notes[site.name] = f"whole: {what}"
    return True


def _uniform(sites: Sequence[ConvSite], lam: int, named: set[str], notes: dict[str, str]) -> list[LayerPlan]:
    if not 1 <= lam <= 5:
        raise UsageError(
            f"lambda {lam} is out of range: a bare number is meant for 3x3 kernels, which have levels 1 to 5"
        )
    return [
        _whole(site) if _spared(site, named, notes) else _cut(site, scaled_levels(site.kernel_size, lam))
        for site in sites
    ]


def _progressive(sites: Sequence[ConvSite], named: set[str], notes: dict[str, str]) -> list[LayerPlan]:
    """Smallest maps lambda 2, next smallest 3, all others whole; maps compare by their number of positions."""
    unknown = [site.name for site in sites if site.output_size is None]
    if unknown and len(unknown) == len(sites):
        raise UsageError("lambda progressive follows the sizes of the maps: give an example input (--input-size C,H,W)")
    sizes = sorted({prod(site.output_size) for site in sites if site.output_size is not None})
    lam_by_size = dict(zip(sizes, (2, 3), strict=False))
    layers = []
    for site in sites:
        if site.output_size is None:
            notes[site.name] = "whole: it did not run on the example input"
            layers.append(_whole(site))
            continue
        lam = lam_by_size.get(prod(site.output_size))
        if lam is None or _spared(site, named, notes):
            layers.append(_whole(site))
        else:
            layers.append(_cut(site, scaled_levels(site.kernel_size, lam)))
    return layers


def _by_pattern(sites: Sequence[ConvSite], lam: Mapping[str, int], names: Sequence[str]) -> list[LayerPlan]:
    """The last pattern that matches a layer decides, so that exceptions can follow a general rule."""
    levels_by_name: dict[str, int] = {}
    for pattern, levels in lam.items():
        if not isinstance(levels, int) or isinstance(levels, bool):
            raise UsageError(f"lambda of {pattern!r} is {levels!r}: give a whole number of levels")
        matches = fnmatch.filter([site.name for site in sites], pattern)
        if not matches:
            raise UsageError(_no_match(pattern, names))
        levels_by_name.update(dict.fromkeys(matches, levels))
    layers = []
    for site in sites:
        try:
            layers.append(_cut(site, levels_by_name[site.name]) if site.name in levels_by_name else _whole(site))
        except UsageError as error:
            raise UsageError(f"layer {site.name}: {error}") from error
    return layers


def _follow(plan: Plan, sites: Sequence[ConvSite], skipped: Sequence[Skip], cannot: set[str]) -> Plan:
    """A given plan, checked against the network; it loses the layers that are skipped, if they could be converted."""
    out = {skip.name: skip.why for skip in skipped}
    for layer in plan.layers:
        if layer.name in out and layer.name in cannot:
            raise UsageError(f"the plan does not fit this network: layer {layer.name} is skipped ({out[layer.name]})")
    notes = {name: why for name, why in plan.notes.items() if name not in out}
    plan = replace(plan, layers=tuple(layer for layer in plan.layers if layer.name not in out), notes=notes)
    known = {site.name: site for site in sites}
    for layer in plan.layers:
        if (site := known.get(layer.name)) is None:
            raise UsageError(f"the plan does not fit this network: {_no_match(layer.name, list(known))}")
        if layer.kernel_size != site.kernel_size:
            raise UsageError(
                f"the plan does not fit this network: layer {layer.name} has kernel {site.kernel_size}, "
                f"the plan says {layer.kernel_size}"
            )
    if _same_for_ties(plan.layers, sites) != list(plan.layers):
        raise UsageError(
            "the plan does not fit this network: convolutions that share a weight keep different frequencies"
        )
    left = known.keys() - {layer.name for layer in plan.layers}
    skips = [Skip(site.name, site.kind, site.kernel_size, "not in the plan") for site in sites if site.name in left]
    return replace(plan, skipped=(*skipped, *skips))


def _no_match(pattern: str, names: Sequence[str]) -> str:
    return f"{pattern!r} matches no convolution over 1x1 (there are: {shortened(list(names), 5) or 'none'})"


def _layer_from_json(data: Any) -> LayerPlan:
    name = str(data["name"])
    with reading(f"layer {name[:80]!r}"):
        check(data["frequencies"], [[count]], "frequencies")
        return LayerPlan(name, _kernel_size(data), tuple(map(tuple, data["frequencies"])))


def _kernel_size(data: Any) -> tuple[int, ...]:
    check(size := data["kernel_size"], [count], "kernel size")
    if not 1 <= len(size) <= 3 or not 1 <= prod(size) <= MAX_KERNEL_POSITIONS:
        raise ValueError(f"kernel size {size[:4]} of layer {str(data['name'])[:80]!r} is out of range")
    return tuple(size)
