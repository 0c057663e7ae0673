"""Error against parameters as lambda varies (paper fig. 4), as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration import CalibrationSettings
from ..errors import Argument, InputError, counted, shortened
from ..network.checks import check_network
from ..network.tracing import find_layers, trace_if_possible
from ..pipeline.convert import Conversion, convert
from ..plan import Plan, make_plan
from ..plan.cost import Cost
from ..training.evaluation import Evaluation, wilson_interval

POLICIES: tuple[str | int, ...] = ("full", 3, "progressive", 2, 1)


@dataclass(frozen=True)
class Point:
    """A network and its evaluation on the test images.

    ``lambdas``: the policies that give the plan of the network; empty for the uncut network. ``note``: layers that
    could not be calibrated.
    """

    lambdas: tuple[str, ...]
    calibrated: bool
    cost: Cost
    evaluation: Evaluation
    note: str | None = None

    @property
    def parameters(self) -> int:
        """Return the number of parameters in harmonic form; of the uncut network in its own form."""
        return self.cost.harmonic_parameters if self.lambdas else self.cost.parameters

    @property
    def parameter_share(self) -> float:
        """Return the number of parameters, divided by that of the uncut network."""
        return self.parameters / max(self.cost.parameters, 1)

    @property
    def mac_share(self) -> float | None:
        """Return the MACs of the factored form, divided by those of the uncut network; None if they are not known."""
        if not self.lambdas:
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

    def row(self) -> dict[str, Any]:
        """Return the numbers of this point as a row: shares from 0 to 1, errors in %."""
        low, high = self.error_interval or (None, None)
        return {
            "lambda": ", ".join(self.lambdas) or "uncut",
            "calibrated": self.calibrated,
            "parameters": self.parameters,
            "parameter_share": self.parameter_share,
            "factored_mac_share": self.mac_share,
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
class Tradeoff:
    """The uncut network, and its plain and calibrated cuts; the largest network is first."""

    uncut: Point
    points: tuple[Point, ...]

    @property
    def labelled(self) -> bool:
        """Return whether the images have labels, so that the error is known."""
        return self.uncut.error is not None

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each point; the uncut network is first."""
        return [point.row() for point in (self.uncut, *self.points)]


def tradeoff(
    model: nn.Module,
    evaluate: Callable[[nn.Module, nn.Module | None], Evaluation],
    *,
    example_input: Any = None,
    include: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    settings: CalibrationSettings | None = None,
    policies: Sequence[str | int] = POLICIES,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Tradeoff:
    """Convert a network by each policy, without and (if ``calibration`` is given) with calibration, and evaluate it.

    Args:
        evaluate: evaluates the network in its first argument on the test images. If the second argument is a network,
            the two are compared.
        calibration, settings, include, example_input: as for `convert`. The batches are read once for each policy.
        progress: called with the number of finished networks, their total number, and a text with the lambda.

    Raises: the errors of `convert`. Also InputError if no policy cuts a layer.
    """
    plans = _distinct_plans(model, policies, example_input, include)
    total = 1 + len(plans) + (calibration is not None) * sum(not plan.whole for _, plan in plans)
    points: list[Point] = []

    def add(lambdas: tuple[str, ...], plan: Plan, data: Iterable[Any] | None) -> None:
        progress(1 + len(points), total, f"lambda {lambdas[0]}{', calibrated' if data is not None else ''}")
        conversion = convert(model, plan, example_input=example_input, calibration=data, settings=settings)
        evaluation = evaluate(conversion.model, model)
        points.append(Point(lambdas, data is not None, conversion.cost, evaluation, _note(conversion)))

    progress(0, total, "uncut")
    uncut_evaluation = evaluate(model, None)
    for lambdas, plan in plans:
        add(lambdas, plan, None)
        if calibration is not None and not plan.whole:
            add(lambdas, plan, calibration)
    uncut = Point((), False, points[0].cost, uncut_evaluation)
    return Tradeoff(uncut, tuple(sorted(points, key=lambda point: -point.parameters)))


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
