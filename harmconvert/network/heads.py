"""The outputs by which networks are compared: all floating-point tensors; for detectors, what their heads compute.

In eval mode a detector drops boxes of low score and boxes that overlap. After a small change of the weights, the number
of boxes is another one. So the logits and regressions before this step are compared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .values import tensors_in

# The head of each class of torchvision's detectors.
_HEADS = {"SSD": "head", "RetinaNet": "head", "FCOS": "head", "GeneralizedRCNN": "rpn.head"}
_MODULES = ("ssd", "retinanet", "fcos", "generalized_rcnn")


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads whose outputs are compared, by name; empty if the network has no detector of torchvision.

    In a detector of two stages this is the head that proposes regions: those of the second stage run on the regions
    that are left over.
    """
    loaded = [sys.modules.get(f"torchvision.models.detection.{name}") for name in _MODULES]
    known = ((getattr(one, name, None), place) for one in loaded for name, place in _HEADS.items())
    classes = {found: place for found, place in known if found is not None}
    heads = {}
    for name, module in model.named_modules() if classes else ():
        place = next((place for kind, place in classes.items() if isinstance(module, kind)), None)
        if place is not None:
            heads[f"{name}.{place}".lstrip(".")] = module.get_submodule(place)
    return heads


def run_with_heads(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Run a network; return its outputs, and those of the heads of a detector, by name (empty if it has none)."""
    heads, outputs = heads_of(model), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(head: nn.Module, args: Any, output: Any) -> None:
            outputs[name] = output

        return hook

    handles = [head.register_forward_hook(keep(name)) for name, head in heads.items()]
    try:
        return run(), outputs
    finally:
        for handle in handles:
            handle.remove()


def compared_outputs(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run a network in eval mode; return its outputs, or those of the heads of a detector, by name.

    >>> compared_outputs(nn.Identity(), lambda: 3)
    3
    """
    outputs, heads = run_with_heads(model, run)
    return heads or outputs


def floating_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors in nested outputs, in order; all tensors if none is of floating point.

    Whole numbers beside them, such as the class of the largest logit, follow from the others up to rounding.
    """
    tensors = tensors_in(outputs)
    return [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()] or tensors


def compared_text(model: nn.Module) -> str | None:
    """Return a note that says which tensors of a detector are compared; None for other networks."""
    heads = heads_of(model)
    if not heads:
        return None
    return f"the outputs of {', '.join(heads)} are compared: those of the detector depend on which boxes are left"
