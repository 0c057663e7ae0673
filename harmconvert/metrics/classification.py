"""Metrics of classes: top-1, top-5, cross-entropy, and how the classes differ from those of the uncut network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..data.loading import NO_LABEL
from ..errors import Argument, InputError, counted
from .metric import UNCUT, Metric, Outcome
from .outputs import class_logits, describe, main_output


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise InputError if a label is beyond the network's classes."""
    if len(labels) and (largest := int(labels.max())) >= classes:
        problem = f"label {largest} is beyond the {counted(classes, 'class')} of this network"
        data, new = Argument("data"), Argument("num_classes", "N")
        raise InputError(problem, ": check the data set (", data, "), or give a new classifier with finetune ", new)


def _labelled(outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Return the logits (N, classes; float64) and the labels (N,) of the samples that have a label."""
    logits = class_logits(outcome.outputs).double().cpu()
    if outcome.targets is None:
        return logits[:0], torch.empty(0, dtype=torch.long)
    labels = outcome.targets
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise InputError(
            f"a classifier is measured with one class number for each sample: these are {describe(labels)}"
        )
    labels = labels.long().cpu()
    if len(labels) != len(logits):
        raise InputError(f"the network has {counted(len(logits), 'output')} for {counted(len(labels), 'label')}")
    known = labels != NO_LABEL
    logits, labels = logits[known], labels[known]
    check_labels(labels, logits.shape[1])
    return logits, labels


def _top1(outcome: Outcome) -> np.ndarray:
    logits, labels = _labelled(outcome)
    return (logits.argmax(1) == labels).double().numpy()


def _top5(outcome: Outcome) -> np.ndarray:
    logits, labels = _labelled(outcome)
    top = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return top.any(1).double().numpy()


def _loss(outcome: Outcome) -> np.ndarray:
    logits, labels = _labelled(outcome)
    return functional.cross_entropy(logits, labels, reduction="none").numpy()


def _both(outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Return the logits (N, classes, positions; float64) of the network and of the uncut one."""
    both = []
    for output in (outcome.outputs, outcome.uncut):
        logits = main_output(output)
        if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
            raise InputError(
                f"classes are compared by their logits (samples, classes, ...): this is {describe(logits)}"
            )
        both.append(logits.double().cpu().flatten(2) if logits.dim() > 2 else logits.double().cpu()[..., None])
    if both[0].shape != both[1].shape:
        classes = f"{both[0].shape[1]} and {counted(both[1].shape[1], 'class')}"
        raise InputError(f"the two networks have {classes}: they cannot be compared")
    return both[0], both[1]


def _agreement(outcome: Outcome) -> np.ndarray:
    logits, expected = _both(outcome)
    return (logits.argmax(1) == expected.argmax(1)).double().mean(1).numpy()


def _kl(outcome: Outcome) -> np.ndarray:
    logits, expected = _both(outcome)
    divergence = functional.kl_div(logits.log_softmax(1), expected.log_softmax(1), None, None, "none", True)
    return divergence.sum(1).mean(1).numpy()


TOP1 = Metric("top1", "top-1", _top1, unit="%", scale=100)
TOP5 = Metric("top5", "top-5", _top5, unit="%", scale=100)
LOSS = Metric("loss", "loss", _loss, unit="nats", higher_is_better=False)
AGREEMENT = Metric("agreement", "agreement", _agreement, unit="%", scale=100, compares_with=(UNCUT,))
KL = Metric("kl", "KL", _kl, unit="nats", higher_is_better=False, compares_with=(UNCUT,))
METRICS = (TOP1, TOP5, AGREEMENT, KL)
