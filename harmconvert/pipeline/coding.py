"""Code the weights of a converted network, with a number of bits or within a number of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..arguments import Budget
from ..calibration import Calibration, CalibrationContext, CalibrationSettings, Progress, calibrate
from ..codecs.codec import Entry
from ..errors import UsageError, counted
from ..network.tracing import Trace
from ..plan import Bits, Plan, apply_plan, coded_weights, round_weights, tensor_bytes, with_coded_bits
from ..plan.precision import MOST_BITS
from ..search.records import Search, Tried
from ..search.searching import Converted
from .conversion import Conversion, conversion_of

# The fewest bits per weight that a byte budget tries, and the number of whole conversions that it makes at most.
LEAST_BITS, ATTEMPTS = 0.1, 5
# Bytes of steps and tables of each weight, at least.
_LEAST_SIDE_BYTES = 16


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
    """Return a conversion whose tensors need at most the bytes of a budget in a file.

    The bits per weight follow from the bytes. They are lowered if the coded file is larger than expected.

    Raises:
        UsageError: the tensors that are not coded need more bytes than the budget; the message says the smallest size.
    """
    whole = tensor_bytes(model)
    limit = budget.limit(whole)
    example = apply_plan(model, plan)
    weights = coded_weights(example, plan)
    count = sum(weight.count for weight in weights)
    uncoded = tensor_bytes(example) - sum(weight.parameter.element_size() * weight.count for weight in weights)
    smallest = uncoded + round(LEAST_BITS * count / 8) + _LEAST_SIDE_BYTES * len(weights)
    if smallest > limit:
        raise UsageError(
            f"the budget {budget} cannot be met: the tensors of this network have {whole:,} bytes now and "
            f"{smallest:,} at least ({uncoded:,} of them are not coded), so ask for "
            f"{-(-1000 * smallest // whole) / 10:g}% or more"
        )
    del example
    context = None if calibration is None else CalibrationContext.of(model, calibration, settings)
    bits = min(8 * (limit - uncoded) / max(count, 1), MOST_BITS)
    tried: list[Tried] = []
    for _ in range(ATTEMPTS):
        own = plan.map_layers(lambda layer, bits=bits: layer.keeping(Bits(bits, shared=True)))  # type: ignore[misc]
        converted = Converted(own, apply_plan(model, own))
        record, entries = code(model, converted, context, settings, progress)
        size = tensor_bytes(converted.model, entries)
        tried.append(Tried(f"{bits:.3g} bits", size, bits, record.divergence if record else None))
        if size <= limit:
            break
        bits *= 0.99 * (limit - uncoded) / max(size - uncoded, 1)
    else:
        raise UsageError(
            f"the budget {budget} was not met in {counted(ATTEMPTS, 'attempt')}: the last has {size:,} bytes"
        )
    search = Search(
        str(budget), budget.unit, whole, limit, smallest, "bits per weight", tuple(tried), len(tried) - 1, (), False,
    )  # fmt: skip
    conversion = coded_conversion(model, converted, record, entries, run)
    return replace(conversion, search=search, plan=replace(conversion.plan, policy=str(budget)))
