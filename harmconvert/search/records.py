"""What a search is asked for and what it found."""

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
    """``trials``: whole plans tried on the network (0 trusts the scores of single layers); ``probes``: file in which
    scores are kept; ``say`` is told what can be reached before the work begins; ``frequencies``: ``"lambda"`` keeps the
    lowest of each layer, ``"best"`` also tries those whose loss costs that layer's output most, one size after the
    other."""

    trials: int = 8
    probes: str | None = None
    say: Callable[[str], None] = field(default=lambda message: None, compare=False)
    frequencies: str = "lambda"

    def __post_init__(self) -> None:
        if self.trials < 0:
            raise UsageError(f"{self.trials} trials: give 0 or more")
        if self.frequencies not in FREQUENCIES:
            raise UsageError(f"unknown frequencies {self.frequencies!r}: use one of {', '.join(FREQUENCIES)}")


@dataclass(frozen=True)
class Tried:
    """A plan: where it comes from, what it costs, the sum of its layers' scores, and the divergence that it was seen to
    have on images held back (None: not tried)."""

    origin: str
    cost: int
    expected: float
    measured: float | None = None


@dataclass(frozen=True)
class Search:
    """How a plan was found: the budget, its limit, what can be reached, how cuts were scored (``divergence`` on images,
    or ``energy`` without), all plans tried, the best plans of every size by their scores, and which was taken.
    ``frequencies`` as in `SearchSettings`; ``notes`` say where single frequencies were chosen by something else than
    the output error."""

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
        """The plan that was taken."""
        return self.tried[self.taken]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each plan tried, then for each point of the frontier of scores."""
        seen = [
            {"plan": plan.origin, "cost": plan.cost, "share": plan.cost / self.whole, "summed": plan.expected,
             "measured": plan.measured, "taken": index == self.taken}
            for index, plan in enumerate(self.tried)
        ]  # fmt: skip
        front = [
            {"plan": "frontier", "cost": cost, "share": cost / self.whole, "summed": score, "measured": None,
             "taken": False}
            for cost, score in self.frontier
        ]  # fmt: skip
        return [*seen, *front]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)
