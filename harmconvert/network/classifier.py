"""Find and replace the classifier of a network."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

from torch import nn

from ..errors import UsageError, first_line
from .exchange import replace_module

# Names of the classifier in torchvision's networks, and in networks modelled on them.
_NAMES = ("fc", "classifier", "heads", "head")


def replace_classifier(model: nn.Module, classes: int) -> None:
    """Replace the classifier of a network, in place, by an untrained one for ``classes`` classes.

    timm's networks do this themselves (``reset_classifier``). In other networks, the last linear layer or convolution
    under one of torchvision's names for the classifier is replaced.

    Raises:
        UsageError: the network has no such classifier, or its ``reset_classifier`` fails.
    """
    reset = getattr(model, "reset_classifier", None)
    kind = type(model).__name__
    if callable(reset):
        try:
            reset(classes)
        except Exception as error:
            raise UsageError(f"this {kind}'s reset_classifier({classes}) fails: {first_line(error)}") from error
        return
    last = _last_layer(model)
    if last is None:
        raise UsageError(
            f"this {kind} has no classifier to replace: it has neither the method reset_classifier() of timm's "
            f"networks nor a linear layer or convolution under {', '.join(_NAMES)}"
        )
    new = _new_classifier(last, classes).to(next(last.parameters()).device, next(last.parameters()).dtype)
    replace_module(model, last, new.train(last.training))
    if isinstance(getattr(model, "num_classes", None), int):
        cast(Any, model).num_classes = classes


def classifier_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that computes the logits of a network, as far as its methods or names say; else None."""
    get = getattr(model, "get_classifier", None)
    if callable(get):
        with suppress(Exception):  # some heads have several layers, or none
            found = get()
            if isinstance(found, nn.Module) and not any(found.children()):
                return found
    return _last_layer(model)


def detector_classes(model: nn.Module) -> int | None:
    """Return the number of classes of a detector, the background among them; None if it is not known.

    The heads of torchvision's detectors have it as ``num_classes``, or as the outputs of ``cls_score``.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last == "cls_score" and isinstance(module, nn.Linear):
            return module.out_features
        if last == "classification_head" and isinstance(columns := getattr(module, "num_columns", None), int):
            return columns
        if last == "classification_head" and isinstance(classes := getattr(module, "num_classes", None), int):
            return classes
    return None


def classes_of_weights(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> int | None:
    """Return the number of classes of weights that differ from a network only in the outputs of its classifier.

    >>> classes_of_weights({"fc.weight": ((1000, 512), (5, 512)), "fc.bias": ((1000,), (5,))})
    5

    Args:
        shapes: for each tensor whose shape differs, its shape in the network and in the file.

    Returns:
        None if something else differs. A detector may have several outputs for each class, so that the least number of
        outputs counts.
    """
    if any(len(own) != len(read) or own[1:] != read[1:] or not own for own, read in shapes.values()):
        return None
    outputs = {(own[0], read[0]) for own, read in shapes.values()}
    least_own, least_read = min(outputs, default=(0, 0))
    proportional = all(own * least_read == read * least_own for own, read in outputs)
    return least_read if outputs and least_read and proportional else None


def _last_layer(model: nn.Module) -> nn.Module | None:
    """Return the last linear layer or plain convolution of the classifier, or None."""
    for name in _NAMES:
        part = getattr(model, name, None)
        if not isinstance(part, nn.Module):
            continue
        layers = [m for m in part.modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]
        if layers:
            return layers[-1]
    return None


def _new_classifier(layer: nn.Module, classes: int) -> nn.Module:
    """Return a new layer with the arguments of ``layer`` and ``classes`` outputs."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, layer.bias is not None)
    conv = cast(Any, layer)
    new: nn.Module = type(conv)(
        conv.in_channels, classes, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        bias=conv.bias is not None, padding_mode=conv.padding_mode,
    )  # fmt: skip
    return new
