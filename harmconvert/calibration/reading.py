"""Turn the items that a loader yields into inputs of a network."""

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
    """Finds the input in an item of a loader.

    Items may be tensors, (input, target) pairs whose target is ignored, mappings of keywords, or lists of single
    images, as detectors take them. NumPy arrays become tensors. A list may be one input, or a pair that the loader
    turned into a list. In such cases ``model`` decides: the first interpretation on which it runs is used. Without a
    model, a list of tensors with three axes is a list of images.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._chosen: dict[tuple[str, ...], str] = {}

    def __call__(self, item: Any) -> Any:
        """Return the input in an item, in the form that `network.running.call` accepts."""
        readings = self._readings(_with_tensors(item))
        names = tuple(readings)
        if len(names) > 1 and self._model is not None and names not in self._chosen:
            self._chosen[names] = next((name for name in names if self._model_runs(readings[name])), names[0])
        return readings[self._chosen.get(names, names[0])]

    def all(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number and the input of each batch.

        Raises:
            UsageError: ``batches`` is not an iterable of batches.
            InputError: it raises an error, or yields an item without tensors.
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
        """Return whether the network runs on an item of the loader."""
        return self._model_runs(self(item))

    def _model_runs(self, input: Any) -> bool:
        assert self._model is not None
        try:
            forward(self._model, input, undo=True)
        except Exception:
            return False
        return True

    def _readings(self, item: Any) -> dict[str, Any]:
        """Return the possible inputs in an item, by name of the interpretation, the most likely first."""
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
        if isinstance(first, list):  # loaders turn tuples into lists
            return {"list": first, "arguments": tuple(first)}
        return {"input": first}

    def _of_mapping(self, item: Mapping[str, Any]) -> dict[str, Any]:
        accepted = _keywords(self._model)
        if accepted is None or accepted.issuperset(item):
            return {"keywords": item}
        kept = {key: value for key, value in item.items() if key in accepted}
        return {"keywords": kept} if tensors_in(kept) else {"keywords": item, "argument": (item,)}


def in_runnable_precision(model: nn.Module, batches: Iterable[Any]) -> tuple[nn.Module, Iterable[Any]]:
    """Return a network that runs on the first batch, and all batches.

    This is ``model``, or a float32 copy of it if tensors of ``model`` are stored in 16 bits and only the copy runs.
    See `items` for errors.
    """
    if not in_sixteen_bits(model):
        return model, batches
    iterator = items(batches)
    first = list(islice(iterator, 1))
    if first and not Reader(model).runs(first[0]):
        precise = in_precision(model, torch.float32)
        if Reader(precise).runs(first[0]):
            model = precise
    return model, chain(first, iterator)


def items(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of an iterable of batches, with errors that name the batch.

    Raises:
        UsageError: ``batches`` is not an iterable of batches.
        InputError: the iterable raises an error.
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
            error_text = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"calibration= fails at batch {index}: {error_text}; repair the loader") from error
        yield item
        index += 1


def _keywords(model: nn.Module | None) -> set[str] | None:
    """Return the keywords that a network's forward accepts; None if it accepts all or its signature is not known."""
    if model is None:
        return None
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _with_tensors(item: Any) -> Any:
    """Return nested values with NumPy arrays of numbers converted to tensors, and mappings to dicts."""
    if isinstance(item, np.ndarray) and item.dtype.kind in "biufc":
        return torch.tensor(item)
    if isinstance(item, Mapping):
        return {key: _with_tensors(value) for key, value in item.items()}
    return rebuild_sequence(item, map(_with_tensors, item)) if isinstance(item, list | tuple) else item
