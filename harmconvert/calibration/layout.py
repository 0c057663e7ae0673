"""How calibration inputs lie in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..network.comparison import close
from ..network.values import images_to_channels_last, tensors_in
from .capture import forward
from .inputs import Batch, CalibrationSet


def laid_out(model: nn.Module, data: CalibrationSet) -> CalibrationSet:
    """The same inputs with images in channels_last, which a CPU convolves faster. As they are where ``model`` is not
    on a CPU, or does not compute the same of them so, as networks that take the layout of their maps for granted do
    not."""
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return data
    probes = [(batch.input, images_to_channels_last(batch.input)) for batch in data.probes]
    if not any(_moved(before, after) for before, after in probes):
        return data
    try:
        same = all(_alike(forward(model, before), forward(model, after)) for before, after in probes)
    except Exception:  # what is wrong with the inputs as they are, whoever runs them next will say
        same = False
    if not same:
        return data

    def changed(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        return tuple(replace(batch, input=images_to_channels_last(batch.input)) for batch in batches)

    return replace(data, fit=changed(data.fit), held=changed(data.held))


def _moved(before: Any, after: Any) -> bool:
    """Whether any tensor lies otherwise: those of one channel or one pixel do not."""
    pairs = zip(tensors_in(before), tensors_in(after), strict=True)
    return any(one.stride() != other.stride() for one, other in pairs)


def _alike(one: Any, other: Any) -> bool:
    """Whether outputs are the same to rounding, which another order of sums brings."""
    ours, theirs = (tensors_in(output, arrays=True) for output in (one, other))
    return len(ours) == len(theirs) and all(close(b, a) for a, b in zip(ours, theirs, strict=True))
