"""convert(): make the harmonic counterpart of a pretrained network (paper sec. 5.2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import Tensor, nn

from ..arguments import Budget
from ..calibration import Calibration, CalibrationSettings, Progress, calibrate
from ..calibration.reading import Reader, items
from ..codecs.codec import Entry
from ..codecs.table import CodecTable
from ..errors import Argument, InputError, Message, UsageError, UserCodeError, shortened
from ..kernels.basis import Basis
from ..kernels.projection import check_range, relative_error
from ..network.checks import check_network, check_weights
from ..network.layers import weighted_layers
from ..network.tracing import Trace, find_layers, trace, trace_if_possible
from ..network.values import default_input
from ..plan import (
    AXES,
    Bits,
    BitsSetting,
    Cost,
    LayerPlan,
    Plan,
    apply_plan,
    coded_weights,
    make_plan,
    network_cost,
    round_weights,
    with_coded_bits,
)
from ..search.dropping import Step, smallest_within
from ..search.records import Search, SearchSettings
from ..search.searching import Converted, Scope, Searching
from ..storage.checkpoint import Header

RECORD_KEY = "conversion"  # the key in a checkpoint's history


@dataclass(frozen=True)
class LayerRecord:
    """The result for one convolution over 1x1.

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


LEAST_CUT = 0.01  # share of the parameters; a smaller cut is not useful, so `Conversion.advice` says so


@dataclass(frozen=True)
class Conversion:
    """A converted network, its plan, the result for each layer, the cost, and the record of the calibration.

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
        calibration = {"calibration": self.calibration.to_json()} if self.calibration else {}
        return Header(self.plan, history=self.history() | calibration, codecs=CodecTable(coded=self.coded))

    def history(self) -> dict[str, Any]:
        """Return the record that `harmconvert.save` writes in addition to the plan and the calibration.

        It has the energy, the error and the uncut spectrum of each layer, the cost, and the search for a budget. A
        report uses it when the uncut network is not available.

        >>> sorted(convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), 2).history()["conversion"])
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


def convert(
    model: nn.Module,
    lam: str | int | Mapping[str, int] | Plan = "full",
    *,
    example_input: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: str = "dct",
    normalization: str = "ortho",
    bits: float | Mapping[str, float] | None = None,
    budget: str | Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    calibration: Iterable[Any] | None = None,
    settings: CalibrationSettings | None = None,
    search: SearchSettings | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a network's convolutions over 1x1 to harmonic form; ``model`` itself is never changed.

    Each kernel becomes the nearest combination of the basis kernels that its plan keeps; nothing else changes. With
    ``calibration``, a refit in closed form on inputs without labels then reduces the error of the cut.

    >>> conversion = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), lam=2)
    >>> [(layer.name, layer.kept) for layer in conversion.layers]
    [('0', 9), ('1', 3)]

    Args:
        model: any network that is not wrapped in DistributedDataParallel or torch.compile.
        lam: ``"full"`` (exact), a number of levels for 3x3 kernels that is scaled for other kernels,
            ``"progressive"``, a dict from shell-style layer pattern to an unscaled number of levels, or a `Plan`.
        example_input: a tensor, a tuple of arguments, a dict of keywords, or a list (one argument); default: zeros of
            the size in the model's ``pretrained_cfg``. ``"progressive"`` needs it.
        include: patterns; only convolutions that match one are converted, also those that a policy keeps whole.
        exclude: patterns of convolutions that are not converted.
        basis: ``"dct"``, ``"haar"``, ``"gaussian"``, or ``"klt"``, which is fitted to each layer (`Basis`). Not used
            with a `Plan`, which has its own.
        normalization: scale of the basis: ``"ortho"``, or ``"l1"`` as in the paper's ImageNet networks.
        bits: quantise the weights of convolutions and linear layers to this many bits per weight on average, for an
            entropy coded file; or a dict from pattern to bits of layers. Without it nothing is quantised.
        budget: instead of ``lam``: a share of the parameters, bytes, MACs or time on this machine of the whole network,
            such as ``{"params": 0.6}`` or ``"latency=50%"``, or an amount, such as ``"bytes=10MB"``. Time is that of
            the factored form on ``example_input``. A search finds the plan with the smallest error within the budget
            (`harmconvert.search.choosing`).
        max_drop: instead of ``lam``: find the fewest parameters at which ``metric`` falls by at most this many points.
            The search bisects over budgets; `Conversion.drops` has its steps.
        metric: a function that measures the quality of a network in points, such as top-1 in %; higher is better.
        calibration: batches of 32 inputs or more in total for the refit: tensors, (input, target) pairs whose target is
            ignored, or dicts of keywords. They are read once.
        settings: settings of the calibration.
        search: settings of the search for a budget.
        progress: called with (layers done, layers, layer) during the calibration.

    Raises:
        UsageError: the lambda is unknown, a pattern matches no layer, or the network does not accept the input.
        InputError: the network has no layer to convert, weights or calibration inputs are not finite, or there are no
            calibration inputs.
    """
    check_network(model)
    check_weights(model)
    job = _Job(
        model, example_input, Scope(include, exclude, Basis(basis, normalization)), calibration,
        settings or CalibrationSettings(), progress, None if bits is None else BitsSetting.of(bits),
    )  # fmt: skip
    if (max_drop is None) != (metric is None):
        raise UsageError("max_drop and metric (a function that measures a network) need each other: give both")
    if max_drop is not None and metric is not None:
        if budget is not None or lam != "full":
            raise UsageError("max_drop finds the size of the network: leave out lam and budget")
        return _convert_within_drop(job, max_drop, metric, search or SearchSettings())
    if budget is not None:
        if lam != "full":
            raise UsageError(f"lam (={lam!r}) and budget (={budget!r}) both say what to keep: give only one")
        return _convert_within_budget(job, Budget.parse(budget), search or SearchSettings())
    return _convert_by_policy(job, lam)


@dataclass(frozen=True)
class _Job:
    """The arguments that all ways of converting share."""

    model: nn.Module
    example_input: Any
    scope: Scope
    calibration: Iterable[Any] | None
    settings: CalibrationSettings
    progress: Progress | None
    bits: BitsSetting | None = None


def _convert_by_policy(job: _Job, lam: str | int | Mapping[str, int] | Plan) -> Conversion:
    model, calibration = job.model, job.calibration
    if calibration is not None and job.example_input is None:
        calibration, run = _run_on_calibration(model, lam, calibration)
    else:
        run = trace_if_possible(model, lam, job.example_input)
    plan = make_plan(find_layers(model, run), lam, job.scope.include, job.scope.exclude, job.scope.basis, job.bits)
    if not plan.layers:
        reasons = shortened([f"{skip.name}: {skip.why}" for skip in plan.skipped], 3) or "it has none"
        what = "convolution over 1x1" if job.bits is None else "convolution and no linear layer"
        raise InputError(f"this {type(model).__name__} has no {what} to convert ({reasons})")
    converted = Converted(plan, apply_plan(model, plan))
    if plan.on(Bits.axis):
        return _coded(job, converted, calibration, run)
    conversion = _conversion_of(model, converted, run)
    if calibration is None:
        return conversion
    calibrated = calibrate(model, converted.model, plan, calibration, job.settings, job.progress)
    return replace(conversion, calibration=calibrated)


def _coded(job: _Job, converted: Converted, calibration: Iterable[Any] | None, run: Trace | None) -> Conversion:
    """Return the conversion with its weights coded: on the calibration inputs, or without any."""
    plan, model = converted.plan, converted.model
    record = None
    if calibration is None:
        entries = round_weights(model, plan)
    else:
        record = calibrate(job.model, model, plan, calibration, job.settings, job.progress)
        entries = dict(record.coded)
    plan = with_coded_bits(plan, coded_weights(model, plan), entries)
    conversion = _conversion_of(job.model, Converted(plan, model, record), run)
    return replace(conversion, coded=entries)


def _convert_within_budget(job: _Job, budget: Budget, search: SearchSettings) -> Conversion:
    searching = _searching(job, budget, search)
    converted, record = searching()
    return replace(_conversion_of(job.model, converted, searching.trace), search=record)


def _searching(job: _Job, budget: Budget, search: SearchSettings) -> Searching:
    run = trace_if_possible(job.model, "any", job.example_input)
    images = None if job.calibration is None else tuple(job.calibration)
    example = default_input(job.model) if job.example_input is None else job.example_input
    searching = Searching(
        job.model, budget, find_layers(job.model, run), run, job.scope, images, job.settings, search, example
    )
    if job.progress is not None:
        searching.progress = job.progress
    return searching


def _convert_within_drop(
    job: _Job, max_drop: float, metric: Callable[[nn.Module], float], search: SearchSettings
) -> Conversion:
    """Return the smallest conversion whose metric is at most ``max_drop`` points below that of the uncut network."""
    images = None if job.calibration is None else tuple(job.calibration)
    job = replace(job, calibration=images)
    least_share = _searching(job, Budget("params", 1.0), SearchSettings()).least_share()
    uncut_metric = metric(job.model)
    with TemporaryDirectory() as folder:  # one file of probes for all budgets, so that each layer is probed once
        settings = search if search.probes else replace(search, probes=str(Path(folder) / "probes.json"))

        def attempt(share: float) -> tuple[Conversion, float]:
            budget = Budget.parse({"params": share})
            conversion = _convert_within_budget(job, budget, settings) if share < 1 else _convert_by_policy(job, "full")
            return conversion, uncut_metric - metric(conversion.model)

        conversion, steps = smallest_within(attempt, least_share, max_drop)
    return replace(conversion, drops=steps)


def _conversion_of(model: nn.Module, converted: Converted, run: Trace | None) -> Conversion:
    plan = converted.plan
    records = _records(model, converted.model, plan)
    cost = network_cost(model, plan, run)
    return Conversion(converted.model, plan, records, cost, converted.calibration)


def _run_on_calibration(model: nn.Module, lam: Any, calibration: Iterable[Any]) -> tuple[Iterable[Any], Trace | None]:
    """Return all calibration batches, and a trace on the network's default input, else on the first batch."""
    if lam == "full" or default_input(model) is not None or not isinstance(calibration, Iterable):
        return calibration, trace_if_possible(model, lam, None)
    batches = items(calibration)
    first = list(itertools.islice(batches, 1))
    with suppress(UsageError, UserCodeError):  # the calibration reports the error in its inputs
        run = trace(model, Reader(model)(first[0])) if first else None
        return itertools.chain(first, batches), run
    return itertools.chain(first, batches), None


def _records(model: nn.Module, converted: nn.Module, plan: Plan) -> tuple[LayerRecord, ...]:
    """Return the record of each layer of a plan, in the order of the network."""
    before, after = weighted_layers(model), weighted_layers(converted)
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
    weight, total = cast(Tensor, layer.weight).detach(), prod(planned.kernel_size)
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
    merged = cast(Tensor, converted.weight).detach()
    error = relative_error(merged, weight)
    if not isfinite(error):
        for name, parameter in converted.named_parameters(recurse=False):
            check_range(parameter, planned.name, name)
        check_range(merged, planned.name, "merged kernels")
    facts = {key: value for one in planned.keeps for key, value in AXES[one.axis].facts(weight, one).items()}
    # In an orthonormal basis, the energy of the removed frequencies is exactly the squared error.
    return replace(record, energy=1.0 if planned.whole else max(0.0, 1 - error**2), error=error, **facts)
