"""Samples of a loader of the user, held in memory, so that they can be shuffled, divided and resumed as all others."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HarmconvertError, InputError, counted, first_line
from ..user_code import import_function
from .pictures import BOXES, CLASSES, IMAGES, MASKS, Pictures


def loader_of(name: str, split: str) -> Iterable[Any]:
    """Return the loader that a function of the user returns, named ``FILE.py:FUNCTION``.

    If the function has an argument ``split``, it gets the name of the split.

    Raises:
        UsageError: there is no such file or function. InputError: the function fails, or returns no loader.
    """
    function = import_function(name)
    try:
        takes_split = "split" in inspect.signature(function).parameters
        loader = function(split=split) if takes_split else function()
    except HarmconvertError:
        raise
    except Exception as error:
        raise InputError(f"{name} fails: {type(error).__name__}: {first_line(error)}") from error
    if isinstance(loader, str | bytes) or not isinstance(loader, Iterable):
        kind = type(loader).__name__
        raise InputError(f"{name} returns a {kind}: it should return a loader of (inputs, targets) pairs")
    return loader


class LoadedSamples(Pictures):
    """The samples in the batches of a loader: (inputs, targets) pairs, or inputs alone. They are used as they are.

    The kind of the data follows from the targets: whole numbers (N,) are labels, (N, H, W) are masks, dicts of each
    sample have boxes, other tensors are target images.

    >>> samples = LoadedSamples([(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))], "a loader")
    >>> len(samples), samples.task
    (2, 'masks')

    Raises:
        InputError: there is no sample, or a batch is neither a pair nor inputs, or has more inputs than targets.
    """

    prepared = True

    def __init__(self, loader: Iterable[Any], name: str) -> None:
        self.loader_name = name
        self.samples = [sample for number, batch in enumerate(loader) for sample in _samples_of(batch, number, name)]
        if not self.samples:
            raise InputError(f"{name} yields no sample")
        targets = [target for _, target in self.samples]
        self.labelled = targets[0] is not None
        self.task = _kind_of(targets[0])
        if self.task == BOXES:
            self.largest_label = max((int(one["labels"].max()) for one in targets if len(one["labels"])), default=0)

    @property
    def description(self) -> str:  # type: ignore[override]
        """Return what was recognised, for a message."""
        return f"{counted(len(self), 'sample')} in memory: {self.task if self.labelled else 'without targets'}"

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Any, Any]:
        return self.samples[index]

    def name(self, index: int) -> str:
        return f"sample {index} of {self.loader_name}"


def _samples_of(batch: Any, number: int, name: str) -> list[tuple[Any, Any]]:
    pair = isinstance(batch, list | tuple) and len(batch) == 2
    inputs, targets = batch if pair else (batch, None)
    inputs, targets = (torch.as_tensor(one) if isinstance(one, np.ndarray) else one for one in (inputs, targets))
    if not isinstance(inputs, Tensor | list):
        kind = type(inputs).__name__
        raise InputError(f"{name} yields a {kind} as batch {number}: fine-tuning needs (inputs, targets) of tensors")
    if targets is None:
        return [(one, None) for one in inputs]
    if not isinstance(targets, Tensor | Sequence) or len(targets) != len(inputs):
        raise InputError(f"{name} yields other numbers of inputs and targets in batch {number}")
    return list(zip(inputs, map(_plain_target, targets), strict=True))


def _plain_target(target: Any) -> Any:
    """Return a label as a number; other targets unchanged."""
    is_label = isinstance(target, Tensor) and target.dim() == 0 and not target.is_floating_point()
    return int(target) if is_label else target


def _kind_of(target: Any) -> str:
    if isinstance(target, Mapping):
        return BOXES
    if isinstance(target, Tensor) and target.dim():
        return MASKS if target.dim() == 2 and not target.is_floating_point() else IMAGES
    return CLASSES
