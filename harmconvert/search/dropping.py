"""Find the smallest network whose metric drops by at most a given number of points, by bisection over budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

STEPS = 7


@dataclass(frozen=True)
class Step:
    """One budget that was tried: its share of the whole network, and by how many points the metric drops there."""

    share: float
    drop: float


def smallest_within(
    attempt: Callable[[float], tuple[Any, float]], least: float, max_drop: float, steps: int = STEPS
) -> tuple[Any, tuple[Step, ...]]:
    """Return the result of ``attempt`` at the smallest share whose drop is at most ``max_drop``, and all steps.

    The bisection starts with the shares ``least`` and 1. Where the drop falls as the share grows, the result is exact
    to ``2 ** -steps`` of the interval. The drop is at most ``max_drop`` in every case, because share 1 loses nothing.

    >>> smallest_within(lambda share: (share, 10 * (1 - share)), 0.0, 5.0, 3)[0]
    0.5

    Args:
        attempt: takes a share; returns a network within that share, and its drop in points.

    Raises:
        UsageError: ``max_drop`` is negative or not finite.
    """
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise UsageError(f"a drop of {max_drop} points: give 0 or more, such as 1.0")
    tried: list[Step] = []

    def fits(share: float) -> tuple[Any, bool]:
        result, drop = attempt(share)
        tried.append(Step(share, drop))
        return result, drop <= max_drop

    best, ok = fits(least)
    if ok:
        return best, tuple(tried)
    low, high, best = least, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        result, ok = fits(middle)
        if ok:
            high, best = middle, result
        else:
            low = middle
    if best is None:
        best, _ = fits(1.0)
    return best, tuple(tried)
