"""Time things beside one another: in turns, because machines are shared and their speed wanders."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the repeats, in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def in_turns(
    what: Mapping[str, Callable[[], Any]],
    repeats: int = 7,
    least: int = 3,
    seconds: float = 10.0,
    warm: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Times]:
    """Run each of ``what`` in turn, ``repeats`` times (fewer, but ``least``, where ``seconds`` are over), and time it.

    Each runs ``warm`` times beforehand; work queued on a GPU is waited for. ``progress`` hears of each repeat.
    """
    for run in what.values():
        for _ in range(warm):
            run()
    found: dict[str, list[float]] = {name: [] for name in what}
    begun = time.perf_counter()
    for done in range(repeats):
        if done >= least and time.perf_counter() - begun > seconds:
            break
        for name, run in what.items():
            found[name].append(_seconds(run))
        progress(done + 1)
    return {name: Times(tuple(times)) for name, times in found.items()}


def _seconds(run: Callable[[], Any]) -> float:
    _wait()
    begun = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begun


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
