"""Round the vectors of a coded network, such as its batch norms, where this does not change the outputs much."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..network.state import tensors_of
from ..plan import Plan, round_vectors, vector_bits
from .context import CalibrationContext
from .records import Calibration

# The divergence on held-back inputs may be at most this many times as large afterwards.
MOST_CHANGE = 1.1


@torch.no_grad()
def with_rounded_vectors(
    context: CalibrationContext, converted: nn.Module, plan: Plan, record: Calibration
) -> Calibration:
    """Round the vectors in place with the coarsest precision that is good enough; return the record with its result.

    Nothing is changed if the plan has bits for single layers only, or if no precision is good enough.
    """
    own = tensors_of(converted, keep_vars=True)
    for bits in vector_bits(plan):
        before = round_vectors(converted, bits)
        divergence, _ = context.compare(context.runnable(converted))
        if record.divergence is None or (divergence is not None and divergence <= MOST_CHANGE * record.divergence):
            return replace(record, divergence=divergence, agreement=context.compare.agreement)
        for key, values in before.items():
            own[key].copy_(values)
    return record
