"""The scores of single cuts, stored as JSON, so that a search with another budget does not measure them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import CalibrationSettings
from ..codecs.digests import tensors_sha256
from ..documents import check, count, finite, json_value
from ..errors import Argument, InputError, UsageError
from ..files import read_json, write_text
from ..kernels.basis import Basis
from ..network.distributed import from_first_rank, rank
from ..network.state import weights_sha256
from ..network.values import tensors_in
from ..plan import AXES, Plan
from .choices import Choice
from .orders import Order

VERSION = 1
_SHAPE = {
    "key": {...: json_value},
    "single": {...: finite},
    "whole": {...: finite},
    "orders": {...: {"frequencies": [[count]], "by": str, "why": (str, None)}},
}


@dataclass
class Probes:
    """Measured divergences of single cuts (one item, one choice) and of whole plans, and the orders of frequencies.

    ``orders`` has the name of an item's first layer as key. ``key`` describes the weights, inputs and settings that the
    scores belong to; a file with another key is refused. Each entry is written at once, so that an interrupted search
    continues where it stopped.
    """

    key: Mapping[str, Any]
    path: Path | None = None
    single: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    orders: dict[str, Order] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path | None, key: Mapping[str, Any]) -> Probes:
        """Return the probes stored in ``path``; empty where there is no file.

        Raises:
            InputError: the file holds something else.
            UsageError: the probes belong to other weights, inputs or settings.
        """
        probes = cls(key, path)
        data = from_first_rank(_read_probes(path)) if path is not None else None
        if isinstance(data, str):
            raise InputError(data)
        if data is None:
            return probes
        if differing := [name for name, value in key.items() if data["key"].get(name) != value]:
            what = f"{path} holds probes of other {' and '.join(differing)}"
            raise UsageError(what, ": remove it, or name another file (", Argument("probes"), ")")
        return cls(key, path, data["single"], data["whole"], _orders_in(data))

    def keep(self) -> None:
        """Write all scores and orders to the file."""
        if self.path is None or rank() > 0:
            return
        data = {"version": VERSION, "key": dict(self.key), "single": self.single, "whole": self.whole}
        data["orders"] = {name: order.to_json() for name, order in self.orders.items()}
        write_text(self.path, json.dumps(data, indent=1) + "\n", force=True)


def key_of(model: nn.Module, batches: Iterable[Any], settings: CalibrationSettings, basis: Basis) -> dict[str, Any]:
    """Return what the scores depend on, as a JSON-able dict."""
    inputs = {f"{i}.{j}": t for i, batch in enumerate(batches) for j, t in enumerate(tensors_in(batch))}
    options = asdict(settings)
    options.pop("memory")  # the memory limit selects the solver, which changes only rounding
    return {
        "weights": weights_sha256(model),
        "images": tensors_sha256(inputs),
        "settings": {**options, "basis": str(basis)},
    }


def name_of(names: Sequence[str], choice: Choice) -> str:
    """Return the name of a single cut in the file: the layers and what they keep.

    The space axis is not named, because files from before the other axes existed do not name it. An axis that needs a
    setting is left out if everything is kept.
    """
    named = [one for one in choice if not (one.whole and AXES[one.axis].needs_setting)]
    kept = [one.key if one.axis == "space" else f"{one.axis}={one.key}" for one in named]
    return f"{','.join(names)}: {' '.join(kept)}"


def name_of_plan(plan: Plan) -> str:
    """Return the name of a plan in the file: what each layer that is cut keeps."""
    return "; ".join(name_of((layer.name,), layer.keeps) for layer in plan.layers if not layer.whole) or "whole"


def _read_probes(path: Path) -> Any:
    """Return the content of the file, None where there is no file, or an error message (a string)."""
    if not path.exists():
        return None
    try:
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError("it is not a JSON object")
        if data["version"] != VERSION:
            return (
                f"{path} holds probes of version {data['version']}, this harmconvert reads version {VERSION}: remove it"
            )
        check(data, _SHAPE, "probes")
        if missing := set(_SHAPE) - {"orders"} - set(data):
            raise KeyError(min(missing))
        _orders_in(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot read probes from {path} ({type(error).__name__}: {error}): remove the file"
    return data


def _orders_in(data: Any) -> dict[str, Order]:
    """Return the orders; empty for files from before orders existed."""
    return {name: Order.from_json(order) for name, order in data.get("orders", {}).items()}
