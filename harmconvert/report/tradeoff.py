"""Error against parameters as lambda varies (paper fig. 4), or against bytes as bits per weight vary, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..calibration import CalibrationSettings
from ..errors import Argument, InputError, counted, shortened
from ..metrics.intervals import wilson_interval
from ..network.checks import check_network
from ..network.tracing import find_layers, trace_if_possible
from ..pipeline.convert import Conversion, convert
from ..plan import BitsSetting, Plan, make_plan, parameter_count
from ..plan.cost import Cost
from ..storage.checkpoint import Header
from ..training.evaluation import Evaluation
from .coding import layer_bytes
from .facts import total_bytes

POLICIES: tuple[str | int, ...] = ("full", 3, "progressive", 2, 1)


@dataclass(frozen=True)
class Point:
    """A network and its evaluation on the test images.

    ``lambdas``: the policies that give the plan of the network; empty for the uncut network, and for coded networks.
    ``bits``: per coded weight. ``note``: layers that could not be calibrated. ``this_file``: the network is that of the
    user's file.
    """

    lambdas: tuple[str, ...]
    calibrated: bool
    cost: Cost
    evaluation: Evaluation
    note: str | None = None
    bits: float | None = None
    this_file: bool = False

    @property
    def converted(self) -> bool:
        """Return whether this is not the uncut network."""
        return bool(self.lambdas) or self.bits is not None

    @property
    def name(self) -> str:
        """Return the lambdas or the bits of the network."""
        if self.this_file:
            return "this file"
        return bits_text(self.bits) if self.bits is not None else ", ".join(self.lambdas) or "uncut"

    @property
    def parameters(self) -> int:
        """Return the number of parameters in harmonic form; of the uncut network in its own form."""
        return self.cost.harmonic_parameters if self.converted else self.cost.parameters

    @property
    def bytes(self) -> int:
        """Return the bytes of the tensors in a file."""
        return self.cost.harmonic_bytes if self.converted else self.cost.bytes

    @property
    def byte_share(self) -> float:
        """Return the bytes, divided by those of the uncut network."""
        return self.bytes / max(self.cost.bytes, 1)

    @property
    def parameter_share(self) -> float:
        """Return the number of parameters, divided by that of the uncut network."""
        return self.parameters / max(self.cost.parameters, 1)

    @property
    def mac_share(self) -> float | None:
        """Return the MACs of the factored form, divided by those of the uncut network; None if they are not known."""
        if not self.converted:
            return 1.0
        return None if self.cost.factored_macs is None else self.cost.factored_macs / max(self.cost.dense_macs or 0, 1)

    @property
    def error(self) -> float | None:
        """Return the top-1 error in %; None without labels."""
        return None if self.evaluation.top1 is None else 100 * (1 - self.evaluation.top1)

    @property
    def error_interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of the error."""
        interval = self.evaluation.interval
        return None if interval is None else (100 * (1 - interval[1]), 100 * (1 - interval[0]))

    @property
    def disagreement(self) -> float:
        """Return the share of images on which the top-1 class differs from the uncut network's, in %."""
        return 0.0 if self.evaluation.agreement is None else 100 * (1 - self.evaluation.agreement)

    @property
    def disagreement_interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the disagreement; (0, 0) for the uncut network."""
        if self.evaluation.agreement is None:
            return 0.0, 0.0
        low, high = wilson_interval(self.evaluation.agreement, self.evaluation.images)
        return 100 * (1 - high), 100 * (1 - low)

    @property
    def divergence(self) -> float:
        """Return the mean KL divergence from the uncut network's class probabilities, in nats."""
        return self.evaluation.divergence or 0.0

    def row(self, coded: bool = False) -> dict[str, Any]:
        """Return the numbers of this point as a row: shares from 0 to 1, errors in %.

        ``coded``: the row is for a trade-off of coded networks.
        """
        low, high = self.error_interval or (None, None)
        size = {
            "parameters": self.parameters,
            "parameter_share": self.parameter_share,
            "factored_mac_share": self.mac_share,
        }
        if coded:
            size = {"bits": self.bits, "bytes": self.bytes, "byte_share": self.byte_share}
        return {
            "network" if coded else "lambda": self.name,
            "calibrated": self.calibrated,
            **size,
            "images": self.evaluation.images,
            "labelled": self.evaluation.labelled,
            "error": self.error,
            "error_low": low,
            "error_high": high,
            "disagreement": self.disagreement,
            "disagreement_low": self.disagreement_interval[0],
            "disagreement_high": self.disagreement_interval[1],
            "divergence": self.divergence,
            "note": self.note,
        }


@dataclass(frozen=True)
class CodedFile:
    """The network of a coded checkpoint.

    ``parameters``: of the harmonic form. ``bytes``: of the tensors in the file. ``bits``: per coded weight.
    """

    model: nn.Module
    parameters: int
    bytes: int
    bits: float
    calibrated: bool

    @classmethod
    def of(cls, model: nn.Module, header: Header) -> CodedFile | None:
        """Return the facts about a network in harmonic form; None if no weight is coded."""
        layers = layer_bytes(model, header.codecs.coded)
        total = total_bytes(layers)
        if total.bits is None:
            return None
        size = total.coded_bytes + total.plain_bytes
        return cls(model, parameter_count(model), size, total.bits, "calibration" in header.history)


@dataclass(frozen=True)
class Tradeoff:
    """The uncut network, and its plain and calibrated cuts or its codings; the largest network is first.

    ``this_file``: the coded network of the user's file.
    """

    uncut: Point
    points: tuple[Point, ...]
    this_file: Point | None = None

    @property
    def coded(self) -> bool:
        """Return whether the points differ in bits, so that their size is in bytes and not in parameters."""
        return any(point.bits is not None for point in self.points)

    @property
    def every(self) -> tuple[Point, ...]:
        """Return all points; the uncut network is first."""
        return (self.uncut, *self.points, *([self.this_file] if self.this_file else []))

    @property
    def labelled(self) -> bool:
        """Return whether the images have labels, so that the error is known."""
        return self.uncut.error is not None

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each point; the uncut network is first."""
        return [point.row(self.coded) for point in self.every]


def bits_text(bits: float) -> str:
    """Return a number of bits as text.

    >>> bits_text(1), bits_text(2.5)
    ('1 bit', '2.5 bits')
    """
    return f"{bits:g} bit{'s' * (bits != 1)}"


def tradeoff(
    model: nn.Module,
    evaluate: Callable[[nn.Module, nn.Module | None], Evaluation],
    *,
    example_input: Any = None,
    include: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    settings: CalibrationSettings | None = None,
    policies: Sequence[str | int] = POLICIES,
    bits: Sequence[float] = (),
    lam: str | int | Mapping[str, int] | Plan = "full",
    coded_file: CodedFile | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Tradeoff:
    """Convert a network by each policy, without and (if ``calibration`` is given) with calibration, and evaluate it.

    With ``bits``, code the network with each of these numbers of bits instead: with calibration if ``calibration`` is
    given, else without.

    Args:
        evaluate: evaluates the network in its first argument on the test images. If the second argument is a network,
            the two are compared.
        calibration, settings, include, example_input: as for `convert`. The batches are read once for each policy, or
            for each number of bits.
        bits: numbers of bits per weight, such as ``[2, 3, 4]``.
        lam: with ``bits``: what to keep of every coded network, as for `convert`.
        coded_file: with ``bits``: a coded checkpoint to show beside the others.
        progress: called with the number of finished networks, their total number, and a text with the lambda.

    Raises: the errors of `convert`. Also InputError if no policy cuts a layer.
    """
    if bits:
        rates = sorted({BitsSetting.of(rate).average or 0.0 for rate in bits}, reverse=True)
        jobs = [_Job((), rate, {"lam": lam, "include": include, "calibration": calibration}) for rate in rates]
    else:
        plans = _distinct_plans(model, policies, example_input, include)
        jobs = [job for lambdas, plan in plans for job in _cuts(lambdas, plan, calibration)]
    total = 1 + len(jobs) + (coded_file is not None)
    progress(0, total, "uncut")
    uncut_evaluation, points = evaluate(model, None), list[Point]()
    for done, job in enumerate(jobs, 1):
        progress(done, total, job.name)
        conversion = convert(model, **job.arguments, bits=job.bits, example_input=example_input, settings=settings)
        evaluation = evaluate(conversion.model, model)
        points.append(Point(job.lambdas, job.calibrated, conversion.cost, evaluation, _note(conversion), job.bits))
        del conversion  # before the next network is made
    cost = points[0].cost
    uncut = Point((), False, cost, uncut_evaluation)
    points.sort(key=lambda point: -point.bytes if bits else -point.parameters)
    if coded_file is None or not bits:
        return Tradeoff(uncut, tuple(points))
    progress(total - 1, total, "this file")
    cost = replace(cost, harmonic_parameters=coded_file.parameters, harmonic_bytes=coded_file.bytes)
    evaluation = evaluate(coded_file.model, model)
    return Tradeoff(
        uncut, tuple(points), Point((), coded_file.calibrated, cost, evaluation, None, coded_file.bits, this_file=True)
    )


@dataclass(frozen=True)
class _Job:
    """A conversion to make: its policies or bits, and its other arguments for `convert`."""

    lambdas: tuple[str, ...]
    bits: float | None
    arguments: Mapping[str, Any]

    @property
    def calibrated(self) -> bool:
        return self.arguments.get("calibration") is not None

    @property
    def name(self) -> str:
        name = f"lambda {self.lambdas[0]}" if self.bits is None else bits_text(self.bits)
        return name + (", calibrated" if self.calibrated else "")


def _cuts(lambdas: tuple[str, ...], plan: Plan, calibration: Iterable[Any] | None) -> list[_Job]:
    """Return the plain cut of a plan and, if it can differ, the calibrated one."""
    plain = _Job(lambdas, None, {"lam": plan})
    if calibration is None or plan.whole:
        return [plain]
    return [plain, _Job(lambdas, None, {"lam": plan, "calibration": calibration})]


def _distinct_plans(
    model: nn.Module, policies: Sequence[str | int], example_input: Any, include: Sequence[str]
) -> list[tuple[tuple[str, ...], Plan]]:
    """Return the different plans of the policies, each with the names of the policies that give it."""
    check_network(model)
    trace = trace_if_possible(model, "progressive", example_input)
    layers = find_layers(model, trace)
    policies_by_layers: dict[Any, tuple[tuple[str, ...], Plan]] = {}
    notes: dict[str, str] = {}
    for lam in policies:
        plan = make_plan(layers, lam, include)
        notes |= plan.notes
        names, first = policies_by_layers.get(plan.layers, ((), plan))
        policies_by_layers[plan.layers] = ((*names, plan.policy), first)
    if all(plan.whole for _, plan in policies_by_layers.values()):
        whole_layers = shortened([f"{name} ({why.removeprefix('whole: ')})" for name, why in notes.items()], 2)
        reasons = whole_layers or "no kernel is larger than 1x1"
        what = f"there is no trade-off to draw, because no lambda cuts a layer of this network: {reasons}"
        raise InputError(what, "; to cut such a layer, name it with ", Argument("include", "PATTERN"))
    return list(policies_by_layers.values())


def _note(conversion: Conversion) -> str | None:
    failed = conversion.calibration.failed if conversion.calibration else ()
    keep = "keeps" if len(failed) == 1 else "keep"
    return f"{counted(len(failed), 'layer')} could not be calibrated and {keep} the plain cut" if failed else None
