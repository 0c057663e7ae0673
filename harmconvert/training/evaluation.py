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
Z = 1.959963984540054


@dataclass(frozen=True)
class Evaluation:
    """The result of a network on a set of images, over all processes.

    ``images`` is the number of images read; ``labelled`` is the number of those with a label, on which ``top1``,
    ``top5`` (shares) and ``loss`` (mean cross-entropy in nats) are measured (None without labels). ``agreement`` (share
    of images with the same top-1) and ``divergence`` (mean KL of the class probabilities, in nats) compare with a
    second network. ``images_per_second`` measures only the forward passes. ``unreadable`` images were left out.
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
    """Return the 95 % confidence interval of a share seen in ``count`` trials (Wilson 1927), within 0 and 1.

    >>> tuple(round(bound, 4) for bound in wilson_interval(0.99, 1000))
    (0.9817, 0.9946)
    """
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
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
    names = ("images", "labelled", "top1", "top5", "loss", "agree", "kl")
    seconds = 0.0
    sums = torch.zeros(len(names), dtype=torch.float64)
    unreadable: list[str] = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(*(network for network in (model, other) if network is not None)), autocast():
        for images, labels, problems, _ in batches:
            unreadable += problems
            if not len(images):
                continue
            images = images.to(device, non_blocking=True)
            start = time.perf_counter()
            logits = class_logits(output_on(model, images)).double().cpu()  # waits for a GPU to finish
            seconds += time.perf_counter() - start
            if variety is not None:
                variety.add(logits, labels)
            sums[:5] += torch.tensor([len(images), *_scores(logits, labels)], dtype=torch.float64)
            if other is not None:
                expected = class_logits(output_on(other, images)).double().cpu()
                if expected.shape != logits.shape:
                    shapes = f"{logits.shape[1]} and {expected.shape[1]}"
                    raise InputError(f"the two networks have {shapes} classes: they cannot be compared")
                sums[5] += (logits.argmax(1) == expected.argmax(1)).sum()
                sums[6] += functional.kl_div(logits.log_softmax(1), expected.log_softmax(1), None, None, "sum", True)
            progress(len(images))
    unreadable = [name for names in gathered(unreadable) for name in names]
    slowest = max(gathered(seconds))
    sum_over_ranks([sums])
    total = dict(zip(names, sums.tolist(), strict=True))
    if not total["images"]:
        why = f": none could be read ({shortened(unreadable, 2)})" if unreadable else ""
        raise InputError(f"no image to evaluate on{why}")

    def share(name: str, of: str) -> float | None:
        return total[name] / total[of] if total[of] else None

    compared = other is not None
    return Evaluation(
        int(total["images"]),
        int(total["labelled"]),
        share("top1", "labelled"),
        share("top5", "labelled"),
        share("loss", "labelled"),
        share("agree", "images") if compared else None,
        share("kl", "images") if compared else None,
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
    """Examples, the mean of a metric over them, and seconds of the forwards, over all processes' batches.

    Args:
        batches: inputs, as `harmconvert.network.call` takes them, and targets.
        metric: of a batch's outputs and targets: one number for each example, or their mean.
        progress: called with the number of examples of each batch.

    Raises:
        InputError: no batch.
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
        raise InputError("no batch to evaluate on")
    return int(sums[0]), (sums[1] / sums[0]).item(), slowest


def output_on(model: nn.Module, images: Tensor) -> Any:
    """Return the output of a network on a batch of images.

    If memory runs out, torch's own exception is raised.

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
        what = f"the network does not run on images of {size}: {type(error).__name__}: {first_line(error)}"
        raise UsageError(what, "; give the size that it takes (", Argument("input_size", "C,H,W"), ")") from error


def class_logits(output: Any) -> Tensor:
    """Return the logits (N, classes) in a classifier's output; if it has auxiliary heads, those of the main head.

    Raises:
        InputError: the network is not a classifier.
    """
    if hasattr(output, "logits"):
        output = output.logits
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"this network is not a classifier: its output has {what}, not (images, classes)")
    return output


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise InputError if a label is beyond the network's classes."""
    if len(labels) and (largest := int(labels.max())) >= classes:
        what = f"label {largest} is beyond the {counted(classes, 'class')} of this network"
        data, new = Argument("data"), Argument("num_classes", "N")
        raise InputError(what, ": are these its data (", data, ")? finetune ", new, " gives it another classifier")


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
