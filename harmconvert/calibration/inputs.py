"""The calibration set: read batches, divide them among the processes, and hold some inputs back from the fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..network.comparison import close
from ..network.distributed import any_rank, rank, world_size
from ..network.heads import compared_outputs
from ..network.values import batch_size, rebuild_sequence, tensors_in
from .capture import forward
from .reading import Reader

HELD_BACK = 4  # every fourth example is held back from the fit and used to choose among solutions


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward.

    ``input``: in the form that `network.running.call` accepts. ``examples``: the number of each example in the whole
    calibration set. ``index``: the number of the batch.
    """

    input: Any
    examples: tuple[int, ...]
    index: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, rows: list[int]) -> Batch:
        """Return a batch of some of the examples."""
        return Batch(_select_rows(self.input, rows, len(self)), tuple(self.examples[row] for row in rows), self.index)


@dataclass(frozen=True)
class Repeatability:
    """Whether repeated runs of a network give the same results.

    ``complete``: runs must not be interrupted, because an interrupted run changes the next one. ``varying``: layers
    whose input on the same example differs even between complete runs.
    """

    complete: bool = False
    varying: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CalibrationSet:
    """The part of the calibration inputs that this process uses.

    ``fit``, ``held``: batches for the fit, and batches that are held back. ``total``, ``fit_total``: number of examples
    in all processes, and of those for the fit. ``more_available``: the iterable had more examples than were read.
    ``undivided``: batches were not divided, because the network depends on whole batches (for example, frames of a clip
    along the batch axis). ``fallbacks``: each faster method that was not used, and why.
    """

    fit: tuple[Batch, ...]
    held: tuple[Batch, ...]
    total: int
    fit_total: int
    more_available: bool = False
    undivided: bool = False
    runs: Repeatability = Repeatability()
    fallbacks: tuple[str, ...] = ()

    @property
    def why_nothing_held(self) -> str:
        """Return why no input is held back (only meaningful if none is)."""
        batch = "one batch, which the network takes only as a whole" if self.undivided else "one input"
        return f"{batch}: none can be held back"

    @property
    def probe(self) -> Batch:
        """Return one example, for finding out how the network runs."""
        return self.probes[0]

    @property
    def probes(self) -> tuple[Batch, ...]:
        """Return one example and a batch of two others, as far as available; if undivided, the first two batches."""
        batches = (*self.fit, *self.held)
        if self.undivided:
            return batches[:2]
        first, largest = batches[0], max(reversed(batches), key=len)
        others = range(largest is first, len(largest))[-2:]
        selections = [(first, [0]), *([(largest, [*others])] if others else [])]
        return tuple(batch.rows(rows) for batch, rows in selections)


def calibration_set(batches: Iterable[Any], limit: int | None = None, model: nn.Module | None = None) -> CalibrationSet:
    """Read an iterable of batches once, until there are ``limit`` examples.

    The numbers of the examples, and so the choice of those that are held back, do not depend on the number of
    processes.

    Args:
        batches: see `Reader` for what it may yield.
        model: decides how to read a batch that can be read in several ways, and whether batches may be divided.

    Raises:
        UsageError: ``batches`` is not an iterable of batches.
        InputError: there is no input, one has NaN, or there are fewer batches than processes.
    """
    own: list[Batch] = []
    problem: str | None = None
    sizes: list[int] = []
    more_available = False
    for index, input in Reader(model).all(batches):
        total = sum(sizes)
        if limit is not None and total >= limit:
            more_available = True
            break
        size = batch_size(input)
        if index % world_size() == rank() and size:
            problem = problem or _nan_problem(input, index)
            own.append(Batch(input, tuple(range(total, total + size)), index))
        sizes.append(size)
    if not (total := sum(sizes)):
        raise InputError("calibration= holds no input: give some images (32 or more)")
    if any_rank(problem is not None):
        raise InputError(problem or "another process has calibration inputs with NaN or infinite values")
    if any_rank(not own):
        raise InputError(f"there are fewer calibration batches than the {world_size()} processes: use smaller batches")
    if any_rank(model is not None and _depends_on_whole_batches(model, own, len(sizes))):
        return _undivided_set(own, sizes, more_available)
    every = min(HELD_BACK, total)
    fit = [part for batch in own if (part := _fit_or_held(batch, every, held=False))]
    held = [part for batch in own if (part := _fit_or_held(batch, every, held=True))] if total > 1 else []
    return CalibrationSet(tuple(fit), tuple(held), total, total - (total // every if total > 1 else 0), more_available)


def _undivided_set(own: Sequence[Batch], sizes: Sequence[int], more_available: bool) -> CalibrationSet:
    """Return the set with every fourth batch held back as a whole."""
    every = min(HELD_BACK, max(len(sizes), 2))
    held = [batch for batch in own if (batch.index + 1) % every == 0]
    fit = [batch for batch in own if (batch.index + 1) % every]
    fit_total = sum(size for index, size in enumerate(sizes) if (index + 1) % every)
    return CalibrationSet(tuple(fit), tuple(held), sum(sizes), fit_total, more_available, undivided=True)


def _depends_on_whole_batches(model: nn.Module, batches: Sequence[Batch], count: int) -> bool:
    """Return whether the network gives other outputs for a part of a batch, or does not run on it."""
    batch = min((batch for batch in batches if len(batch) > 1), key=len, default=None)
    if batch is None:
        return False
    one, two = batch.rows([0]), batch.rows([0, len(batch) - 1])
    if batch_size(one.input) != 1 or batch_size(two.input) != 2:
        return True  # batches of this form cannot be divided
    try:
        outputs = [compared_outputs(model, partial(forward, model, part.input, undo=True)) for part in (one, two)]
    except Exception:
        return True
    alone, beside = (tensors_in(output, arrays=True) for output in outputs)
    pairs = [(a, b[:1]) for a, b in zip(alone, beside, strict=False) if a.dim() and b.dim() and len(b) == 2 * len(a)]
    # With a single undivided batch nothing could be held back, and nothing would be refitted. Then divide the batch
    # although its examples depend on each other: the calibration is less exact, but possible.
    return count > 1 and any(len(a) == 1 and bool(a.isfinite().any()) and not close(b, a) for a, b in pairs)


def _fit_or_held(batch: Batch, every: int, held: bool) -> Batch | None:
    """Return the examples of a batch for the fit, or those that are held back; None if there are none."""
    rows = [row for row, number in enumerate(batch.examples) if ((number + 1) % every == 0) == held or every == 1]
    if not rows or len(rows) == len(batch):
        return batch if rows else None
    return batch.rows(rows)


def _select_rows(input: Any, rows: list[int], size: int) -> Any:
    """Return some examples of a batch: rows of tensors of length ``size``, or items of a list of single images."""
    if isinstance(input, Tensor):
        return input[rows] if input.dim() and len(input) == size else input
    if isinstance(input, Mapping):
        return {key: _select_rows(value, rows, size) for key, value in input.items()}
    if isinstance(input, list) and len(input) == size and batch_size(input) == size:
        single = [not isinstance(part, Tensor) or part.dim() == 3 for part in input]
        if all(single):
            return [input[row] for row in rows]
    if isinstance(input, list | tuple):
        return rebuild_sequence(input, (_select_rows(value, rows, size) for value in input))
    return input


def _nan_problem(input: Any, index: int) -> str | None:
    for tensor in tensors_in(input):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"calibration batch {index} holds NaN or infinite values: leave those inputs out"
    return None
