"""convert(): make the harmonic counterpart of a pretrained network (paper sec. 5.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from ..arguments import Budget
from ..calibration import CalibrationSettings, Progress, calibrate
from ..calibration.reading import Reader, items
from ..errors import Argument, InputError, UsageError, UserCodeError, shortened
from ..kernels.basis import Basis
from ..metrics import MetricLike, NetworkMetric, network_metric
from ..network.checks import check_network, check_weights
from ..network.tracing import Trace, find_layers, trace, trace_if_possible
from ..network.values import default_input
from ..plan import Bits, BitsSetting, Plan, RankSetting, apply_plan, make_plan
from ..plan.precision import MOST_BITS
from ..search.dropping import Step, smallest_within
from ..search.records import SearchSettings
from ..search.searching import Converted, Scope, Searching
from .coding import code, code_within, coded_conversion
from .conversion import LEAST_CUT, RECORD_KEY, Conversion, LayerRecord, conversion_of
from .showing import log, reported

__all__ = ["LEAST_CUT", "RECORD_KEY", "Conversion", "LayerRecord", "convert"]

# The bits per weight from which and to which a search for the largest allowed drop looks, and its steps.
_DROP_BITS, _DROP_STEPS = (0.5, 8.0), 6


def convert(
    model: nn.Module,
    lam: str | int | Mapping[str, int] | Plan = "full",
    *,
    example_input: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    basis: str = "dct",
    normalization: str = "ortho",
    rank: float | int | Mapping[str, float | int] | None = None,
    bits: float | str | Mapping[str, float] | None = None,
    budget: str | Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    metric: MetricLike | NetworkMetric | None = None,
    labelled: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    settings: CalibrationSettings | None = None,
    search: SearchSettings | None = None,
    progress: Progress | bool | None = None,
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
        rank: give the weights of convolutions and linear layers a low rank: a share of the full rank (a float above 0
            and at most 1.0), or the rank (an integer); or a dict from pattern to ranks of layers. Without patterns, the
            layer that reads the input, depthwise layers and the classifier stay whole, and so does every layer that
            would not become smaller.
        bits: quantise the weights of all layers (convolutions, linear and recurrent layers, embeddings, attention) to
            this many bits per weight on average, for an entropy coded file; or a dict from pattern to bits of layers.
            Without it nothing is quantised. ``"auto"`` with ``max_drop``: find the fewest bits.
        budget: instead of ``lam``: a share of the parameters, bytes, MACs or time on this machine of the whole network,
            such as ``{"params": 0.6}`` or ``"latency=50%"``, or an amount, such as ``"bytes=10MB"``. Time is that of
            the factored form on ``example_input``. A search finds the plan with the smallest error within the budget
            (`harmconvert.search.choosing`). Bytes are those of the file that `save` writes, and a share is
            relative to the bytes of the tensors now. All weights are quantised to the bits per weight that the budget
            allows, and ``lam`` may be given as well.
        max_drop: instead of ``lam``: find the fewest parameters at which ``metric`` falls by at most this many points.
            The search bisects over budgets; `Conversion.drops` has its steps. With ``bits="auto"`` it finds the fewest
            bits per weight instead.
        metric: what measures the quality of a network: a name, a `harmconvert.metrics.Metric` or a function of
            (outputs, targets) or (model, loader), as for `evaluate`, on ``labelled``; default: top-1. Without
            ``labelled``, a function of a network that returns points. Higher is better, unless the function has the
            attribute ``higher_is_better = False``.
        labelled: batches of (inputs, targets) on which ``metric`` is measured, as for `evaluate`.
        calibration: batches of 32 inputs or more in total for the refit: tensors, (input, target) pairs whose target is
            ignored, or dicts of keywords. They are read once.
        settings: settings of the calibration.
        search: settings of the search for a budget.
        progress: show a progress bar; None: in an interactive session (a Python prompt, IPython, a notebook). Or a
            function of (steps done, steps, name of the step). The logger ``harmconvert`` gets a line for each stage.

    Raises:
        UsageError: the lambda is unknown, a pattern matches no layer, or the network does not accept the input.
        InputError: the network has no layer to convert, weights or calibration inputs are not finite, or there are no
            calibration inputs.
    """
    check_network(model)
    check_weights(model)
    _check_choices(lam, rank, bits, budget, max_drop, labelled if metric is None else metric)
    setting = None if bits is None or isinstance(bits, str) else BitsSetting.of(bits)
    search = search or SearchSettings(say=log.info)
    with reported(progress, "converting") as report:
        job = _Job(
            model, example_input, Scope(include, exclude, Basis(basis, normalization)), calibration,
            settings or CalibrationSettings(), report, setting, None if rank is None else RankSetting.of(rank),
        )  # fmt: skip
        if max_drop is not None:
            quality = network_metric(metric, labelled, model)
            if bits == "auto":
                return _fewest_bits_within_drop(job, max_drop, quality)
            return _convert_within_drop(job, max_drop, quality, search)
        if budget is not None:
            parsed = Budget.parse(budget)
            if parsed.unit == "bytes":
                return _convert_within_bytes(job, lam, parsed)
            return _convert_within_budget(job, parsed, search)
        return _convert_by_policy(job, lam)


def _check_choices(
    lam: Any, rank: Any, bits: Any, budget: str | Mapping[str, Any] | None, max_drop: float | None, metric: Any
) -> None:
    """Refuse arguments of `convert` that contradict each other."""
    if isinstance(bits, str) and (bits != "auto" or max_drop is None):
        raise UsageError(
            "bits='auto' finds the fewest bits within max_drop: give max_drop and metric, or a number of bits"
        )
    if (max_drop is None) != (metric is None):
        raise UsageError(
            "max_drop needs a metric of the network or labelled batches, and these need max_drop: give both"
        )
    if rank is not None and bits != "auto" and (max_drop is not None or _counts(budget)):
        raise UsageError(
            Argument("rank", rank), " and ", Argument("budget"), " or ", Argument("max_drop"),
            " both say what to keep: give only one",
        )  # fmt: skip
    if max_drop is not None and (budget is not None or lam != "full"):
        raise UsageError("max_drop finds the size of the network: leave out lam and budget")
    if lam != "full" and _counts(budget):
        raise UsageError(f"lam (={lam!r}) and budget (={budget!r}) both say what to keep: give only one")


def _counts(budget: str | Mapping[str, Any] | None) -> bool:
    """Return whether a budget limits something other than bytes."""
    return budget is not None and Budget.parse(budget).unit != "bytes"


@dataclass(frozen=True)
class _Job:
    """The arguments that all ways of converting share."""

    model: nn.Module
    example_input: Any
    scope: Scope
    calibration: Iterable[Any] | None
    settings: CalibrationSettings
    progress: Progress
    bits: BitsSetting | None = None
    rank: RankSetting | None = None


def _planned(job: _Job, lam: str | int | Mapping[str, int] | Plan) -> tuple[Plan, Iterable[Any] | None, Trace | None]:
    """Return the plan by a policy, all calibration batches, and the trace."""
    model, calibration = job.model, job.calibration
    if calibration is not None and job.example_input is None:
        calibration, run = _run_on_calibration(model, lam if job.rank is None else "any", calibration)
    else:
        run = trace_if_possible(model, lam if job.rank is None else "any", job.example_input)
    plan = make_plan(
        find_layers(model, run), lam, job.scope.include, job.scope.exclude, job.scope.basis, job.bits, job.rank
    )
    if not plan.layers:
        why = {skip.name: skip.why for skip in plan.skipped} | dict(plan.notes)
        reasons = shortened([f"{name}: {reason}" for name, reason in why.items()], 3) or "it has none"
        every = job.bits is not None or job.rank is not None
        what = "convolution and no linear layer" if every else "convolution over 1x1"
        raise InputError(f"this {type(model).__name__} has no {what} to convert ({reasons})")
    return plan, calibration, run


def _convert_by_policy(job: _Job, lam: str | int | Mapping[str, int] | Plan) -> Conversion:
    model = job.model
    plan, calibration, run = _planned(job, lam)
    converted = Converted(plan, apply_plan(model, plan))
    if plan.on(Bits.axis):
        record, entries = code(job.model, converted, calibration, job.settings, job.progress)
        return coded_conversion(job.model, converted, record, entries, run)
    conversion = conversion_of(model, converted, run)
    if calibration is None:
        return conversion
    calibrated = calibrate(model, converted.model, plan, calibration, job.settings, job.progress)
    return replace(conversion, calibration=calibrated)


def _convert_within_bytes(job: _Job, lam: str | int | Mapping[str, int] | Plan, budget: Budget) -> Conversion:
    if job.bits is not None:
        raise UsageError(f"bits and the budget {budget} both say how many bits weights have: give only one")
    plan, calibration, run = _planned(replace(job, bits=BitsSetting(MOST_BITS)), lam)
    return code_within(job.model, plan, budget, calibration, job.settings, job.progress, run)


def _fewest_bits_within_drop(job: _Job, max_drop: float, metric: NetworkMetric) -> Conversion:
    """Return the conversion with the fewest bits whose metric is at most ``max_drop`` points worse."""
    uncut_metric = metric(job.model)
    job = replace(job, calibration=None if job.calibration is None else tuple(job.calibration))
    low, high = (math.log2(bits) for bits in _DROP_BITS)
    steps: list[Step] = []
    best: Conversion | None = None
    for number in range(_DROP_STEPS + 1):
        bits = 2 ** ((low + high) / 2 if number else high)
        conversion = _convert_by_policy(replace(job, bits=BitsSetting(bits)), "full")
        drop = metric.drop(uncut_metric, conversion.model)
        steps.append(Step(conversion.cost.harmonic_bytes / max(conversion.cost.bytes, 1), drop))
        log.info("%g bits per weight: %s is worse by %.2f points", bits, metric.name, drop)
        if drop <= max_drop:
            high, best = math.log2(bits), conversion
        elif best is None:
            raise UsageError(
                f"with {bits:g} bits per weight {metric.name} is worse by {drop:.2f} points, more than {max_drop:g}: "
                "allow a larger drop, or give calibration inputs"
            )
        else:
            low = math.log2(bits)
    assert best is not None
    return replace(best, drops=tuple(steps))


def _convert_within_budget(job: _Job, budget: Budget, search: SearchSettings) -> Conversion:
    searching = _searching(job, budget, search)
    converted, record = searching()
    if job.bits is not None:
        job = replace(job, calibration=searching.images)
        return replace(_convert_by_policy(job, converted.plan), search=record)
    return replace(conversion_of(job.model, converted, searching.trace), search=record)


def _searching(job: _Job, budget: Budget, search: SearchSettings) -> Searching:
    run = trace_if_possible(job.model, "any", job.example_input)
    images = None if job.calibration is None else tuple(job.calibration)
    example = default_input(job.model) if job.example_input is None else job.example_input
    searching = Searching(
        job.model, budget, find_layers(job.model, run), run, job.scope, images, job.settings, search, example
    )
    searching.progress = job.progress
    return searching


def _convert_within_drop(job: _Job, max_drop: float, metric: NetworkMetric, search: SearchSettings) -> Conversion:
    """Return the smallest conversion whose metric is at most ``max_drop`` points worse than the uncut one's."""
    images = None if job.calibration is None else tuple(job.calibration)
    job = replace(job, calibration=images)
    least_share = _searching(job, Budget("params", 1.0), SearchSettings()).least_share()
    uncut_metric = metric(job.model)
    with TemporaryDirectory() as folder:  # one file of probes for all budgets, so that each layer is probed once
        settings = search if search.probes else replace(search, probes=str(Path(folder) / "probes.json"))

        def attempt(share: float) -> tuple[Conversion, float]:
            budget = Budget.parse({"params": share})
            conversion = _convert_within_budget(job, budget, settings) if share < 1 else _convert_by_policy(job, "full")
            drop = metric.drop(uncut_metric, conversion.model)
            log.info("%.0f%% of the parameters: %s is worse by %.2f points", 100 * share, metric.name, drop)
            return conversion, drop

        conversion, steps = smallest_within(attempt, least_share, max_drop)
    return replace(conversion, drops=steps)


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
