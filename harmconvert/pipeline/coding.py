"""Code the weights of a converted network, with a number of bits or within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..arguments import Budget
from ..calibration import Calibration, CalibrationContext, CalibrationSettings, Progress, calibrate
from ..codecs.codec import Entry
from ..codecs.plain import stored_bytes
from ..codecs.quantised import entry_of_size
from ..errors import UsageError, counted
from ..network.tracing import Trace
from ..plan import (
    Bits,
    Plan,
    apply_plan,
    coded_weights,
    round_vectors,
    round_weights,
    tensor_bytes,
    vector_bits,
    with_coded_bits,
)
from ..plan.precision import MOST_BITS, VECTOR_BITS
from ..search.records import Search, Tried
from ..search.searching import Converted
from ..storage.checkpoint import file_bytes
from .conversion import Conversion, conversion_of

# The fewest bits per weight that a byte budget tries, and the number of whole conversions that it makes at most.
LEAST_BITS, ATTEMPTS = 0.1, 5
# Bytes of steps and tables of each weight, at least, and about those of the record of its calibration.
_LEAST_SIDE_BYTES, _RECORD_BYTES = 16, 165
# A file that uses so much of the budget is good enough; the next one is aimed at this much.
_USED, _AIM = 0.94, 0.98
# Bytes by which the header can grow when the size of the file is written into it.
_DIGITS = 64


def code(
    model: nn.Module,
    converted: Converted,
    calibration: Iterable[Any] | CalibrationContext | None,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> tuple[Calibration | None, dict[str, Entry]]:
    """Code the weights of a converted network in place, on calibration inputs or without; return the entries."""
    if calibration is None:
        entries = round_weights(converted.model, converted.plan)
        for precision in vector_bits(converted.plan)[:1]:
            round_vectors(converted.model, precision)
        return None, entries
    record = calibrate(model, converted.model, converted.plan, calibration, settings, progress)
    return record, dict(record.coded)


def coded_conversion(
    model: nn.Module,
    converted: Converted,
    calibration: Calibration | None,
    entries: Mapping[str, Entry],
    run: Trace | None,
) -> Conversion:
    """Return the conversion of a coded network; its plan has the bits that each layer has."""
    plan = with_coded_bits(converted.plan, coded_weights(converted.model, converted.plan), entries)
    conversion = conversion_of(model, Converted(plan, converted.model, calibration), run)
    cost = replace(conversion.cost, harmonic_bytes=tensor_bytes(converted.model, entries))
    return replace(conversion, cost=cost, coded=dict(entries))


def code_within(
    model: nn.Module,
    plan: Plan,
    budget: Budget,
    calibration: Iterable[Any] | None,
    settings: CalibrationSettings,
    progress: Progress | None,
    run: Trace | None,
) -> Conversion:
    """Return a conversion whose file, with its header, has at most the bytes of a budget.

    The bits per weight follow from the bytes. They are corrected until the file uses most of the budget.

    Raises:
        UsageError: what is not coded needs more bytes than the budget; the message says the smallest size.
    """
    example = apply_plan(model, plan)
    weights = coded_weights(example, plan)
    size = _Size(budget, tensor_bytes(model), sum(weight.count for weight in weights))
    round_vectors(example, VECTOR_BITS[0])
    entries = {w.key: entry_of_size(_LEAST_SIDE_BYTES, w.layout, w.parameter.dtype) for w in weights}
    expected = replace(conversion_of(model, Converted(plan, example), run), coded=entries).header()
    fixed = file_bytes(example, expected) + budget.reserved
    size.check(fixed)
    fixed += 0 if calibration is None else _RECORD_BYTES * len(weights)
    del example
    context = None if calibration is None else CalibrationContext.of(model, calibration, settings)
    attempts = _Attempts(size, fixed)
    while (bits := attempts.next_bits()) is not None:
        own = plan.map_layers(lambda layer, bits=bits: layer.keeping(Bits(bits, shared=True)))  # type: ignore[misc]
        converted = Converted(own, apply_plan(model, own))
        record, entries = code(model, converted, context, settings, progress)
        conversion = coded_conversion(model, converted, record, entries, run)
        conversion = replace(conversion, plan=replace(conversion.plan, policy=str(budget)))
        tried = Tried(f"{bits:.3g} bits", size.limit, bits, record.divergence if record else None)
        attempts.add(conversion, tried, sum(stored_bytes(w.parameter, entries.get(w.key)) for w in weights))
    return attempts.best()


@dataclass(frozen=True)
class _Size:
    """A budget of bytes for a network whose tensors have ``whole`` bytes and which has so many ``weights`` to code."""

    budget: Budget
    whole: int
    weights: int

    @property
    def limit(self) -> int:
        """Return the bytes of the budget: more than the tensors', if a header makes the file larger than them."""
        return self.budget.amount or self.budget.limit(self.whole)

    def smallest(self, fixed: int) -> int:
        """Return the bytes of the smallest file that is tried, of which ``fixed`` are not coded weights."""
        return fixed + round(LEAST_BITS * self.weights / 8)

    def bits_beside(self, fixed: int) -> float:
        """Return the bits for each weight that remain."""
        return 8 * (self.limit - fixed) / max(self.weights, 1)

    def check(self, fixed: int) -> None:
        """Raise UsageError if the smallest file is larger than the budget."""
        if (smallest := self.smallest(fixed)) > self.limit:
            share = -(-1000 * smallest // self.whole) / 10
            raise UsageError(
                f"the budget {self.budget} cannot be met: the tensors of this network have {self.whole:,} bytes now, "
                f"and the file {smallest:,} at least ({fixed:,} of them are not coded weights), so ask for "
                + (f"{share:g}% or more" if share <= 100 else f"bytes={smallest}B or more")
            )

    def search(self, tried: Sequence[Tried], fixed: int, taken: int) -> Search:
        """Return the record of the attempts, of which one is taken."""
        return Search(
            str(self.budget), self.budget.unit, self.whole, self.limit, self.smallest(fixed), "bits per weight",
            tuple(tried), taken, (), False,
        )  # fmt: skip


class _Attempts:
    """The attempts to meet a budget: the largest file within it counts, and one that uses most of it ends the search.

    ``fixed``: expected bytes of all that is not a coded weight.
    """

    def __init__(self, size: _Size, fixed: int) -> None:
        self.size, self.fixed = size, fixed
        self.tried: list[Tried] = []
        self._best: tuple[int, Conversion] | None = None

    def add(self, conversion: Conversion, tried: Tried, coded: int) -> None:
        """Add an attempt; ``coded``: the bytes of its coded weights."""
        record = self.size.search([*self.tried, tried], self.fixed, len(self.tried))
        file = file_bytes(conversion.model, replace(conversion, search=record).header())
        needed = file + self.size.budget.reserved + _DIGITS
        self.tried.append(replace(tried, cost=needed))
        self.fixed = needed - coded
        if needed <= self.size.limit and (self._best is None or needed > self.tried[self._best[0]].cost):
            self._best = len(self.tried) - 1, conversion

    def next_bits(self) -> float | None:
        """Return the bits per weight to try next; None if the best attempt is good enough, or the last one."""
        if not self.tried:
            return min(max(self.size.bits_beside(self.fixed), LEAST_BITS), MOST_BITS)
        last = self.tried[-1]
        if self._best is None:
            self.size.check(self.fixed)
        elif self.tried[self._best[0]].cost >= _USED * self.size.limit or last.expected >= MOST_BITS:
            return None
        if len(self.tried) == ATTEMPTS:
            return None
        aim = _AIM * self.size.limit
        slope = (last.cost - self.fixed) / last.expected  # bytes for each bit, as if steps and tables needed none
        if len(self.tried) > 1 and (other := self.tried[-2]).expected != last.expected:
            slope = (last.cost - other.cost) / (last.expected - other.expected)
        bits = last.expected + (aim - last.cost) / slope if slope > 0 else last.expected / 2
        return min(max(bits, last.expected / 3, LEAST_BITS / 4), 3 * last.expected, MOST_BITS)

    def best(self) -> Conversion:
        """Return the largest conversion within the budget."""
        if self._best is None:
            raise UsageError(
                f"the budget {self.size.budget} was not met in {counted(len(self.tried), 'attempt')}: the smallest has "
                f"{min(tried.cost for tried in self.tried):,} bytes"
            )
        taken, conversion = self._best
        # The record of later attempts would make the file larger than its size that was counted.
        return replace(conversion, search=self.size.search(self.tried[: taken + 1], self.fixed, taken))
