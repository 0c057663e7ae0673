"""The smallest network that is no more than so many points worse, by bisection over budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

STEPS = 7


@dataclass(frozen=True)
class Step:
    """One budget: share of the whole, and by how many points the network within it is worse than the uncut one."""

    share: float
    drop: float


def smallest_within(
    attempt: Callable[[float], tuple[Any, float]], least: float, max_drop: float, steps: int = STEPS
) -> tuple[Any, tuple[Step, ...]]:
    """What ``attempt`` made at the smallest share tried whose drop is at most ``max_drop``, and all that was tried.

    Bisection, from the least share that can be reached to the whole: exact to 2^-steps of what lies between where the
    drop falls with the share, and a network within ``max_drop`` in any case (the whole loses nothing).

    >>> smallest_within(lambda share: (share, 10 * (1 - share)), 0.0, 5.0, 3)[0]
    0.5

    Raises:
        UsageError: a drop that is no number of zero or more.
    """
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise UsageError(f"a drop of {max_drop} points: give 0 or more, such as 1.0")
    tried: list[Step] = []

    def fits(share: float) -> tuple[Any, bool]:
        made, drop = attempt(share)
        tried.append(Step(share, drop))
        return made, drop <= max_drop

    best, ok = fits(least)
    if ok:
        return best, tuple(tried)
    low, high, best = least, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        made, ok = fits(middle)
        if ok:
            high, best = middle, made
        else:
            low = middle
    if best is None:
        best, _ = fits(1.0)
    return best, tuple(tried)
