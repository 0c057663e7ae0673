"""Code the weights of a converted network, with a number of bits or within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from ..plan import Bits, Plan, apply_plan, coded_weights, round_weights, tensor_bytes, with_coded_bits
from ..plan.precision import MOST_BITS
from ..search.records import Search, Tried
from ..search.searching import Converted
from ..storage.checkpoint import file_bytes
from .conversion import Conversion, conversion_of

# The fewest bits per weight that a byte budget tries, and the number of whole conversions that it makes at most.
LEAST_BITS, ATTEMPTS = 0.1, 5
# Bytes of steps and tables of each weight, at least, and about those of the record of its calibration.
_LEAST_SIDE_BYTES, _RECORD_BYTES = 16, 165
# Bytes by which the header can grow when the size of the file is written into it.
_DIGITS = 32


def code(
    model: nn.Module,
    converted: Converted,
    calibration: Iterable[Any] | CalibrationContext | None,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> tuple[Calibration | None, dict[str, Entry]]:
    """Code the weights of a converted network in place, on calibration inputs or without; return the entries."""
    if calibration is None:
        return None, round_weights(converted.model, converted.plan)
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

    The bits per weight follow from the bytes. They are lowered if the file is larger than expected.

    Raises:
        UsageError: what is not coded needs more bytes than the budget; the message says the smallest size.
    """
    example = apply_plan(model, plan)
    weights = coded_weights(example, plan)
    size = _Size(budget, tensor_bytes(model), sum(weight.count for weight in weights))
    uncoded = tensor_bytes(example) - sum(weight.parameter.element_size() * weight.count for weight in weights)
    size.check(uncoded + _LEAST_SIDE_BYTES * len(weights))
    entries = {w.key: entry_of_size(_LEAST_SIDE_BYTES, w.layout, w.parameter.dtype) for w in weights}
    expected = replace(conversion_of(model, Converted(plan, example), run), coded=entries).header()
    fixed = (
        file_bytes(example, expected) + budget.reserved + (0 if calibration is None else _RECORD_BYTES * len(weights))
    )
    del example
    bits = min(max(size.bits_beside(fixed), LEAST_BITS), MOST_BITS)
    context = None if calibration is None else CalibrationContext.of(model, calibration, settings)
    tried: list[Tried] = []
    for _ in range(ATTEMPTS):
        own = plan.map_layers(lambda layer, bits=bits: layer.keeping(Bits(bits, shared=True)))  # type: ignore[misc]
        converted = Converted(own, apply_plan(model, own))
        record, entries = code(model, converted, context, settings, progress)
        tried.append(Tried(f"{bits:.3g} bits", size.limit, bits, record.divergence if record else None))
        conversion = coded_conversion(model, converted, record, entries, run)
        conversion = replace(conversion, plan=replace(conversion.plan, policy=str(budget)))
        conversion = replace(conversion, search=size.search(tried, fixed))
        needed = file_bytes(conversion.model, conversion.header()) + budget.reserved + _DIGITS
        tried[-1] = replace(tried[-1], cost=needed)
        fixed = needed - sum(stored_bytes(weight.parameter, entries.get(weight.key)) for weight in weights)
        if needed <= size.limit:
            return replace(conversion, search=size.search(tried, fixed))
        size.check(fixed)
        # The later, the further down: of a small weight, the steps and tables need most bytes.
        bits *= (0.99 * (size.limit - fixed) / max(needed - fixed, 1)) ** 2 ** (len(tried) - 1)
    raise UsageError(
        f"the budget {budget} was not met in {counted(ATTEMPTS, 'attempt')}: the last has {needed:,} bytes"
    )


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

    def search(self, tried: list[Tried], fixed: int) -> Search:
        """Return the record of the attempts; the last one is taken."""
        return Search(
            str(self.budget), self.budget.unit, self.whole, self.limit, self.smallest(fixed), "bits per weight",
            tuple(tried), len(tried) - 1, (), False,
        )  # fmt: skip
