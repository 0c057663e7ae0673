"""What a loader yields, turned into inputs of a network."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import HarmconvertError, InputError, UsageError, first_line
from ..network.exchange import in_precision, in_sixteen_bits
from ..network.values import rebuild_sequence, tensors_in
from .capture import forward


class Reader:
    """Finds the input in what a loader yields: tensors, (input, target) pairs whose target is ignored, mappings of
    keywords, lists of single images as detectors take them. NumPy arrays become tensors.

    A list may be one input or a pair that a loader collated to a list. Where that is open, ``model`` decides: the first
    reading on which it runs is taken. Without a model, a list of tensors of three axes is a list of images.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._taken: dict[tuple[str, ...], str] = {}

    def __call__(self, item: Any) -> Any:
        """The input, as `surgery.call` takes it."""
        readings = self._readings(_as_tensors(item))
        names = tuple(readings)
        if len(names) > 1 and self._model is not None and names not in self._taken:
            self._taken[names] = next((name for name in names if self._runs(readings[name])), names[0])
        return readings[self._taken.get(names, names[0])]

    def all(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The inputs with their numbers.

        Raises:
            UsageError: not an iterable of batches. InputError: it fails, or yields something without tensors.
        """
        for index, item in enumerate(items(batches)):
            input = self(item)
            if not tensors_in(input):
                raise InputError(
                    f"calibration batch {index} is a {type(item).__name__} without tensors: yield tensors, "
                    "(input, target) pairs or dicts of keywords"
                )
            yield index, input

    def runs(self, item: Any) -> bool:
        """Whether the network runs on what the loader yields."""
        return self._runs(self(item))

    def _runs(self, input: Any) -> bool:
        assert self._model is not None
        try:
            forward(self._model, input, undo=True)
        except Exception:
            return False
        return True

    def _readings(self, item: Any) -> dict[str, Any]:
        """Ways to read it, by name, the likeliest first."""
        if isinstance(item, Mapping):
            return self._of_mapping(item)
        if not isinstance(item, tuple | list) or not item:
            return {"input": item}
        images = all(isinstance(part, Tensor) and part.dim() == 3 for part in item)
        readings: dict[str, Any] = {"list": item} if images and isinstance(item, list) else {}
        readings |= {f"first, {name}": input for name, input in self._of_first(item[0]).items()}
        several = isinstance(item, list) and all(isinstance(part, Tensor) and part.dim() > 1 for part in item)
        if images or several or all(isinstance(part, Mapping) for part in item):
            readings.setdefault("list", [*item])
        if hasattr(item, "_asdict"):
            readings |= self._of_mapping(item._asdict())
        return readings

    def _of_first(self, first: Any) -> dict[str, Any]:
        if isinstance(first, Mapping):
            return self._of_mapping(first)
        if isinstance(first, tuple):
            tensors = all(isinstance(part, Tensor) for part in first)
            return {"arguments": first, **({"list": [*first]} if tensors else {})}
        if isinstance(first, list):  # loaders collate tuples to lists
            return {"list": first, "arguments": tuple(first)}
        return {"input": first}

    def _of_mapping(self, item: Mapping[str, Any]) -> dict[str, Any]:
        accepted = _keywords(self._model)
        if accepted is None or accepted.issuperset(item):
            return {"keywords": item}
        kept = {key: value for key, value in item.items() if key in accepted}
        return {"keywords": kept} if tensors_in(kept) else {"keywords": item, "argument": (item,)}


def in_running_precision(model: nn.Module, batches: Iterable[Any]) -> tuple[nn.Module, Iterable[Any]]:
    """The network, or a float32 copy of one stored in 16 bits, all of it or a part, that runs on the first batch only
    so; and all batches.

    Raises: as `items`.
    """
    if not in_sixteen_bits(model):
        return model, batches
    read = items(batches)
    first = list(islice(read, 1))
    if first and not Reader(model).runs(first[0]):
        precise = in_precision(model, torch.float32)
        if Reader(precise).runs(first[0]):
            model = precise
    return model, chain(first, read)


def items(batches: Iterable[Any]) -> Iterator[Any]:
    """What an iterable of batches yields.

    Raises:
        UsageError: it is no such iterable. InputError: it fails.
    """
    if isinstance(batches, Tensor | np.ndarray | str | bytes | Mapping) or not isinstance(batches, Iterable):
        raise UsageError(f"calibration= is a {type(batches).__name__}: give a list or a loader of batches of inputs")
    iterator, index = None, 0
    while True:
        try:
            iterator = iter(batches) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            return
        except HarmconvertError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"calibration= fails at batch {index}: {what}; repair the loader") from error
        yield item
        index += 1


def _keywords(model: nn.Module | None) -> set[str] | None:
    """The keywords that a network's forward accepts; None where it accepts all, or its signature does not say."""
    if model is None:
        return None
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _as_tensors(item: Any) -> Any:
    """The same nest with NumPy arrays of numbers as tensors, and mappings of any class as dicts."""
    if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
        return torch.tensor(item)
    if isinstance(item, Mapping):
        return {key: _as_tensors(value) for key, value in item.items()}
    return rebuild_sequence(item, map(_as_tensors, item)) if isinstance(item, list | tuple) else item
