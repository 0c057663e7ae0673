"""The calibration set: what an iterable of batches holds, which process takes what, and what is held back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..distributed import any_rank, rank, world_size
from ..errors import InputError, UsageError
from ..surgery import batch_size, tensors_in

HELD_BACK = 4  # every fourth example is kept from the fit, to choose on


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, as `surgery.call` takes them, and the number of each example in the whole set."""

    input: Any
    examples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class CalibrationSet:
    """This process's share: batches to fit on, batches held back; ``total`` examples in all processes."""

    fit: tuple[Batch, ...]
    held: tuple[Batch, ...]
    total: int
    fit_total: int
    left: bool = False  # there were more

    @property
    def probe(self) -> Batch:
        """One example, to see how the network runs."""
        return self.probes[0]

    @property
    def probes(self) -> tuple[Batch, ...]:
        """One example, and two others in a batch, as far as there are so many."""
        batches = (*self.fit, *self.held)
        first, largest = batches[0], max(reversed(batches), key=len)
        others = range(largest is first, len(largest))[-2:]
        places = [(first, [0]), *([(largest, [*others])] if others else [])]
        return tuple(Batch(_rows(b.input, rows, len(b)), tuple(b.examples[row] for row in rows)) for b, rows in places)


def calibration_set(batches: Iterable[Any], limit: int | None = None) -> CalibrationSet:
    """Read an iterable of batches once, until ``limit`` examples are there: tensors, (input, target) pairs whose target
    is not looked at, or dicts.

    The numbers of the examples, and so what is held back, do not depend on the number of processes.

    Raises:
        UsageError: not an iterable of batches. InputError: no input, one with NaN, or fewer batches than processes.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise UsageError(f"calibration= is a {type(batches).__name__}: give a list or a loader of batches of inputs")
    mine: list[Batch] = []
    problem: str | None = None
    total, left = 0, False
    for index, item in enumerate(batches):
        if limit is not None and total >= limit:
            left = True
            break
        input = input_of(item)
        size = batch_size(input)
        if index % world_size() == rank():
            problem = problem or _not_finite(input, index)
            mine.append(Batch(input, tuple(range(total, total + size))))
        total += size
    if not total:
        raise InputError("calibration= holds no input: give some images (32 or more)")
    if any_rank(problem is not None):
        raise InputError(problem or "another process was given calibration inputs with NaN or infinite values")
    if any_rank(not mine):
        raise InputError(f"there are fewer calibration batches than the {world_size()} processes: use smaller batches")
    every = min(HELD_BACK, total)
    fit = [part for batch in mine if (part := _select(batch, every, held=False))]
    held = [part for batch in mine if (part := _select(batch, every, held=True))] if total > 1 else []
    return CalibrationSet(tuple(fit), tuple(held), total, total - (total // every if total > 1 else 0), left)


def input_of(item: Any) -> Any:
    """The input in what a loader yields: of an (input, target) pair the first; a list of single images, as detectors
    take them, is one input."""
    if not isinstance(item, tuple | list) or not item:
        return item
    if isinstance(item, list) and all(isinstance(part, Tensor) and part.dim() == 3 for part in item):
        return item
    return item[0]


def _select(batch: Batch, every: int, held: bool) -> Batch | None:
    rows = [row for row, number in enumerate(batch.examples) if ((number + 1) % every == 0) == held or every == 1]
    if not rows or len(rows) == len(batch):
        return batch if rows else None
    return Batch(_rows(batch.input, rows, len(batch)), tuple(batch.examples[row] for row in rows))


def _rows(input: Any, rows: list[int], size: int) -> Any:
    """Some examples of a batch: rows of every tensor that has one for each, or items of a list of single images."""
    if isinstance(input, Tensor):
        return input[rows] if input.dim() and len(input) == size else input
    if isinstance(input, dict):
        return {key: _rows(value, rows, size) for key, value in input.items()}
    if isinstance(input, list) and len(input) == size and all(isinstance(t, Tensor) and t.dim() == 3 for t in input):
        return [input[row] for row in rows]
    return type(input)(_rows(value, rows, size) for value in input) if type(input) in (list, tuple) else input


def _not_finite(input: Any, index: int) -> str | None:
    for tensor in tensors_in(input):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"calibration batch {index} holds NaN or infinite values: leave those inputs out"
    return None
