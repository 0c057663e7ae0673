"""Compare the speed of several functions by running them in turns, because the speed of a shared machine varies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """The seconds of each repeat of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the repeats, in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Return half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


# Before a shorter run is timed, the same function runs without being timed.
_SHORT = 0.25
# For so many seconds, if the functions are networks in several runtimes.
SETTLING = 0.04


def in_turns(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int = 7,
    min_repeats: int = 3,
    seconds: float = 10.0,
    warm: int = 2,
    settling: float = 0.0,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Times]:
    """Run the functions in turns and time each run.

    Args:
        repeats: how often each function is timed.
        min_repeats: the repeats that are always done; after them the loop stops once ``seconds`` have passed.
        warm: runs of each function before the first one that is timed.
        settling: before each short run that is timed, the function runs for so many seconds, at least once. Threads of
            ONNX Runtime wait actively for some time after a run, and then slow the runs of other runtimes.
        progress: called with the number of repeats done, after each repeat.
    """
    for run in functions.values():
        for _ in range(warm):
            run()
    seconds_by_name: dict[str, list[float]] = {name: [] for name in functions}
    last = dict.fromkeys(functions, 0.0)
    start = time.perf_counter()
    for done in range(repeats):
        if done >= min_repeats and time.perf_counter() - start > seconds:
            break
        for name, run in functions.items():
            if len(functions) > 1 and last[name] < _SHORT:
                _settle(run, settling)
            last[name] = _time_once(run)
            seconds_by_name[name].append(last[name])
        progress(done + 1)
    return {name: Times(tuple(times)) for name, times in seconds_by_name.items()}


def _settle(run: Callable[[], Any], seconds: float) -> None:
    start = time.perf_counter()
    run()
    while time.perf_counter() - start < seconds:
        run()


def _time_once(run: Callable[[], Any]) -> float:
    _wait_for_gpu()
    start = time.perf_counter()
    run()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
