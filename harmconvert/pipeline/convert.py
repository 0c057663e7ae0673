"""convert(): a pretrained network in, its harmonic counterpart out (paper sec. 5.2)."""

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
from ..plan import AXES, Cost, LayerPlan, Plan, apply_plan, make_plan, network_cost
from ..search.dropping import Step, smallest_within
from ..search.records import Search, SearchSettings
from ..search.searching import Converted, Scope, Searching
from ..storage.checkpoint import Header

RECORD_KEY = "conversion"  # of a checkpoint's history


@dataclass(frozen=True)
class LayerRecord:
    """What became of one convolution over 1x1.

    ``kept`` of ``total`` frequencies (0 of total: skipped); ``energy`` is the share of the kernel's squared norm that
    they hold, ``error`` the relative Frobenius error of the new kernel (both None where skipped or on the meta device);
    ``why`` says why it was skipped, or kept whole by a policy that cuts others. ``spectrum`` is the mean |coefficient|
    of each DCT frequency of the uncut kernel, which no one can tell afterwards (None unless it is cut, in that basis).
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
        """Whether the convolution was left as it is."""
        return self.kept == 0


LEAST_CUT = 0.01  # of the parameters: a smaller cut gains nobody anything


@dataclass(frozen=True)
class Conversion:
    """A converted network, the plan it follows, what became of each layer, what it costs, and how it was calibrated.

    ``coded`` says how a file is to hold those tensors that it does not hold as they are.
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
        """Why nothing, or next to nothing, was cut where something was to be, and what to do; else None."""
        if self.plan.policy == "full":
            return None
        if self.search is not None:
            return f"the budget {self.search.budget} is met without a cut: ask for less" if self.plan.whole else None
        removed = 1 - self.cost.harmonic_parameters / max(self.cost.parameters, 1)
        if not self.plan.whole and removed >= LEAST_CUT:
            return None
        whole = shortened([f"{name} ({why.removeprefix('whole: ')})" for name, why in self.plan.notes.items()], 2)
        what, why = "nothing here", whole or "every layer stays whole"
        if not self.plan.whole:
            what = f"{max(removed, 0):.1%} of the parameters only"
            why = f"convolutions over 1x1 hold {self.cost.parameter_share:.1%} of them"
            why += f", and {whole} stay whole" if whole else ""
        name, include = Argument("lam", "'PATTERN=N'"), Argument("include", "PATTERN")
        remedy = "to cut a layer all the same, name it: "
        return Message(f"lambda {self.plan.policy} cuts {what}: {why}; ", remedy, name, " or ", include)

    def to_json(self) -> dict[str, Any]:
        """Everything but the network, JSON-able."""
        layers = [asdict(layer) for layer in self.layers]
        calibration = self.calibration.to_json() if self.calibration else None
        search = self.search.to_json() if self.search else None
        cost = asdict(self.cost)
        return {
            "plan": self.plan.to_json(), "layers": layers, "cost": cost, "calibration": calibration, "search": search,
            "drops": [asdict(step) for step in self.drops], "advice": self.advice,
        }  # fmt: skip

    def header(self) -> Header:
        """What a checkpoint of it says, apart from its source: the plan and the history."""
        calibration = {"calibration": self.calibration.to_json()} if self.calibration else {}
        return Header(self.plan, history=self.history() | calibration, codecs=CodecTable(coded=self.coded))

    def history(self) -> dict[str, Any]:
        """What `harmconvert.save` keeps of it beside the plan and the calibration, for a report when the uncut network
        is gone: energy, error and uncut spectrum of each layer, costs, and the search for a budget.

        >>> sorted(convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), 2).history()["conversion"])
        ['cost', 'drops', 'layers', 'search']
        """
        told = self.to_json()
        layers = {
            layer.name: {"energy": layer.energy, "error": layer.error}
            | ({"spectrum": list(layer.spectrum)} if layer.spectrum else {})
            for layer in self.layers
            if not layer.skipped
        }
        return {RECORD_KEY: {key: told[key] for key in ("cost", "search", "drops")} | {"layers": layers}}


def convert(
    model: nn.Module,
    lam: str | int | Mapping[str, int] | Plan = "full",
    *,
    example_input: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: str = "dct",
    normalization: str = "ortho",
    budget: str | Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    calibration: Iterable[Any] | None = None,
    settings: CalibrationSettings | None = None,
    search: SearchSettings | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a network's convolutions over 1x1 to harmonic form; ``model`` itself is never changed.

    Each kernel becomes the best matching combination of the basis kernels that its plan keeps; nothing else changes.
    With ``calibration`` what a cut broke is then repaired in closed form, on inputs without labels.

    >>> conversion = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), lam=2)
    >>> [(layer.name, layer.kept) for layer in conversion.layers]
    [('0', 9), ('1', 3)]

    Args:
        model: any network; not wrapped in DistributedDataParallel or torch.compile.
        lam: ``"full"`` (exact), an integer meant for 3x3 and scaled with the kernel, ``"progressive"``, a dict from
            shell-style layer pattern to literal levels, or a `Plan`.
        example_input: a tensor, a tuple of arguments, a dict of keywords, or a list (one argument). Needed by
            ``"progressive"``; defaults to the size in the model's own ``pretrained_cfg``.
        include: patterns; only convolutions that match one are converted, and count as named.
        exclude: patterns of convolutions to leave as they are.
        basis: ``"dct"``, ``"haar"``, ``"gaussian"``, or ``"klt"``, which is fitted to each layer (`Basis`); a `Plan`
            has its own.
        normalization: of the basis: ``"ortho"``, or ``"l1"`` as in the paper's ImageNet networks.
        budget: instead of ``lam``: a share of the whole network's parameters, bytes, MACs or time on this machine (at
            ``example_input``, as `factor` will have it), ``{"params": 0.6}`` or ``"latency=50%"``, or an amount,
            ``"bytes=10MB"``; the plan of least harm within it is searched for (`harmconvert.search.choosing`).
        max_drop: instead of ``lam``: the fewest parameters at which ``metric`` (of a network, in points, as top-1 in
            %) falls by no more than this; by bisection over budgets, all of them in ``drops`` of what is returned.
        metric: a function that says how good a network is, in points; more is better.
        calibration: batches of inputs to refit on (32 inputs or more): tensors, (input, target) pairs whose target is
            not looked at, or dicts of keywords; read once.
        settings: of the calibration. search: of the search for a budget.
        progress: called with (layers done, layers, layer) while calibrating.

    Raises:
        UsageError: unknown lambda, a pattern without a match, an input that the network does not take.
        InputError: nothing to convert, weights or calibration inputs that are not finite, or none of them.
    """
    check_network(model)
    check_weights(model)
    job = _Job(
        model, example_input, Scope(include, exclude, Basis(basis, normalization)), calibration,
        settings or CalibrationSettings(), progress,
    )  # fmt: skip
    if (max_drop is None) != (metric is None):
        raise UsageError("max_drop needs metric, a function that says how good a network is, and metric max_drop")
    if max_drop is not None and metric is not None:
        if budget is not None or lam != "full":
            raise UsageError("max_drop finds the size itself: leave out lam and budget")
        return _within_drop(job, max_drop, metric, search or SearchSettings())
    if budget is not None:
        if lam != "full":
            raise UsageError(f"lam (={lam!r}) and budget (={budget!r}) both say what to keep: give one of them")
        return _within_budget(job, Budget.parse(budget), search or SearchSettings())
    return _by_policy(job, lam)


@dataclass(frozen=True)
class _Job:
    """What to convert, on which inputs, and which of its layers."""

    model: nn.Module
    example_input: Any
    scope: Scope
    calibration: Iterable[Any] | None
    settings: CalibrationSettings
    progress: Progress | None


def _by_policy(job: _Job, lam: str | int | Mapping[str, int] | Plan) -> Conversion:
    """Convert by a policy or a given plan."""
    model, calibration = job.model, job.calibration
    if calibration is not None and job.example_input is None:
        calibration, run = _run_on_calibration(model, lam, calibration)
    else:
        run = trace_if_possible(model, lam, job.example_input)
    plan = make_plan(find_layers(model, run), lam, job.scope.include, job.scope.exclude, job.scope.basis)
    if not plan.layers:
        reasons = shortened([f"{skip.name}: {skip.why}" for skip in plan.skipped], 3) or "it has none"
        raise InputError(f"this {type(model).__name__} has no convolution over 1x1 to convert ({reasons})")
    converted = Converted(plan, apply_plan(model, plan))
    conversion = _conversion(model, converted, run)
    if calibration is None:
        return conversion
    calibrated = calibrate(model, converted.model, plan, calibration, job.settings, job.progress)
    return replace(conversion, calibration=calibrated)


def _within_budget(job: _Job, budget: Budget, search: SearchSettings) -> Conversion:
    """Convert by the best plan within a budget."""
    searching = _searching(job, budget, search)
    uncalibrated, record = searching()
    return replace(_conversion(job.model, uncalibrated, searching.trace), search=record)


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


def _within_drop(
    job: _Job, max_drop: float, metric: Callable[[nn.Module], float], search: SearchSettings
) -> Conversion:
    """The smallest conversion that is no more than so many points worse than the uncut network."""
    images = None if job.calibration is None else tuple(job.calibration)
    job = replace(job, calibration=images)
    least = _searching(job, Budget("params", 1.0), SearchSettings()).least_share()
    uncut = metric(job.model)
    with TemporaryDirectory() as folder:  # the layers are probed once for all budgets
        kept = search if search.probes else replace(search, probes=str(Path(folder) / "probes.json"))

        def attempt(share: float) -> tuple[Conversion, float]:
            budget = Budget.parse({"params": share})
            conversion = _within_budget(job, budget, kept) if share < 1 else _by_policy(job, "full")
            return conversion, uncut - metric(conversion.model)

        conversion, steps = smallest_within(attempt, least, max_drop)
    return replace(conversion, drops=steps)


def _conversion(model: nn.Module, converted: Converted, run: Trace | None) -> Conversion:
    """The record of a network that was converted by a plan."""
    plan = converted.plan
    records = _records(model, converted.model, plan)
    cost = network_cost(model, plan, run)
    return Conversion(converted.model, plan, records, cost, converted.calibration)


def _run_on_calibration(model: nn.Module, lam: Any, calibration: Iterable[Any]) -> tuple[Iterable[Any], Trace | None]:
    """All calibration batches, and a run of the network on its own input or else on the first of them."""
    if lam == "full" or default_input(model) is not None or not isinstance(calibration, Iterable):
        return calibration, trace_if_possible(model, lam, None)
    batches = items(calibration)
    first = list(itertools.islice(batches, 1))
    with suppress(UsageError, UserCodeError):  # calibration says what is wrong with its inputs
        run = trace(model, Reader(model)(first[0])) if first else None
        return itertools.chain(first, batches), run
    return itertools.chain(first, batches), None


def _records(model: nn.Module, converted: nn.Module, plan: Plan) -> tuple[LayerRecord, ...]:
    """What became of each layer that a plan names, in the order of the network."""
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


def _other_text(planned: LayerPlan, total: int) -> str:
    """What a layer keeps on axes that the number of positions kept does not show."""
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
        keeps=_other_text(planned, total),
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
    # With an orthonormal basis the energy of what was cut is exactly the squared error.
    return replace(record, energy=1.0 if planned.whole else max(0.0, 1 - error**2), error=error, **facts)
