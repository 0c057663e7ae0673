"""Plans as data: what each layer keeps on each axis. A plan can be printed, compared, and saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..documents import check, count, input_errors
from ..errors import InputError, counted
from ..files import read_json, write_text
from .axes import AXES, Kept

MAX_KERNEL_POSITIONS = 1 << 16  # a limit for plans in files, far larger than any kernel in use


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: one value for each axis that the layer has.

    The attributes of these values can be read from the layer plan, for example ``layer.frequencies`` of the space axis.
    A plan may contain layers that have no axis (1x1 convolutions and linear layers, as long as no axis for them is
    registered); these are not changed.
    """

    name: str
    kernel_size: tuple[int, ...]
    keeps: tuple[Kept, ...] = ()

    @property
    def whole(self) -> bool:
        """Return whether the layer keeps everything."""
        return all(kept.whole for kept in self.keeps)

    def on(self, axis: str) -> Kept | None:
        """Return what the layer keeps on an axis; None if it does not have this axis."""
        return next((kept for kept in self.keeps if kept.axis == axis), None)

    def kept_share(self, total: int) -> int:
        """Return how many of ``total`` equal parts of the layer are kept, for tables."""
        for kept in self.keeps:
            total = kept.part_of(total)
        return total

    def keeping(self, *keeps: Kept) -> LayerPlan:
        """Return the same layer with the values ``keeps`` on their axes."""
        changed = {kept.axis: kept for kept in (*self.keeps, *keeps)}
        return replace(self, keeps=tuple(changed[axis] for axis in AXES if axis in changed))

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON, with one entry for each axis."""
        own = {kept.axis: kept.to_json() for kept in self.keeps}
        return {"name": self.name, "kernel_size": list(self.kernel_size), **own}

    def __str__(self) -> str:
        return ", ".join(map(str, self.keeps)) or "nothing to choose"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name != "keeps":
            for kept in self.keeps:
                if hasattr(kept, name):
                    return getattr(kept, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True)
class Skip:
    """A layer that is not converted, and why."""

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Plan:
    """What each layer of one network keeps on each axis.

    ``notes``: by layer name, why the policy treats a layer differently from the others.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skip, ...] = ()
    policy: str = "custom"
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def whole(self) -> bool:
        """Return whether every layer keeps everything."""
        return all(layer.whole for layer in self.layers)

    def on(self, axis: str) -> dict[str, Any]:
        """Return, by layer name, what the layers that have an axis keep on it."""
        return {layer.name: kept for layer in self.layers if (kept := layer.on(axis)) is not None}

    def without(self, axis: str) -> Plan:
        """Return the plan without an axis; layers that have no other axis are left out."""
        layers = (replace(one, keeps=tuple(k for k in one.keeps if k.axis != axis)) for one in self.layers)
        return replace(self, layers=tuple(layer for layer in layers if layer.keeps))

    def map_layers(self, change: Callable[[LayerPlan], LayerPlan]) -> Plan:
        """Return the plan with ``change`` applied to every layer."""
        return replace(self, layers=tuple(map(change, self.layers)))

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"plan {self.policy}: {counted(len(self.layers), 'layer')}, {len(self.skipped)} skipped"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.kernel_size)) or "matrix"
            lines.append(f"  {layer.name:<{width}}  {shape}  {layer}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; inverse of `from_json`."""
        return {
            "policy": self.policy,
            "layers": [layer.to_json() for layer in self.layers],
            "skipped": [asdict(skip) for skip in self.skipped],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read the result of `to_json`, also of releases before format version 2 (one basis for the whole plan).

        Raises:
            InputError: something in ``data`` is not valid in a plan.
        """
        with input_errors("this is not a plan"):
            plan = cls(
                tuple(_layer_from_json(layer, data) for layer in data["layers"]),
                tuple(
                    Skip(str(s["name"]), str(s["kind"]), _kernel_size(s), str(s["why"]))
                    for s in data.get("skipped", [])
                ),
                str(data.get("policy", "custom")),
                {str(k): str(v) for k, v in data.get("notes", {}).items()},
            )
        names = [layer.name for layer in plan.layers]
        if len(set(names)) < len(names):
            raise InputError(f"this is not a plan: layer {max(names, key=names.count)!r} appears twice")
        return plan

    def save(self, path: str | Path, force: bool = True) -> None:
        """Write the plan as JSON; see `files.write_file` for errors."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n", force)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file of `save` or a JSON report; raise InputError if it is missing or not valid."""
        try:
            data = read_json(path)
            return cls.from_json(data.get("plan", data) if isinstance(data, dict) else data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the plan {path}: {error}") from error


def _layer_from_json(data: Any, plan: Any) -> LayerPlan:
    name = str(data["name"])
    with input_errors(f"layer {name[:80]!r}"):
        size = _kernel_size(data)
        for axis in AXES.values():
            data = axis.upgrade_json(data, plan)
        own = {key: value for key, value in data.items() if key not in ("name", "kernel_size")}
        if unknown := own.keys() - AXES.keys():
            raise ValueError(
                f"it keeps something on {min(unknown)!r}, an axis that this harmconvert does not know: "
                "update harmconvert"
            )
        return LayerPlan(name, size, tuple(axis.from_json(own[key], size) for key, axis in AXES.items() if key in own))


def _kernel_size(data: Any) -> tuple[int, ...]:
    check(size := data["kernel_size"], [count], "kernel size")
    if not 0 <= len(size) <= 3 or not 1 <= prod(size) <= MAX_KERNEL_POSITIONS:
        raise ValueError(f"kernel size {size[:4]} of layer {str(data['name'])[:80]!r} is out of range")
    return tuple(size)
