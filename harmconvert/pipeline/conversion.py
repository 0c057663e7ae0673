"""The result of a conversion: the network, its plan, and a record of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..codecs.codec import Entry
from ..codecs.table import CodecTable
from ..errors import Argument, Message, shortened
from ..kernels.projection import check_range, relative_error
from ..network.layers import all_layers, weights_of
from ..network.tracing import Trace
from ..plan import AXES, Cost, LayerPlan, Plan, network_cost
from ..search.dropping import Step
from ..search.records import Search
from ..search.searching import Converted
from ..storage.checkpoint import Header
from .overview import overview

RECORD_KEY = "conversion"  # the key in a checkpoint's history


@dataclass(frozen=True)
class LayerRecord:
    """The result for one layer of the plan, or one that is skipped.

    ``kept`` of ``total`` frequencies remain; 0 if the layer is skipped. ``energy`` is their share of the kernel's
    squared norm. ``error`` is the relative Frobenius error of the new kernel. Both are None if the layer is skipped or
    on the meta device. ``why`` is the reason why the layer is skipped, or why the policy keeps it whole. ``spectrum``
    is the mean |coefficient| of each DCT frequency of the uncut kernel; it cannot be computed from the cut one. It is
    None for a layer that is not cut in this basis. ``keeps`` describes the axes other than space.
    """

    name: str
    kind: str
    kernel: tuple[int, ...]
    kept: int
    total: int
    energy: float | None
    error: float | None
    why: str | None
    spectrum: tuple[float, ...] | None = None
    keeps: str = ""

    @property
    def skipped(self) -> bool:
        """Whether the convolution is not converted."""
        return self.kept == 0


_DIGITS = 4  # significant digits of the numbers in the history of a coded file
LEAST_CUT = 0.01  # share of the parameters; a smaller cut is not useful, so `Conversion.advice` says so


@dataclass(frozen=True, repr=False)
class Conversion:
    """A converted network, its plan, the result for each layer, the cost, and the record of the calibration.

    Printed, it is some lines that fit on a screen.

    ``drops`` are the steps of a search with ``max_drop``. ``coded`` has the codec entries of the tensors that a file
    does not store as plain values.
    """

    model: nn.Module
    plan: Plan
    layers: tuple[LayerRecord, ...]
    cost: Cost
    calibration: Calibration | None = None
    search: Search | None = None
    drops: tuple[Step, ...] = ()
    coded: Mapping[str, Entry] = field(default_factory=dict)

    def __repr__(self) -> str:
        return overview(self)

    @property
    def advice(self) -> str | None:
        """Why the cut is empty or almost empty, and what to do; None if the cut is large enough."""
        if self.plan.policy == "full":
            return None
        if self.search is not None:
            advice = f"the budget {self.search.budget} is met without a cut: give a smaller one"
            return advice if self.plan.whole else None
        removed = 1 - self.cost.harmonic_parameters / max(self.cost.parameters, 1)
        if not self.plan.whole and removed >= LEAST_CUT:
            return None
        whole = shortened([f"{name} ({why.removeprefix('whole: ')})" for name, why in self.plan.notes.items()], 2)
        what, why = "nothing in this network", whole or "every layer stays whole"
        if not self.plan.whole:
            what = f"only {max(removed, 0):.1%} of the parameters"
            why = f"convolutions over 1x1 have {self.cost.parameter_share:.1%} of them"
            why += f", and {whole} stay whole" if whole else ""
        name, include = Argument("lam", "'PATTERN=N'"), Argument("include", "PATTERN")
        remedy = "to cut such a layer, name it: "
        return Message(f"lambda {self.plan.policy} cuts {what}: {why}; ", remedy, name, " or ", include)

    def to_json(self) -> dict[str, Any]:
        """Return everything except the network as JSON values."""
        layers = [asdict(layer) for layer in self.layers]
        calibration = self.calibration.to_json() if self.calibration else None
        search = self.search.to_json() if self.search else None
        cost = asdict(self.cost)
        return {
            "plan": self.plan.to_json(), "layers": layers, "cost": cost, "calibration": calibration, "search": search,
            "drops": [asdict(step) for step in self.drops], "advice": self.advice,
        }  # fmt: skip

    def header(self) -> Header:
        """Return the header of a checkpoint of this network, without the source."""
        history = self.history() | ({"calibration": self.calibration.to_json()} if self.calibration else {})
        if self.coded:  # digits that nobody reads would be a large part of a small file
            history = cast("dict[str, Any]", _rounded(history))
        return Header(self.plan, history=history, codecs=CodecTable(coded=self.coded))

    def history(self) -> dict[str, Any]:
        """Return the record that `harmconvert.save` writes in addition to the plan and the calibration.

        It has the energy, the error and the uncut spectrum of each layer, the cost, and the search for a budget. A
        report uses it when the uncut network is not available.

        >>> import harmconvert
        >>> conversion = harmconvert.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), 2)
        >>> sorted(conversion.history()["conversion"])
        ['cost', 'drops', 'layers', 'search']
        """
        record = self.to_json()
        layers = {
            layer.name: {"energy": layer.energy, "error": layer.error}
            | ({"spectrum": list(layer.spectrum)} if layer.spectrum else {})
            for layer in self.layers
            if not layer.skipped
        }
        return {RECORD_KEY: {key: record[key] for key in ("cost", "search", "drops")} | {"layers": layers}}


def conversion_of(model: nn.Module, converted: Converted, run: Trace | None) -> Conversion:
    """Return the conversion with the record of each layer and the cost, without search and codecs."""
    plan = converted.plan
    records = _records(model, converted.model, plan)
    cost = network_cost(model, plan, run)
    return Conversion(converted.model, plan, records, cost, converted.calibration)


def _records(model: nn.Module, converted: nn.Module, plan: Plan) -> tuple[LayerRecord, ...]:
    """Return the record of each layer of a plan, in the order of the network."""
    before, after = all_layers(model), all_layers(converted)
    records = [
        _record(layer, before[layer.name], after[layer.name], plan.notes.get(layer.name)) for layer in plan.layers
    ]
    records += [
        LayerRecord(skip.name, skip.kind, skip.kernel_size, 0, prod(skip.kernel_size), None, None, skip.why)
        for skip in plan.skipped
    ]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted(records, key=lambda record: order[record.name]))


def _other_axes_text(planned: LayerPlan, total: int) -> str:
    """Return what a layer keeps on the axes that do not reduce the number of kept frequencies."""
    return ", ".join(str(kept) for kept in planned.keeps if not kept.whole and kept.part_of(total) == total)


def _record(planned: LayerPlan, layer: nn.Module, converted: nn.Module, why: str | None) -> LayerRecord:
    weight, total = _weight_of(layer), prod(planned.kernel_size)
    kept = planned.kept_share(total)
    record = LayerRecord(
        planned.name,
        type(layer).__name__,
        planned.kernel_size,
        kept,
        total,
        None,
        None,
        why,
        keeps=_other_axes_text(planned, total),
    )
    if weight.is_meta:
        return record
    merged = _weight_of(converted)
    error = relative_error(merged, weight)
    if not isfinite(error):
        for name, parameter in converted.named_parameters(recurse=False):
            check_range(parameter, planned.name, name)
        check_range(merged, planned.name, "merged kernels")
    facts = {key: value for one in planned.keeps for key, value in AXES[one.axis].facts(weight, one).items()}
    # In an orthonormal basis, the energy of the removed frequencies is exactly the squared error.
    return replace(record, energy=1.0 if planned.whole else max(0.0, 1 - error**2), error=error, **facts)


def _weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer; all weights in one vector if it has several."""
    first, *others = (weight.detach() for weight in weights_of(layer))
    return torch.cat([one.flatten() for one in (first, *others)]) if others else first


def _rounded(value: Any) -> Any:
    """Return a JSON value with its fractions rounded to a few significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
