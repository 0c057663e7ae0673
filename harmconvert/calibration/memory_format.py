"""Choose the memory format of calibration inputs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import first_line
from ..network.comparison import close
from ..network.values import images_to_channels_last, tensors_in
from .capture import forward
from .inputs import Batch, CalibrationSet

log = logging.getLogger(__name__)


def with_best_memory_format(model: nn.Module, data: CalibrationSet) -> CalibrationSet:
    """Return the same inputs with images in channels_last, which a CPU convolves faster.

    The inputs are not changed if ``model`` is not on a CPU. They are also not changed if ``model`` gives other outputs
    for them in channels_last, because some networks assume the default memory format of their maps; `fallbacks` of the
    result says so.
    """
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return data
    probes = [(batch.input, images_to_channels_last(batch.input)) for batch in data.probes]
    if not any(_strides_differ(before, after) for before, after in probes):
        return data
    try:
        same = all(_same_outputs(forward(model, before), forward(model, after)) for before, after in probes)
        why = "the outputs differ"
    except Exception as error:  # if the unchanged inputs fail too, the next run on them reports the error
        same, why = False, first_line(error)
    if not same:
        fallback = f"inputs are not in channels_last: {why}"
        log.info(fallback)
        return replace(data, fallbacks=(*data.fallbacks, fallback))

    def changed(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        return tuple(replace(batch, input=images_to_channels_last(batch.input)) for batch in batches)

    return replace(data, fit=changed(data.fit), held=changed(data.held))


def _strides_differ(before: Any, after: Any) -> bool:
    """Return whether channels_last changes any tensor: with one channel or one pixel it does not."""
    pairs = zip(tensors_in(before), tensors_in(after), strict=True)
    return any(one.stride() != other.stride() for one, other in pairs)


def _same_outputs(expected_output: Any, actual_output: Any) -> bool:
    """Return whether outputs are equal except for rounding."""
    expected, actual = (tensors_in(output, arrays=True) for output in (expected_output, actual_output))
    return len(expected) == len(actual) and all(close(a, e) for e, a in zip(expected, actual, strict=True))
