"""Ask for a size and get the plan of least harm (DESIGN 5).

Each layer is cut alone, to each of some sizes, and scored by what that does to the network's outputs; dynamic
programming picks one size for each layer within the budget; then whole plans are tried on the network itself, because
scores do not add up when the cut is deep. From the whole to the parts: searching.py, the search on a network; `choose`
here, the search among plans; choices.py, what there is to choose and its costs; latency.py, costs on a clock; orders.py
and elimination.py, which frequencies a layer needs least; probes.py, scores kept in a file; energy.py, scores without
images; knapsack.py, the exact choice.
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
    """The most that a plan may cost, and the least that any plan does.

    Raises:
        UsageError: no plan is within the budget; says what can be reached.
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
    """The plan of least divergence within the budget, and how it was found.

    Args:
        costs: of the whole plan, and the change by each choice of each item.
        scores: of each choice of each item, 0 for the whole.
        others: plans to try beside those of the search, where they are within the budget.
        measure: the divergence of a whole plan (None: it cannot be told); None leaves scores alone to decide.

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
        """A plan as choices, where it is made of them."""
        planned = {index[p.name]: numbers[index[p.name]].get(p.keeps) for p in plan.layers if p.name in index}
        found = [planned.get(number) for number in range(len(items))]
        return tuple(choice for choice in found if choice is not None) if None not in found else None

    first = front.best(limit - whole)
    assert first is not None
    starts = {first: "search"}
    rooted = frontier(changes, [[math.sqrt(max(score, 0.0)) for score in row] for row in scores]).best(limit - whole)
    if rooted is not None:
        starts.setdefault(rooted, "search, by roots")
    fitting = [
        (cost(chosen), chosen, name) for name, plan in others.items() if (chosen := choices_in(plan)) is not None
    ]
    for _, chosen, name in sorted((f for f in fitting if f[0] <= limit), reverse=True)[:2]:  # smaller ones are worse
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
        _shown(front, whole), front.exact,
    )  # fmt: skip


def swaps(
    chosen: tuple[int, ...], changes: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], limit: int
) -> Iterator[tuple[int, ...]]:
    """Plans that give one item another set of the same cost, or the next larger one and another item a smaller one, as
    much as that takes to stay within the limit; those of the least scores first."""
    cost = sum(row[choice] for row, choice in zip(changes, chosen, strict=True))
    found: list[tuple[float, tuple[int, ...]]] = []
    for up, choice in enumerate(chosen):
        for larger in _not_smaller(changes[up], choice):
            more = cost + changes[up][larger] - changes[up][choice]
            gain = scores[up][larger] - scores[up][choice]
            if more <= limit:
                found.append((gain, _with(chosen, {up: larger})))
            if changes[up][larger] == changes[up][choice]:
                continue
            for down, row_down in enumerate(changes):
                if down == up:
                    continue
                for smaller in _smaller(row_down, scores[down], chosen[down]):
                    if more + row_down[smaller] - row_down[chosen[down]] <= limit:
                        change = gain + scores[down][smaller] - scores[down][chosen[down]]
                        found.append((change, _with(chosen, {up: larger, down: smaller})))
                        break
    yield from (swap for _, swap in sorted(found))


def _not_smaller(row: Sequence[int], choice: int) -> list[int]:
    """Other choices of an item that cost the same, and those of the next higher cost."""
    higher = min((cost for cost in row if cost > row[choice]), default=row[choice])
    return [other for other, cost in enumerate(row) if other != choice and cost in (row[choice], higher)]


def _smaller(row: Sequence[int], scores: Sequence[float], choice: int) -> list[int]:
    """Choices of an item that cost less, the dearest first, of equal ones that of the least score."""
    cheaper = [other for other, cost in enumerate(row) if cost < row[choice]]
    return sorted(cheaper, key=lambda other: (-row[other], scores[other]))


def _with(chosen: tuple[int, ...], changed: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(changed.get(index, choice) for index, choice in enumerate(chosen))


def _shown(front: Frontier, whole: int, points: int = 60) -> tuple[tuple[int, float], ...]:
    """Some points of the frontier, from the smallest plan to the whole, evenly spaced in cost."""
    wanted = [front.costs[0] + (front.costs[-1] - front.costs[0]) * step / (points - 1) for step in range(points)]
    indices = sorted({int(i) for i in front.costs.searchsorted(wanted).clip(0, len(front.costs) - 1)})
    return tuple((whole + int(front.costs[i]), float(front.scores[i])) for i in indices)
