"""The loss of a training: cross-entropy with the labels, divergence from a teacher's outputs, or both."""

from __future__ import annotations

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional

from ..data.loading import NO_LABEL
from ..errors import Argument, InputError
from ..metrics.classification import check_labels
from ..metrics.outputs import class_logits
from .recipe import Recipe


class Objective:
    """The loss of a recipe. If the recipe distills, a teacher is needed."""

    def __init__(self, recipe: Recipe, teacher: nn.Module | None, classes: int) -> None:
        self.recipe, self.teacher, self.classes = recipe, teacher, classes
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Check the labels of a batch, apply mixup and cutmix; return the images and targets.

        Raises:
            InputError: labels are missing or beyond the network's classes.
        """
        if self.recipe.distill == 1:
            return images, labels
        if (labels == NO_LABEL).any():
            remedy = "give a folder for each class, or distill from the uncut network ("
            raise InputError("these images have no labels: ", remedy, Argument("distill"), ")")
        check_labels(labels, self.classes)
        if self.mixup is None or len(images) % 2:
            return images, labels
        return self.mixup(images.clone(), labels)

    def __call__(self, output: object, images: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch (scalar), in float32 or float64."""
        logits = _at_least_float32(class_logits(output))
        share = self.recipe.distill
        loss = logits.new_zeros(())
        if share < 1:
            smoothing = self.recipe.smoothing if targets.dim() == 1 else 0.0
            loss = (1 - share) * functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        if share > 0:
            assert self.teacher is not None
            with torch.no_grad():
                teacher = _at_least_float32(class_logits(self.teacher(images)))
            loss = loss + share * distillation(logits, teacher, self.recipe.temperature)
        return loss


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean KL divergence of the student's class probabilities from the teacher's, in nats (scalar).

    Both are softened by the temperature. The factor temperature^2 keeps the size of the gradients (Hinton, Vinyals,
    Dean 2015, sec. 2).
    """
    student, target = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits
