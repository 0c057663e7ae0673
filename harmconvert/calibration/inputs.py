"""The calibration set: what an iterable of batches holds, which process takes what, and what is held back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..network.comparison import close
from ..network.distributed import any_rank, rank, world_size
from ..network.values import batch_size, rebuild_sequence, tensors_in
from .capture import forward
from .reading import Reader

HELD_BACK = 4  # every fourth example is kept from the fit, to choose on


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward, as `surgery.call` takes them, and the number of each example in the whole set; ``index``:
    the batch's own number."""

    input: Any
    examples: tuple[int, ...]
    index: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, rows: list[int]) -> Batch:
        """Some of its examples."""
        return Batch(_rows(self.input, rows, len(self)), tuple(self.examples[row] for row in rows), self.index)


@dataclass(frozen=True)
class Runs:
    """How a network must be run. ``complete``: not interrupted, because the next run would notice. ``varying``: layers
    whose inputs differ even between complete runs on one example."""

    complete: bool = False
    varying: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CalibrationSet:
    """This process's share: batches to fit on, batches held back; ``total`` examples in all processes.

    ``whole``: the network takes whole batches only (frames of a clip in the batch axis), so that none was divided.
    """

    fit: tuple[Batch, ...]
    held: tuple[Batch, ...]
    total: int
    fit_total: int
    left: bool = False  # there were more
    whole: bool = False
    runs: Runs = Runs()

    @property
    def nothing_held(self) -> str:
        """Why nothing is held back, where nothing is."""
        batch = "one batch, which the network takes only as a whole" if self.whole else "one input"
        return f"{batch}: none can be held back"

    @property
    def probe(self) -> Batch:
        """One example, to see how the network runs."""
        return self.probes[0]

    @property
    def probes(self) -> tuple[Batch, ...]:
        """One example, and two others in a batch, as far as there are so many; two batches where they stay whole."""
        batches = (*self.fit, *self.held)
        if self.whole:
            return batches[:2]
        first, largest = batches[0], max(reversed(batches), key=len)
        others = range(largest is first, len(largest))[-2:]
        places = [(first, [0]), *([(largest, [*others])] if others else [])]
        return tuple(batch.rows(rows) for batch, rows in places)


def calibration_set(batches: Iterable[Any], limit: int | None = None, model: nn.Module | None = None) -> CalibrationSet:
    """Read an iterable of batches once, until ``limit`` examples are there; see `Reader` for what it may yield.

    The numbers of the examples, and so what is held back, do not depend on the number of processes. ``model`` decides
    how to read what may be read in several ways, and whether batches may be divided.

    Raises:
        UsageError: not an iterable of batches. InputError: no input, one with NaN, or fewer batches than processes.
    """
    mine: list[Batch] = []
    problem: str | None = None
    sizes: list[int] = []
    left = False
    for index, input in Reader(model).all(batches):
        total = sum(sizes)
        if limit is not None and total >= limit:
            left = True
            break
        size = batch_size(input)
        if index % world_size() == rank() and size:
            problem = problem or _not_finite(input, index)
            mine.append(Batch(input, tuple(range(total, total + size)), index))
        sizes.append(size)
    if not (total := sum(sizes)):
        raise InputError("calibration= holds no input: give some images (32 or more)")
    if any_rank(problem is not None):
        raise InputError(problem or "another process was given calibration inputs with NaN or infinite values")
    if any_rank(not mine):
        raise InputError(f"there are fewer calibration batches than the {world_size()} processes: use smaller batches")
    if any_rank(model is not None and _stay_whole(model, mine, len(sizes))):
        return _whole(mine, sizes, left)
    every = min(HELD_BACK, total)
    fit = [part for batch in mine if (part := _select(batch, every, held=False))]
    held = [part for batch in mine if (part := _select(batch, every, held=True))] if total > 1 else []
    return CalibrationSet(tuple(fit), tuple(held), total, total - (total // every if total > 1 else 0), left)


def _whole(mine: Sequence[Batch], sizes: Sequence[int], left: bool) -> CalibrationSet:
    """The set with every fourth batch held back as a whole."""
    every = min(HELD_BACK, max(len(sizes), 2))
    held = [batch for batch in mine if (batch.index + 1) % every == 0]
    fit = [batch for batch in mine if (batch.index + 1) % every]
    fit_total = sum(size for index, size in enumerate(sizes) if (index + 1) % every)
    return CalibrationSet(tuple(fit), tuple(held), sum(sizes), fit_total, left, whole=True)


def _stay_whole(model: nn.Module, batches: Sequence[Batch], count: int) -> bool:
    """Whether the network computes something else of examples of a batch, or does not run on them alone."""
    batch = min((batch for batch in batches if len(batch) > 1), key=len, default=None)
    if batch is None:
        return False
    one, two = batch.rows([0]), batch.rows([0, len(batch) - 1])
    if batch_size(one.input) != 1 or batch_size(two.input) != 2:
        return True  # it is of a kind that cannot be divided
    try:
        outputs = [forward(model, part.input, undo=True) for part in (one, two)]
    except Exception:
        return True
    alone, beside = (tensors_in(output, arrays=True) for output in outputs)
    pairs = [(a, b[:1]) for a, b in zip(alone, beside, strict=False) if a.dim() and b.dim() and len(b) == 2 * len(a)]
    # In a single batch nothing can be held back undivided: a network whose examples depend on one another is calibrated
    # less exactly, rather than not at all.
    return count > 1 and any(len(a) == 1 and bool(a.isfinite().any()) and not close(b, a) for a, b in pairs)


def _select(batch: Batch, every: int, held: bool) -> Batch | None:
    rows = [row for row, number in enumerate(batch.examples) if ((number + 1) % every == 0) == held or every == 1]
    if not rows or len(rows) == len(batch):
        return batch if rows else None
    return batch.rows(rows)


def _rows(input: Any, rows: list[int], size: int) -> Any:
    """Some examples of a batch: rows of every tensor that has one for each, or items of a list of single images."""
    if isinstance(input, Tensor):
        return input[rows] if input.dim() and len(input) == size else input
    if isinstance(input, Mapping):
        return {key: _rows(value, rows, size) for key, value in input.items()}
    if isinstance(input, list) and len(input) == size and batch_size(input) == size:
        single = [not isinstance(part, Tensor) or part.dim() == 3 for part in input]
        if all(single):
            return [input[row] for row in rows]
    return (
        rebuild_sequence(input, (_rows(value, rows, size) for value in input))
        if isinstance(input, list | tuple)
        else input
    )


def _not_finite(input: Any, index: int) -> str | None:
    for tensor in tensors_in(input):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"calibration batch {index} holds NaN or infinite values: leave those inputs out"
    return None
