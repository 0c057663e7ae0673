"""Plan: what each layer keeps on each axis. A plan is data: it prints, compares, and saves as JSON."""

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

MAX_KERNEL_POSITIONS = 1 << 16  # a plan read from a file may ask for anything; no kernel in use comes near this


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps: a value for each axis that it has.

    An attribute of a kept value can be read from the layer: ``layer.frequencies`` of the space axis, for example.
    Layers without an axis of their own (1x1 convolutions and linear layers, for which no axis is registered yet) may
    stand in a plan; nothing is done to them.
    """

    name: str
    kernel_size: tuple[int, ...]
    keeps: tuple[Kept, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the layer keeps everything."""
        return all(kept.whole for kept in self.keeps)

    def on(self, axis: str) -> Kept | None:
        """What the layer keeps on an axis; None where it does not have that axis."""
        return next((kept for kept in self.keeps if kept.axis == axis), None)

    def kept_share(self, total: int) -> int:
        """How many of ``total`` equal parts of the layer are kept, as tables show it; the axes say."""
        for kept in self.keeps:
            total = kept.part_of(total)
        return total

    def keeping(self, *keeps: Kept) -> LayerPlan:
        """The same layer with other values on the axes of ``keeps``."""
        changed = {kept.axis: kept for kept in (*self.keeps, *keeps)}
        return replace(self, keeps=tuple(changed[axis] for axis in AXES if axis in changed))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: an entry for each axis."""
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
    """A layer that is left as it is, and why."""

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Plan:
    """What each layer of one network keeps on each axis.

    ``notes`` gives, by layer name, the reason why a policy treats a layer in another way than the rest.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skip, ...] = ()
    policy: str = "custom"
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def whole(self) -> bool:
        """Whether every layer keeps everything."""
        return all(layer.whole for layer in self.layers)

    def on(self, axis: str) -> dict[str, Any]:
        """What each layer that has an axis keeps on it, by layer name."""
        return {layer.name: kept for layer in self.layers if (kept := layer.on(axis)) is not None}

    def changed(self, change: Callable[[LayerPlan], LayerPlan]) -> Plan:
        """The plan with every layer changed."""
        return replace(self, layers=tuple(map(change, self.layers)))

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"plan {self.policy}: {counted(len(self.layers), 'convolution')}, {len(self.skipped)} skipped"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.kernel_size)) or "linear"
            lines.append(f"  {layer.name:<{width}}  {shape}  {layer}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `from_json`."""
        return {
            "policy": self.policy,
            "layers": [layer.to_json() for layer in self.layers],
            "skipped": [asdict(skip) for skip in self.skipped],
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read what `to_json` wrote, or what releases before format version 2 wrote (one basis for the whole plan).

        Raises:
            InputError: anything in it is not what a plan holds.
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


def _layer_from_json(data: Any, plan: Any) -> LayerPlan:
    name = str(data["name"])
    with input_errors(f"layer {name[:80]!r}"):
        size = _kernel_size(data)
        for axis in AXES.values():
            data = axis.upgraded(data, plan)
        own = {key: value for key, value in data.items() if key not in ("name", "kernel_size")}
        if unknown := own.keys() - AXES.keys():
            raise ValueError(f"it keeps something on {min(unknown)!r}, an axis that this harmconvert does not know")
        return LayerPlan(name, size, tuple(axis.from_json(own[key], size) for key, axis in AXES.items() if key in own))


def _kernel_size(data: Any) -> tuple[int, ...]:
    check(size := data["kernel_size"], [count], "kernel size")
    if not 0 <= len(size) <= 3 or not 1 <= prod(size) <= MAX_KERNEL_POSITIONS:
        raise ValueError(f"kernel size {size[:4]} of layer {str(data['name'])[:80]!r} is out of range")
    return tuple(size)
