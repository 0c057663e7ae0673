"""Settings of a search, and the record of what it tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..arguments import UNITS as UNITS
from ..arguments import Budget as Budget
from ..errors import UsageError

FREQUENCIES = ("lambda", "best")


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Args:
        trials: number of whole plans to try on the network; 0 relies on the scores of single layers.
        probes: file that stores the scores; None stores nothing.
        say: called with a message about the reachable range before the work begins.
        frequencies: ``"lambda"`` keeps each layer's lowest frequencies; ``"best"`` also tries, for each size, the set
            of frequencies that the layer's output needs most.
        axes: names of the axes on which the search chooses, such as ``("space",)``; None: all that save the unit.
    """

    trials: int = 8
    probes: str | None = None
    say: Callable[[str], None] = field(default=lambda message: None, compare=False)
    frequencies: str = "lambda"
    axes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.trials < 0:
            raise UsageError(f"{self.trials} trials: give 0 or more")
        if self.frequencies not in FREQUENCIES:
            raise UsageError(f"unknown frequencies {self.frequencies!r}: use one of {', '.join(FREQUENCIES)}")


@dataclass(frozen=True)
class Tried:
    """A plan that was tried.

    Its origin, its cost, the sum of its layers' scores, and its divergence measured on held-back images (None: it was
    not measured).
    """

    origin: str
    cost: int
    expected: float
    measured: float | None = None


@dataclass(frozen=True)
class Search:
    """The record of a search.

    ``whole``, ``limit`` and ``smallest`` are costs: of the uncut network, of the budget, and of the smallest plan.
    ``scored_by`` is ``"divergence"`` (on images) or ``"energy"`` (without images). ``taken`` is the index of the chosen
    plan in ``tried``. ``frontier`` has (cost, score) of the best plans of each size. ``notes`` name the layers whose
    frequencies were not chosen by output error.
    """

    budget: str
    unit: str
    whole: int
    limit: int
    smallest: int
    scored_by: str
    tried: tuple[Tried, ...]
    taken: int
    frontier: tuple[tuple[int, float], ...]
    exact: bool
    frequencies: str = "lambda"
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Tried:
        """Return the plan that was chosen."""
        return self.tried[self.taken]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each plan that was tried, then one for each point of the frontier."""
        tried = [
            {"plan": plan.origin, "cost": plan.cost, "share": plan.cost / self.whole, "summed": plan.expected,
             "measured": plan.measured, "taken": index == self.taken}
            for index, plan in enumerate(self.tried)
        ]  # fmt: skip
        front = [
            {"plan": "frontier", "cost": cost, "share": cost / self.whole, "summed": score, "measured": None,
             "taken": False}
            for cost, score in self.frontier
        ]  # fmt: skip
        return [*tried, *front]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return asdict(self)
