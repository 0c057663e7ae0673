"""Choose the plan within a budget that changes the network's outputs least.

Each layer is cut alone, to several sizes. Its score is the change in the network's outputs. Dynamic programming then
chooses one size for each layer within the budget. Finally, whole plans are tried on the network, because the scores of
single layers do not add up when the cuts are deep.

The parts: searching.py runs the search on a network; `choose` here chooses among plans; choices.py lists the choices
and their costs; latency.py measures costs as times; orders.py finds the frequencies that a layer needs least; probes.py
stores scores in a file; energy.py computes scores without images; knapsack.py makes the exact choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..arguments import UNITS as UNITS
from ..arguments import Budget as Budget
from ..errors import Argument, UsageError
from ..plan.plan import Plan
from .choices import Item, plan_of
from .knapsack import Frontier, frontier
from .records import Search, Tried


def limit_of(budget: Budget, whole: int, changes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the budget as an absolute limit, and the cost of the cheapest plan.

    Raises:
        UsageError: no plan is within the budget; the message says what can be reached.
    """
    limit, smallest = budget.limit(whole), whole + sum(min(row) for row in changes)
    if smallest > limit:
        raise UsageError(
            f"the budget {budget} cannot be met: cutting can bring the {whole:,} {UNITS[budget.unit]} of this network "
            f"to {smallest:,} at least, so ask for {math.ceil(1000 * smallest / whole) / 10:g}% or more; the layer "
            "that reads the input is cut only if it is named: ", Argument("include", "PATTERN"),
        )  # fmt: skip
    return limit, smallest


@dataclass(frozen=True)
class SearchSpace:
    """The items of a search with their choices.

    ``whole`` is the uncut plan and ``cost`` its cost. For each choice of each item, ``changes`` has the change of the
    cost, and ``scores`` the score (0 for the uncut choice). ``scored_by`` names the kind of the scores.
    """

    whole: Plan
    items: Sequence[Item]
    cost: int
    changes: Sequence[Sequence[int]]
    scores: Sequence[Sequence[float]]
    scored_by: str

    def cost_of(self, chosen: Sequence[int]) -> int:
        """Return the cost of the plan with these choices."""
        return self.cost + sum(row[choice] for row, choice in zip(self.changes, chosen, strict=True))

    def score_of(self, chosen: Sequence[int]) -> float:
        """Return the sum of the scores of these choices."""
        return sum(row[choice] for row, choice in zip(self.scores, chosen, strict=True))

    def choices_in(self, plan: Plan) -> tuple[int, ...] | None:
        """Return the choices that make a plan; None if the plan is not made of these choices."""
        planned = {layer.name: layer for layer in plan.layers}
        choices = []
        for item in self.items:
            own = {kept.axis: kept for kept in planned[item.names[0]].keeps} if item.names[0] in planned else {}
            wanted = tuple(own.get(whole.axis, whole) for whole in item.choices[0])
            if wanted not in item.choices or set(own) > {whole.axis for whole in item.choices[0]}:
                return None
            choices.append(item.choices.index(wanted))
        return tuple(choices)


def choose(
    budget: Budget,
    search_space: SearchSpace,
    others: Mapping[str, Plan],
    measure: Callable[[Plan], float | None] | None,
    trials: int,
) -> tuple[Plan, Search]:
    """Return the plan of least divergence within the budget, and a record of the search.

    Args:
        others: more plans to try, by name, if they are within the budget.
        measure: returns the divergence of a whole plan, or None if it cannot be measured. If ``measure`` is None,
            the scores alone decide.
        trials: number of whole plans to measure.

    Raises:
        UsageError: the budget cannot be met.
    """
    limit, smallest = limit_of(budget, search_space.cost, search_space.changes)
    front = frontier(search_space.changes, search_space.scores)
    starts = _starts(search_space, front, others, limit)
    tried: dict[tuple[int, ...], Tried] = {}

    def attempt(chosen: tuple[int, ...], origin: str) -> float:
        plan = plan_of(search_space.whole, search_space.items, chosen, str(budget))
        value = measure(plan) if measure and trials else None
        tried[chosen] = Tried(origin, search_space.cost_of(chosen), search_space.score_of(chosen), value)
        return math.inf if value is None else value

    (best, origin), *rest = starts.items()
    least = attempt(best, origin)
    if measure is not None:
        for chosen, origin in rest:
            if len(tried) < trials and (value := attempt(chosen, origin)) < least:
                best, least = chosen, value
        while len(tried) < trials:
            swap = next(
                (
                    s
                    for s in swaps(best, search_space.changes, search_space.scores, limit - search_space.cost)
                    if s not in tried
                ),
                None,
            )
            if swap is None:
                break
            if (value := attempt(swap, "swap")) < least:
                best, least = swap, value
    return plan_of(search_space.whole, search_space.items, best, str(budget)), Search(
        str(budget), budget.unit, search_space.cost, limit, smallest, search_space.scored_by, tuple(tried.values()),
        list(tried).index(best), _frontier_points(front, search_space.cost), front.exact,
    )  # fmt: skip


def _starts(
    search_space: SearchSpace, front: Frontier, others: Mapping[str, Plan], limit: int
) -> dict[tuple[int, ...], str]:
    """Return the choices to try first, with their origins.

    They are the best by scores, the best by square roots of the scores, and the two largest of ``others`` within the
    limit, because smaller plans are worse.
    """
    first = front.best(limit - search_space.cost)
    assert first is not None
    starts = {first: "search"}
    roots = [[math.sqrt(max(score, 0.0)) for score in row] for row in search_space.scores]
    if (rooted := frontier(search_space.changes, roots).best(limit - search_space.cost)) is not None:
        starts.setdefault(rooted, "search, by roots")
    fitting = [
        (search_space.cost_of(chosen), chosen, name)
        for name, plan in others.items()
        if (chosen := search_space.choices_in(plan)) is not None and search_space.cost_of(chosen) <= limit
    ]
    for _, chosen, name in sorted(fitting, reverse=True)[:2]:
        starts.setdefault(chosen, name)
    return starts


def swaps(
    chosen: tuple[int, ...], changes: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], limit: int
) -> Iterator[tuple[int, ...]]:
    """Yield the plans that differ from ``chosen`` in one or two items, the least total score first.

    Either one item takes another choice of the same or the next higher cost, or a second item also takes a cheaper
    choice, so that the plan stays within the limit.
    """
    cost = sum(row[choice] for row, choice in zip(changes, chosen, strict=True))
    plans: list[tuple[float, tuple[int, ...]]] = []
    for up, choice in enumerate(chosen):
        for larger in _not_smaller(changes[up], choice):
            more = cost + changes[up][larger] - changes[up][choice]
            gain = scores[up][larger] - scores[up][choice]
            if more <= limit:
                plans.append((gain, _with_changes(chosen, {up: larger})))
            if changes[up][larger] == changes[up][choice]:
                continue
            for down, row_down in enumerate(changes):
                if down == up:
                    continue
                for smaller in _smaller(row_down, scores[down], chosen[down]):
                    if more + row_down[smaller] - row_down[chosen[down]] <= limit:
                        change = gain + scores[down][smaller] - scores[down][chosen[down]]
                        plans.append((change, _with_changes(chosen, {up: larger, down: smaller})))
                        break
    yield from (plan for _, plan in sorted(plans))


def _not_smaller(row: Sequence[int], choice: int) -> list[int]:
    """Return the other choices of an item that have the same cost or the next higher cost."""
    higher = min((cost for cost in row if cost > row[choice]), default=row[choice])
    return [other for other, cost in enumerate(row) if other != choice and cost in (row[choice], higher)]


def _smaller(row: Sequence[int], scores: Sequence[float], choice: int) -> list[int]:
    """Return the choices of an item that cost less: the highest cost first, then the least score first."""
    cheaper = [other for other, cost in enumerate(row) if cost < row[choice]]
    return sorted(cheaper, key=lambda other: (-row[other], scores[other]))


def _with_changes(chosen: tuple[int, ...], changed: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(changed.get(index, choice) for index, choice in enumerate(chosen))


def _frontier_points(front: Frontier, whole: int, points: int = 60) -> tuple[tuple[int, float], ...]:
    """Return some points of the frontier, evenly spaced in cost, from the smallest plan to the whole one."""
    targets = [front.costs[0] + (front.costs[-1] - front.costs[0]) * step / (points - 1) for step in range(points)]
    indices = sorted({int(i) for i in front.costs.searchsorted(targets).clip(0, len(front.costs) - 1)})
    return tuple((whole + int(front.costs[i]), float(front.scores[i])) for i in indices)
