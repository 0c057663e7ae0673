"""Accuracy of a network on labelled images, and its agreement with another network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.loading import NO_LABEL, Batch
from ..data.variety import Variety
from ..errors import Argument, HarmconvertError, InputError, UsageError, counted, first_line, shortened
from ..network.distributed import gathered, sum_over_ranks
from ..network.faults import user_code_error
from ..network.running import call, evaluating
from ..network.values import batch_size, match_dtype

# Two-sided 95 % of the normal distribution.
Z_95 = 1.959963984540054
# Sums over images that `evaluate` collects.
_SUMS = ("images", "labelled", "top1", "top5", "loss", "agreement", "divergence")


@dataclass(frozen=True)
class Evaluation:
    """The result of a network on a set of images, over all processes.

    ``images``: number of images read. ``labelled``: number of images with a label. ``top1``, ``top5`` (shares) and
    ``loss`` (mean cross-entropy in nats) are measured on the labelled images; they are None without labels.
    ``agreement`` (share of images with the same top-1) and ``divergence`` (mean KL of the class probabilities, in nats)
    compare with a second network; they are None without one. ``images_per_second``: speed of the forward passes alone.
    ``unreadable``: names of images that could not be read and were left out.
    """

    images: int
    labelled: int
    top1: float | None
    top5: float | None
    loss: float | None
    agreement: float | None
    divergence: float | None
    images_per_second: float
    unreadable: tuple[str, ...] = ()

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of top-1 (`wilson_interval`)."""
        return None if self.top1 is None else wilson_interval(self.top1, self.labelled)

    def __str__(self) -> str:
        if self.top1 is not None and self.interval is not None:
            low, high = self.interval
            return f"top-1 {self.top1:.2%} (95 %: {low:.2%} to {high:.2%}), {counted(self.labelled, 'image')}"
        if self.agreement is not None:
            return f"agreement {self.agreement:.2%}, KL {self.divergence:.3g}, {counted(self.images, 'image')}"
        return f"{counted(self.images, 'image')} without labels"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict, including the confidence interval."""
        return {**asdict(self), "top1_interval": self.interval}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share measured in ``count`` trials (Wilson 1927), within 0 and 1.

    >>> tuple(round(bound, 4) for bound in wilson_interval(0.99, 1000))
    (0.9817, 0.9946)
    """
    spread = Z_95 * math.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    middle, scale = share + Z_95**2 / (2 * count), 1 + Z_95**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    other: nn.Module | None = None,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    variety: Variety | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Return top-1, top-5, loss and agreement with another network, over the batches of all processes.

    The network runs in eval mode on its own device; its state is restored afterwards.

    Args:
        other: the network to compare with.
        variety: collects the outputs of this process, to check whether they vary.
        progress: called with the number of images of each batch.

    Raises:
        UsageError: the network does not run on images of this size.
        InputError: there are no images, a label is beyond the network's classes, or the output is not one row of logits
            for each image.
    """
    seconds = 0.0
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    unreadable: list[str] = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(*(network for network in (model, other) if network is not None)), autocast():
        for images, labels, names, _ in batches:
            unreadable += names
            if not len(images):
                continue
            images = images.to(device, non_blocking=True)
            start = time.perf_counter()
            logits = class_logits(run_on_images(model, images)).double().cpu()  # waits for a GPU to finish
            seconds += time.perf_counter() - start
            if variety is not None:
                variety.add(logits, labels)
            expected = None if other is None else class_logits(run_on_images(other, images)).double().cpu()
            scores = (len(images), *_scores(logits, labels), *_comparison(logits, expected))
            sums += torch.tensor(scores, dtype=torch.float64)
            progress(len(images))
    return _evaluation(sums, seconds, unreadable, compared=other is not None)


def _evaluation(sums: Tensor, seconds: float, unreadable: list[str], compared: bool) -> Evaluation:
    """Return the means over the images of all processes; the arguments are those of this process."""
    unreadable = [name for names in gathered(unreadable) for name in names]
    slowest = max(gathered(seconds))
    sum_over_ranks([sums])
    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    if not total["images"]:
        reason = f": none could be read ({shortened(unreadable, 2)})" if unreadable else ""
        raise InputError(f"there are no images to evaluate on{reason}")

    def mean(name: str, count: str) -> float | None:
        return total[name] / total[count] if total[count] else None

    return Evaluation(
        int(total["images"]),
        int(total["labelled"]),
        mean("top1", "labelled"),
        mean("top5", "labelled"),
        mean("loss", "labelled"),
        mean("agreement", "images") if compared else None,
        mean("divergence", "images") if compared else None,
        total["images"] / max(slowest, 1e-9),
        tuple(unreadable),
    )


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    metric: Callable[[Any, Any], Any],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[int, float, float]:
    """Return the number of examples, the mean of a metric, and the seconds of the forward passes, over all processes.

    Args:
        batches: pairs of inputs, in the form that `harmconvert.network.call` takes, and targets.
        metric: a function of the outputs and targets of a batch; returns one number for each example, or their mean.
        progress: called with the number of examples of each batch.

    Raises:
        InputError: there is no batch.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(model):
        for inputs, targets in batches:
            inputs = match_dtype(inputs, model)
            start = time.perf_counter()
            output = call(model, inputs)
            seconds, count = time.perf_counter() - start, batch_size(inputs)
            value = torch.as_tensor(metric(output, targets), dtype=torch.float64).mean().item()
            sums += torch.tensor([count, count * value, seconds], dtype=torch.float64)
            progress(count)
    slowest = max(gathered(sums[2].item()))
    sum_over_ranks([sums])
    if not sums[0]:
        raise InputError("there is no batch to evaluate on")
    return int(sums[0]), (sums[1] / sums[0]).item(), slowest


def run_on_images(model: nn.Module, images: Tensor) -> Any:
    """Return the output of a network on a batch of images.

    If the memory is full, the function raises torch's own exception.

    Raises:
        UsageError: the network does not run on images of this size.
    """
    try:
        return model(images)
    except (HarmconvertError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error):
            raise
        if (bug := user_code_error(error)) is not None:
            raise bug from error
        size = "x".join(map(str, images.shape[1:]))
        problem = f"the network does not run on images of {size}: {type(error).__name__}: {first_line(error)}"
        raise UsageError(problem, "; give its own input size (", Argument("input_size", "C,H,W"), ")") from error


def class_logits(output: Any) -> Tensor:
    """Return the logits (N, classes) in a classifier's output; with auxiliary heads, those of the main head.

    Raises:
        InputError: the network is not a classifier.
    """
    if hasattr(output, "logits"):
        output = output.logits
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"this network is not a classifier: its output has {kind}, not (images, classes)")
    return output


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise InputError if a label is beyond the network's classes."""
    if len(labels) and (largest := int(labels.max())) >= classes:
        problem = f"label {largest} is beyond the {counted(classes, 'class')} of this network"
        data, new = Argument("data"), Argument("num_classes", "N")
        raise InputError(problem, ": check the data set (", data, "), or give a new classifier with finetune ", new)


def _scores(logits: Tensor, labels: Tensor) -> tuple[int, int, int, float]:
    """Return the number of labelled images, those correct at top-1 and at top-5, and the sum of their losses."""
    known = labels != NO_LABEL
    logits, labels = logits[known], labels[known]
    if not len(labels):
        return 0, 0, 0, 0.0
    check_labels(labels, logits.shape[1])
    top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum").item()
    return len(labels), int((logits.argmax(1) == labels).sum()), int(top.any(1).sum()), loss


def _comparison(logits: Tensor, expected: Tensor | None) -> tuple[int, float]:
    """Return the number of images with the same top-1, and the sum of their divergences; zeros without ``expected``."""
    if expected is None:
        return 0, 0.0
    if expected.shape != logits.shape:
        classes = f"{logits.shape[1]} and {counted(expected.shape[1], 'class')}"
        raise InputError(f"the two networks have {classes}: they cannot be compared")
    divergence = functional.kl_div(logits.log_softmax(1), expected.log_softmax(1), None, None, "sum", True)
    return int((logits.argmax(1) == expected.argmax(1)).sum()), divergence.item()
