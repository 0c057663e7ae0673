"""Choose one choice for each item: the least total score within a total cost, by exact dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Most trade-offs to remember. If there are more, only the best one of each cell of a grid of costs stays.
LIMIT = 50_000


@dataclass(frozen=True)
class Frontier:
    """All trade-offs that no other one beats: total costs (rising), total scores (falling), and the choices of each.

    ``exact`` is False where there were too many to remember. Then a better plan may be missed; the costs are still
    true.
    """

    costs: np.ndarray  # (n,) int64, true costs
    scores: np.ndarray  # (n,)
    choices: np.ndarray  # (n, items) int64
    exact: bool

    def best(self, budget: int) -> tuple[int, ...] | None:
        """Return the choices of least score that cost at most ``budget``; None where all cost more."""
        fitting = int(np.searchsorted(self.costs, budget, side="right"))
        return tuple(map(int, self.choices[fitting - 1])) if fitting else None


def frontier(costs: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], limit: int = LIMIT) -> Frontier:
    """Return all best trade-offs, from the cost and the score of each choice of each item.

    A partial sum that costs at least as much as another one and scores worse cannot be part of a best total. Dropping
    it at once is exact (dynamic programming by dominance for the multiple-choice knapsack: Kellerer, Pferschy and
    Pisinger 2004, ch. 11). The costs of layers share large divisors, so few sums remain.

    >>> front = frontier([[9, 3], [9, 3]], [[0.0, 1.0], [0.0, 5.0]])
    >>> front.best(12), front.best(5)
    ((1, 0), None)
    """
    total_costs, total_scores = np.zeros(1, np.int64), np.zeros(1)
    chosen, exact = np.zeros((1, 0), np.int64), True
    for cost, score in zip(costs, scores, strict=True):
        all_costs = (total_costs[:, None] + np.asarray(cost, np.int64)).ravel()
        all_scores = (total_scores[:, None] + np.asarray(score, np.float64)).ravel()
        kept = _undominated(all_costs, all_scores)
        if len(kept) > limit:
            exact = False
            kept = _thinned(all_costs, all_scores, kept, limit)
        parents, choice = np.divmod(kept, len(cost))
        total_costs, total_scores = all_costs[kept], all_scores[kept]
        chosen = np.concatenate([chosen[parents], choice[:, None]], 1)
    return Frontier(total_costs, total_scores, chosen, exact)


def _undominated(costs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the indices, by rising cost, of the entries that score less than all entries of equal or lower cost."""
    order = np.lexsort((scores, costs))
    best = np.minimum.accumulate(scores[order])
    return order[np.concatenate([[True], scores[order][1:] < best[:-1]])]


def _thinned(costs: np.ndarray, scores: np.ndarray, kept: np.ndarray, limit: int) -> np.ndarray:
    """Return the entry of best score in each cell of a grid of costs, and the cheapest entry of all."""
    low, high = costs[kept[0]], costs[kept[-1]]
    cells = (costs[kept] - low) * (limit - 1) // max(int(high - low), 1)
    last = np.concatenate([cells[1:] != cells[:-1], [True]])  # scores fall, so the last of a cell is its best
    last[0] = True
    return kept[last]
