"""What a metric is: a description of how the outputs of a network become one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from ..errors import counted

# What a metric compares the outputs of a network with.
TARGETS, UNCUT = "targets", "uncut"


@dataclass(frozen=True)
class Outcome:
    """What a network returned for one batch, and what this is compared with.

    ``targets``: those of the data (None: it has none). ``uncut``: the outputs of the uncut network (None: it was not
    run). ``count``: number of samples in the batch.
    """

    outputs: Any
    targets: Any = None
    uncut: Any = None
    count: int = 1


def mean_of(states: Any) -> Callable[[np.ndarray], float]:
    """Return the mean of numbers (N,), as a function of how often each of them counts (N,).

    >>> mean_of([1.0, 2.0, 6.0])(np.array([1, 1, 0]))
    1.5
    """
    values = np.asarray(states, dtype=np.float64)
    return lambda counts: float(counts @ values / counts.sum())


@dataclass(frozen=True)
class Metric:
    """How the outputs of a network become one number.

    ``states`` turns the outcome of a batch into one state for each sample that can be measured (an array with a row for
    each, or a list). ``summary`` turns the states of all samples into a function that returns the value if each sample
    counts so often; this makes the bootstrap cheap. A value times ``scale`` is in points of ``unit``.

    ``compares_with``: what it needs, ``"targets"`` or ``"uncut"`` (the outputs of the uncut network); if it has both,
    the first that is there is used. ``finite``: whether a network that is compared with itself has a value. ``whole``,
    instead of states: a function of the network and of (inputs, targets) pairs. ``paired``: each state is a pair, of
    the network and of the one it is compared with (`difference_of`).

    >>> errors = lambda outcome: (outcome.outputs - outcome.targets).abs().flatten(1).mean(1).numpy()
    >>> Metric("mae", "mean absolute error", errors, higher_is_better=False).points(0.5)
    0.5
    """

    name: str
    title: str
    states: Callable[[Outcome], Any] = field(repr=False)
    summary: Callable[[Any], Callable[[np.ndarray], float]] = field(default=mean_of, repr=False)
    unit: str = ""
    scale: float = 1.0
    higher_is_better: bool = True
    compares_with: tuple[str, ...] = (TARGETS,)
    finite: bool = True
    whole: Callable[[nn.Module, Iterable[Any]], Any] | None = field(default=None, repr=False)
    paired: bool = False

    @property
    def needs_targets(self) -> bool:
        """Return whether the metric works only on data with targets."""
        return self.compares_with == (TARGETS,)

    @property
    def needs_uncut(self) -> bool:
        """Return whether the metric always compares with the uncut network."""
        return self.compares_with == (UNCUT,)

    def points(self, value: float) -> float:
        """Return a value in points: per cent of a share, decibels, nats."""
        return self.scale * value


def difference_of(metric: Metric) -> Metric:
    """Return the metric of a network minus that of the network it is compared with, on the same samples.

    >>> mae = Metric("mae", "error", lambda outcome: abs(outcome.outputs - outcome.targets))
    >>> outcome = Outcome(np.array([2.0, 3.0]), np.array([1.0, 1.0]), np.array([1.0, 2.0]), 2)
    >>> difference_of(mae).states(outcome) == [(1.0, 0.0), (2.0, 1.0)]
    True
    """

    def states(outcome: Outcome) -> list[tuple[Any, Any]]:
        if outcome.targets is None:
            return []
        other = replace(outcome, outputs=outcome.uncut, uncut=None)
        return list(zip(metric.states(outcome), metric.states(other), strict=True))

    def summary(pairs: Any) -> Callable[[np.ndarray], float]:
        own, other = (metric.summary(_as_states(side)) for side in zip(*pairs, strict=True))
        return lambda counts: own(counts) - other(counts)

    title = f"{metric.title} minus that of the second network"
    return replace(metric, name=f"{metric.name} difference", title=title, states=states, summary=summary, paired=True)


def _as_states(samples: Sequence[Any]) -> Any:
    return np.stack(samples) if isinstance(samples[0], np.ndarray | np.generic) else list(samples)


@dataclass(frozen=True)
class Measurement:
    """A value of a metric in points of ``unit``, its 95 % interval, and on what it was measured.

    ``interval`` is None if it is not known: a single sample, or a function that returns one number for the whole data.
    """

    metric: str
    title: str
    value: float
    interval: tuple[float, float] | None
    unit: str
    higher_is_better: bool
    samples: int
    data: str = ""

    def __str__(self) -> str:
        where = f"{counted(self.samples, 'sample')}" + (f" of {self.data}" if self.data else "")
        return f"{self.title} {self.text}, {where}"

    @property
    def text(self) -> str:
        """Return the value with its interval."""
        if self.interval is None:
            return self.in_unit(self.value)
        low, high = map(self.in_unit, self.interval)
        return f"{self.in_unit(self.value)} (95 %: {low} to {high})"

    def in_unit(self, points: float) -> str:
        """Return a number with its unit."""
        if self.unit == "%":
            return f"{points:.2f}%"
        return f"{points:.4g} {self.unit}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `to_json` wrote."""
        interval = data["interval"]
        return cls(**{**data, "interval": None if interval is None else tuple(interval)})
