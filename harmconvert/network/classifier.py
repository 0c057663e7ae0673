"""The classifier of a network, and another in its place."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from ..errors import UsageError, first_line
from .exchange import put_in_place

# What torchvision's networks, and those made after them, call the layers at their end.
_NAMES = ("fc", "classifier", "heads", "head")


def replace_classifier(model: nn.Module, classes: int) -> None:
    """Give a network another classifier, untrained.

    timm's networks do it themselves (``reset_classifier``); of others the last linear layer or convolution under the
    name that torchvision gives it is replaced.

    Raises:
        UsageError: the network has no such classifier.
    """
    reset = getattr(model, "reset_classifier", None)
    kind = type(model).__name__
    if callable(reset):
        try:
            reset(classes)
        except Exception as error:
            raise UsageError(f"this {kind}'s reset_classifier({classes}) fails: {first_line(error)}") from error
        return
    last = _classifier(model)
    if last is None:
        raise UsageError(
            f"this {kind} has no classifier to replace: neither reset_classifier(), as timm's networks have, nor a "
            f"linear layer or convolution at the end of {', '.join(_NAMES)}"
        )
    new = _like(last, classes).to(next(last.parameters()).device, next(last.parameters()).dtype)
    put_in_place(model, last, new.train(last.training))
    if isinstance(getattr(model, "num_classes", None), int):
        cast(Any, model).num_classes = classes


def _classifier(model: nn.Module) -> nn.Module | None:
    """The last linear layer or plain convolution of the classifier."""
    for name in _NAMES:
        part = getattr(model, name, None)
        if not isinstance(part, nn.Module):
            continue
        layers = [m for m in part.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]
        if layers:
            return layers[-1]
    return None


def _like(layer: nn.Module, classes: int) -> nn.Module:
    """A new layer with other outputs."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, layer.bias is not None)
    conv = cast(Any, layer)
    new: nn.Module = type(conv)(
        conv.in_channels, classes, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        bias=conv.bias is not None, padding_mode=conv.padding_mode,
    )  # fmt: skip
    return new
