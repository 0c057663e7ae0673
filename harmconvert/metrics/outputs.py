"""Find in the outputs of a network what a metric measures: logits of classes, an image, boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..network.values import tensors_in

# Names of the main output in networks that return several.
_MAIN = ("logits", "out")


def main_output(output: Any) -> Any:
    """Return the main one of several outputs: that named ``logits`` or ``out``, else the first; else the output itself.

    >>> main_output({"aux": 1, "out": 2}), main_output((3, 4))
    (2, 3)
    """
    for name in _MAIN:
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if not isinstance(output, Tensor) and hasattr(output, name):
            return getattr(output, name)
    if isinstance(output, tuple | list) and output:
        return output[0]
    if isinstance(output, Tensor):
        return output
    tensors = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    return tensors[0] if tensors else output


def class_logits(output: Any) -> Tensor:
    """Return the logits (N, classes) in a classifier's output; with auxiliary heads, those of the main head.

    Raises:
        InputError: the network is not a classifier.
    """
    logits = main_output(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        kind = describe(logits)
        raise InputError(f"this network is not a classifier: its output has {kind}, not (images, classes)")
    return logits


def describe(value: Any) -> str:
    """Return the shape of a tensor, or what else a value is, for a message that says what it has."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    if isinstance(value, Sequence) and value and not isinstance(value, str):
        return f"{type(value).__name__} of {type(value[0]).__name__}"
    return type(value).__name__
