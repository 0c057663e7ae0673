"""Choose the plan within a budget that changes the network's outputs least.

Each layer is cut alone, to several sizes. Its score is the change in the network's outputs. Dynamic programming then
chooses one size for each layer within the budget. At last, whole plans are tried on the network, because the scores of
single layers do not add up when the cuts are deep.

The parts: searching.py runs the search on a network; `choose` here chooses among plans; choices.py lists the choices
and their costs; latency.py measures costs as times; orders.py finds the frequencies that a layer needs least; probes.py
stores scores in a file; energy.py computes scores without images; knapsack.py makes the exact choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..arguments import UNITS as UNITS
from ..arguments import Budget as Budget
from ..errors import UsageError
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
            "that reads the input is cut where --include names it"
        )
    return limit, smallest


def choose(
    budget: Budget,
    whole_plan: Plan,
    items: Sequence[Item],
    costs: tuple[int, Sequence[Sequence[int]]],
    scores: Sequence[Sequence[float]],
    scored_by: str,
    others: Mapping[str, Plan],
    measure: Callable[[Plan], float | None] | None,
    trials: int,
) -> tuple[Plan, Search]:
    """Return the plan of least divergence within the budget, and a record of the search.

    Args:
        costs: cost of the whole plan, and the change that each choice of each item makes.
        scores: score of each choice of each item; 0 for the choice that keeps everything.
        others: more plans to try, by name, where they are within the budget.
        measure: returns the divergence of a whole plan, or None where it cannot be measured. If ``measure`` is None,
            the scores alone decide.
        trials: number of whole plans to measure.

    Raises:
        UsageError: the budget cannot be met.
    """
    whole, changes = costs
    limit, smallest = limit_of(budget, whole, changes)
    front = frontier(changes, scores)
    index = {name: number for number, item in enumerate(items) for name in item.names}
    numbers = [{choice: number for number, choice in enumerate(item.choices)} for item in items]

    def cost(chosen: Sequence[int]) -> int:
        return whole + sum(row[choice] for row, choice in zip(changes, chosen, strict=True))

    def expected(chosen: Sequence[int]) -> float:
        return sum(row[choice] for row, choice in zip(scores, chosen, strict=True))

    def choices_in(plan: Plan) -> tuple[int, ...] | None:
        """Return the choices that make up a plan; None where a layer keeps something that is no choice of its item."""
        planned = {index[p.name]: numbers[index[p.name]].get(p.keeps) for p in plan.layers if p.name in index}
        chosen = [planned.get(number) for number in range(len(items))]
        return tuple(choice for choice in chosen if choice is not None) if None not in chosen else None

    first = front.best(limit - whole)
    assert first is not None
    starts = {first: "search"}
    rooted = frontier(changes, [[math.sqrt(max(score, 0.0)) for score in row] for row in scores]).best(limit - whole)
    if rooted is not None:
        starts.setdefault(rooted, "search, by roots")
    fitting = [
        (cost(chosen), chosen, name) for name, plan in others.items() if (chosen := choices_in(plan)) is not None
    ]
    for _, chosen, name in sorted((f for f in fitting if f[0] <= limit), reverse=True)[:2]:  # smaller plans are worse
        starts.setdefault(chosen, name)
    tried: dict[tuple[int, ...], Tried] = {}

    def attempt(chosen: tuple[int, ...], origin: str) -> float:
        value = measure(plan_of(whole_plan, items, chosen, str(budget))) if measure and trials else None
        tried[chosen] = Tried(origin, cost(chosen), expected(chosen), value)
        return math.inf if value is None else value

    best, least = first, attempt(first, "search")
    if measure is not None:
        for chosen, origin in list(starts.items())[1:]:
            if len(tried) < trials and (value := attempt(chosen, origin)) < least:
                best, least = chosen, value
        while len(tried) < trials:
            swap = next((s for s in swaps(best, changes, scores, limit - whole) if s not in tried), None)
            if swap is None:
                break
            if (value := attempt(swap, "swap")) < least:
                best, least = swap, value
    plans = list(tried)
    return plan_of(whole_plan, items, best, str(budget)), Search(
        str(budget), budget.unit, whole, limit, smallest, scored_by, tuple(tried.values()), plans.index(best),
        _frontier_points(front, whole), front.exact,
    )  # fmt: skip


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
    wanted = [front.costs[0] + (front.costs[-1] - front.costs[0]) * step / (points - 1) for step in range(points)]
    indices = sorted({int(i) for i in front.costs.searchsorted(wanted).clip(0, len(front.costs) - 1)})
    return tuple((whole + int(front.costs[i]), float(front.scores[i])) for i in indices)
