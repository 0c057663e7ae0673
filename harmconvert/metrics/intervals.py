"""95 % intervals of what was measured on samples: of shares, of their differences, and of all else (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# Two-sided 95 % of the normal distribution.
Z_95 = 1.959963984540054
RESAMPLES = 1000
# So many counts are held in memory at once.
_MOST_COUNTS = 1 << 22


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share measured in ``count`` trials (Wilson 1927), within 0 and 1.

    >>> tuple(round(bound, 4) for bound in wilson_interval(0.99, 1000))
    (0.9817, 0.9946)
    """
    spread = Z_95 * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    middle, scale = share + Z_95**2 / (2 * count), 1 + Z_95**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def paired_interval(only_first: int, only_second: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares that were measured in the same ``count`` trials.

    Half a trial is added to each of the four cells (Agresti and Min 2005), so that it is not empty for equal results.

    >>> tuple(round(bound, 4) for bound in paired_interval(1, 4, 1000))
    (-0.0078, 0.0018)

    Args:
        only_first: trials in which only the first one succeeded.
        only_second: trials in which only the second one succeeded.
    """
    first, second, trials = only_first + 0.5, only_second + 0.5, count + 2
    middle = (first - second) / trials
    spread = Z_95 * math.sqrt(first + second - (first - second) ** 2 / trials) / trials
    return max(-1.0, middle - spread), min(1.0, middle + spread)


def bootstrap_interval(
    value: Callable[[np.ndarray], float], samples: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a value over resampled samples; None for fewer than two samples.

    >>> low, high = bootstrap_interval(lambda counts: counts @ np.arange(100) / counts.sum(), 100)
    >>> low < 49.5 < high
    True

    Args:
        value: the value if each sample counts so often (counts (N,), whole numbers as floats).
        samples: the number of samples N.
    """
    if samples < 2:
        return None
    generator = np.random.default_rng(seed)
    shares = np.full(samples, 1 / samples)
    values: list[float] = []
    while len(values) < resamples:
        block = min(resamples - len(values), max(1, _MOST_COUNTS // samples))
        values += [value(counts) for counts in generator.multinomial(samples, shares, block).astype(np.float64)]
    finite = [one for one in values if math.isfinite(one)]
    if not finite:
        return None
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)
