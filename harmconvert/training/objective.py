"""The objective of a training: a loss with the targets, the distance from a teacher's outputs, or both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional

from ..data.loading import NO_LABEL
from ..data.pictures import CLASSES
from ..errors import Argument, InputError
from ..metrics.classification import check_labels
from ..metrics.measuring import run_on
from ..metrics.outputs import class_logits
from ..network.heads import heads_of, run_with_heads
from .losses import CROSS_ENTROPY, Loss, output_distillation
from .recipe import Recipe


class Objective:
    """The loss of a recipe on a kind of data (``task``). If the recipe distills, a teacher is needed."""

    def __init__(
        self, recipe: Recipe, teacher: nn.Module | None, classes: int, loss: Loss = CROSS_ENTROPY, task: str = CLASSES
    ) -> None:
        self.recipe, self.teacher, self.classes, self.loss, self.task = recipe, teacher, classes, loss, task
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)

    @property
    def classifies(self) -> bool:
        """Return whether the targets are labels."""
        return self.loss is CROSS_ENTROPY

    def prepare(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Check the targets of a batch, apply mixup and cutmix to images with labels; return the inputs and targets.

        Raises:
            InputError: labels are missing or beyond the network's classes.
        """
        if self.recipe.distill == 1:
            return inputs, targets
        unlabelled = isinstance(targets, Tensor) and targets.dim() == 1 and bool((targets == NO_LABEL).any())
        if targets is None or unlabelled:
            remedy = "give a folder for each class, or distill from the uncut network ("
            raise InputError("these images have no labels: ", remedy, Argument("distill"), ")")
        if not self.classifies:
            return inputs, targets
        check_labels(targets, self.classes)
        if self.mixup is None or len(inputs) % 2:
            return inputs, targets
        return self.mixup(inputs.clone(), targets)

    def __call__(self, network: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, Any]:
        """Return the mean loss of a batch (scalar, in float32 or float64), and the outputs of the network.

        A detector computes its losses itself, from the inputs and targets. Without them it runs in eval mode.
        """
        share, own = self.recipe.distill, self.loss.of_network
        arguments = (inputs, targets) if own and share < 1 else inputs
        with _in_eval_mode(network) if own and share == 1 else nullcontext():
            outputs, heads = run_with_heads(network, lambda: run_on(network, arguments))
        losses = []
        if share < 1:
            losses.append((1 - share) * self._supervised(outputs, targets))
        if share > 0:
            losses.append(share * self._distilled(heads if heads_of(network) else outputs, inputs))
        return torch.stack(losses).sum(), outputs

    def _supervised(self, outputs: Any, targets: Any) -> Tensor:
        if not self.classifies:
            return self.loss(outputs, targets)
        smoothing = self.recipe.smoothing if targets.dim() == 1 else 0.0
        logits = class_logits(outputs)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return functional.cross_entropy(logits, targets, label_smoothing=smoothing)

    def _distilled(self, outputs: Any, inputs: Any) -> Tensor:
        teacher = self.teacher
        assert teacher is not None
        with torch.no_grad():
            expected, heads = run_with_heads(teacher, lambda: run_on(teacher, inputs))
        if self.classifies and not heads:
            outputs, expected = _logits_alone(outputs), _logits_alone(expected)
        return output_distillation(outputs, heads or expected, self.recipe.temperature, self.task)


def _logits_alone(outputs: Any) -> Any:
    """Return the logits of the main head of a classifier; the outputs of another network unchanged."""
    try:
        return class_logits(outputs)
    except InputError:
        return outputs


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Run a network in eval mode inside, with gradients; restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
