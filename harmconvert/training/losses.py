"""What the outputs of a network are compared with in a training, and how: the loss of each kind of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.pictures import BOXES, CLASSES, IMAGES, MASKS, TENSORS
from ..errors import Argument, HarmconvertError, InputError, UsageError, first_line
from ..metrics.outputs import describe, main_output
from ..metrics.segmentation import IGNORED, check_masks, masks_of, pixel_logits
from ..network.heads import floating_tensors
from ..user_code import import_function

# The weight of an auxiliary head in torchvision's own training of segmentation networks.
_AUXILIARY = 0.5
DISTILLATION = "distillation"


@dataclass(frozen=True)
class Loss:
    """A loss of the outputs and targets of a batch: a scalar.

    ``of_network``: the network computes its losses itself, from inputs and targets.
    """

    name: str
    function: Callable[[Any, Any], Any] = field(repr=False)
    of_network: bool = False

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch, in float32 or float64.

        Raises:
            InputError: the outputs or targets do not fit, or the function returns no scalar tensor that depends on the
                trained parameters.
        """
        try:
            loss = self.function(outputs, targets)
        except (HarmconvertError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(f"the loss {self.name} fails: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(f"the loss {self.name} returns {_kind(loss)}: it should return a tensor with one number")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(
                f"the loss {self.name} does not depend on the trained parameters: compute it from the outputs of the "
                "network, without detach() or no_grad()"
            )
        loss = loss.reshape(())
        return loss.float() if loss.dtype.itemsize < 4 else loss


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _pixel_cross_entropy(outputs: Any, masks: Any) -> Tensor:
    """Return the mean cross-entropy of pixels; with an auxiliary head, half of its own is added."""
    masks = masks_of(masks)
    size = (masks.shape[1], masks.shape[2])

    def of(output: Any) -> Tensor:
        logits = pixel_logits(output, size)
        check_masks(masks, logits.shape[1])
        return functional.cross_entropy(logits.float(), masks, ignore_index=IGNORED)

    loss = of(outputs)
    auxiliary = outputs.get("aux") if isinstance(outputs, Mapping) else None
    return loss if auxiliary is None else loss + _AUXILIARY * of(auxiliary)


def _image_loss(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    def loss(outputs: Any, targets: Any) -> Tensor:
        images = main_output(outputs)
        for one in (images, targets):
            if not isinstance(one, Tensor) or not one.is_floating_point():
                raise InputError(f"l1 and l2 compare tensors of floating point: this is {describe(one)}")
        if images.shape != targets.shape:
            sizes = f"the outputs have {describe(images)}, the targets {describe(targets)}"
            raise InputError(f"l1 and l2 compare tensors of one shape: {sizes}")
        return function(images.float(), targets.float())

    return loss


def _sum_of_losses(outputs: Any, targets: Any) -> Tensor:
    """Return the sum of the losses that a detector of torchvision returns in training."""
    if not isinstance(outputs, Mapping) or not all(isinstance(one, Tensor) for one in outputs.values()) or not outputs:
        raise InputError(
            f"the loss of a detector is a dict of losses, as torchvision's detectors return in training: this is a "
            f"{type(outputs).__name__}"
        )
    return torch.stack([one.reshape(()) for one in outputs.values()]).sum()


# Cross-entropy of classes is computed by the objective, which mixes labels and smooths them.
CROSS_ENTROPY = Loss("cross-entropy", lambda outputs, targets: functional.cross_entropy(outputs, targets))
PIXELS = Loss("cross-entropy", _pixel_cross_entropy)
L1, L2 = Loss("l1", _image_loss(functional.l1_loss)), Loss("l2", _image_loss(functional.mse_loss))
DETECTOR = Loss("detector", _sum_of_losses, of_network=True)
_DEFAULTS = {CLASSES: CROSS_ENTROPY, TENSORS: CROSS_ENTROPY, MASKS: PIXELS, BOXES: DETECTOR, IMAGES: L1}
LOSSES = ("cross-entropy", "l1", "l2", "detector", DISTILLATION)


def loss_of(loss: str | Callable[[Any, Any], Any] | None, task: str) -> Loss:
    """Return a loss by its name, by ``FILE.py:FUNCTION`` or as a function; None or empty: that of the kind of data.

    >>> loss_of(None, "masks").name, loss_of("l2", "images").name, loss_of(None, "boxes").name
    ('cross-entropy', 'l2', 'detector')

    Raises:
        UsageError: there is no such loss, file or function, or it is not for this kind of data.
    """
    default = _DEFAULTS[task]
    if not loss or loss in (default.name, DISTILLATION):
        return default
    if callable(loss):
        return Loss(getattr(loss, "__name__", type(loss).__name__), loss)
    if ":" in loss:
        return Loss(loss, import_function(loss))
    if loss not in LOSSES:
        raise UsageError(f"unknown loss {loss!r}: use {', '.join(LOSSES)}, or FILE.py:FUNCTION")
    if task == IMAGES and loss == "l2":
        return L2
    raise UsageError(
        Argument("loss", loss), f" is not for this data ({task}): leave it out for {default.name}, or give a function"
    )


def output_distillation(student: Any, teacher: Any, temperature: float, task: str = CLASSES) -> Tensor:
    """Return how far the outputs of a student are from those of its teacher (scalar).

    Of logits of classes (N, C), or of pixels (N, C, H, W) if the data has masks, this is the mean KL divergence of the
    softened probabilities (see `distillation`); of other outputs, the mean over all floating-point tensors of the
    squared difference, divided by the squares.

    Raises:
        InputError: the outputs have other shapes.
    """
    own, expected = floating_tensors(student), floating_tensors(teacher)
    if [t.shape for t in own] != [t.shape for t in expected] or not own:
        raise InputError("the outputs of the network and of its teacher have other shapes: they cannot be compared")
    if len(own) == 1 and own[0].dim() == 2 and own[0].shape[1] > 1 and task in (CLASSES, TENSORS):
        return distillation(_precise(own[0]), _precise(expected[0]), temperature)
    if task == MASKS and own[0].dim() == 4 and own[0].shape[1] > 1:
        pairs = ((_pixels(a), _pixels(b)) for a, b in zip(own, expected, strict=True) if a.dim() == 4)
        return torch.stack([distillation(a, b, temperature) for a, b in pairs]).mean()
    errors = [
        functional.mse_loss(_precise(a), _precise(b)) / _precise(b).square().mean().clamp_min(1e-12)
        for a, b in zip(own, expected, strict=True)
        if a.numel()
    ]
    return torch.stack(errors).mean()


def _pixels(logits: Tensor) -> Tensor:
    return _precise(logits).movedim(1, -1).flatten(0, -2)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean KL divergence of the student's class probabilities from the teacher's, in nats (scalar).

    Both are softened by the temperature. The factor temperature^2 keeps the size of the gradients (Hinton, Vinyals,
    Dean 2015, sec. 2).
    """
    student, target = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2
