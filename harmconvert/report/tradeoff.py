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
    """A network and what it did on the test images. ``lambdas``: the policies that come to this very plan (none: the
    uncut network); ``note``: what a user should know of its calibration."""

    lambdas: tuple[str, ...]
    calibrated: bool
    cost: Cost
    evaluation: Evaluation
    note: str | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the network in this form."""
        return self.cost.harmonic_parameters if self.lambdas else self.cost.parameters

    @property
    def parameter_share(self) -> float:
        """The parameters over those of the uncut network."""
        return self.parameters / max(self.cost.parameters, 1)

    @property
    def mac_share(self) -> float | None:
        """MACs of the factored form over those of the uncut network."""
        if not self.lambdas:
            return 1.0
        return None if self.cost.factored_macs is None else self.cost.factored_macs / max(self.cost.dense_macs or 0, 1)

    @property
    def error(self) -> float | None:
        """Top-1 error in %, None without labels."""
        return None if self.evaluation.top1 is None else 100 * (1 - self.evaluation.top1)

    @property
    def error_interval(self) -> tuple[float, float] | None:
        """Its 95 % confidence interval."""
        found = self.evaluation.interval
        return None if found is None else (100 * (1 - found[1]), 100 * (1 - found[0]))

    @property
    def disagreement(self) -> float:
        """Images whose top-1 is another than the uncut network's, in %."""
        return 0.0 if self.evaluation.agreement is None else 100 * (1 - self.evaluation.agreement)

    @property
    def disagreement_interval(self) -> tuple[float, float]:
        """Its 95 % confidence interval; of the uncut network itself nothing is uncertain."""
        if self.evaluation.agreement is None:
            return 0.0, 0.0
        low, high = wilson_interval(self.evaluation.agreement, self.evaluation.images)
        return 100 * (1 - high), 100 * (1 - low)

    @property
    def divergence(self) -> float:
        """Mean KL of the class probabilities from the uncut network's, in nats."""
        return self.evaluation.divergence or 0.0

    def row(self) -> dict[str, Any]:
        """The figures of this point, flat; shares from 0 to 1, errors in %."""
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
    """The uncut network and its cuts, plain and calibrated, largest first."""

    uncut: Point
    points: tuple[Point, ...]

    @property
    def labelled(self) -> bool:
        """Whether the images had labels, so that there is an error to speak of."""
        return self.uncut.error is not None

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point, the uncut network first."""
        return [point.row() for point in (self.uncut, *self.points)]


def tradeoff(
    model: nn.Module,
    worth: Callable[[nn.Module, nn.Module | None], Evaluation],
    *,
    example_input: Any = None,
    include: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    settings: CalibrationSettings | None = None,
    policies: Sequence[str | int] = POLICIES,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Tradeoff:
    """Convert ``model`` by each policy, plainly and, where there is ``calibration``, calibrated, and see what is lost.

    Args:
        worth: evaluates its first argument on the test images, beside the second where there is one.
        calibration, settings, include, example_input: as for `convert`; the batches are read once for every policy.
        progress: called with (networks done, networks at most, lambda).

    Raises: as `convert`; InputError also where no policy cuts anything.
    """
    plans = _distinct_plans(model, policies, example_input, include)
    total = 1 + len(plans) + (calibration is not None) * sum(not plan.whole for _, plan in plans)
    points: list[Point] = []

    def add(lambdas: tuple[str, ...], plan: Plan, data: Iterable[Any] | None) -> None:
        progress(1 + len(points), total, f"lambda {lambdas[0]}{', calibrated' if data is not None else ''}")
        done = convert(model, plan, example_input=example_input, calibration=data, settings=settings)
        points.append(Point(lambdas, data is not None, done.cost, worth(done.model, model), _note(done)))

    progress(0, total, "uncut")
    found = worth(model, None)
    for lambdas, plan in plans:
        add(lambdas, plan, None)
        if calibration is not None and not plan.whole:
            add(lambdas, plan, calibration)
    uncut = Point((), False, points[0].cost, found)
    return Tradeoff(uncut, tuple(sorted(points, key=lambda point: -point.parameters)))


def _distinct_plans(
    model: nn.Module, policies: Sequence[str | int], example_input: Any, include: Sequence[str]
) -> list[tuple[tuple[str, ...], Plan]]:
    """The plan of each policy, equal ones once, with the names of all policies that come to it."""
    check_network(model)
    run = trace_if_possible(model, "progressive", example_input)
    layers = find_layers(model, run)
    found: dict[Any, tuple[tuple[str, ...], Plan]] = {}
    notes: dict[str, str] = {}
    for lam in policies:
        plan = make_plan(layers, lam, include)
        notes |= plan.notes
        names, first = found.get(plan.layers, ((), plan))
        found[plan.layers] = ((*names, plan.policy), first)
    if all(plan.whole for _, plan in found.values()):
        spared = shortened([f"{name} ({why.removeprefix('whole: ')})" for name, why in notes.items()], 2)
        what = f"there is no trade-off to draw, because no lambda cuts anything here: {spared or 'nothing is over 1x1'}"
        raise InputError(what, "; to cut a layer all the same, name it with ", Argument("include", "PATTERN"))
    return list(found.values())


def _note(conversion: Conversion) -> str | None:
    failed = conversion.calibration.failed if conversion.calibration else ()
    stay = "stays" if len(failed) == 1 else "stay"
    return f"{counted(len(failed), 'layer')} could not be calibrated and {stay} a plain cut" if failed else None
