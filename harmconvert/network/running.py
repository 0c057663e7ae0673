"""Run a network on an input and leave it as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import UsageError, first_line
from .side_effects import Snapshot, WeightsKept
from .values import describe_input


def call(model: nn.Module, example_input: Any) -> Any:
    """Call a network on an example input: tuple as arguments, dict as keywords, anything else as the one argument."""
    if isinstance(example_input, tuple):
        return model(*example_input)
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(example_input)


@contextmanager
def refusing(example_input: Any) -> Iterator[None]:
    """Whatever goes wrong in a run on an example input becomes a UsageError that names the input."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"the network does not run on an example input of {describe_input(example_input)}: "
            f"{type(error).__name__}: {first_line(error)}; "
            "give an input that it takes (example_input=, --input-size C,H,W)"
        ) from error


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the time being; every module's own training flag is put back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def unchanged(model: nn.Module, but: Collection[nn.Module] = (), weights: bool = True) -> Iterator[None]:
    """Undo afterwards what forwards change in a network beside its outputs (counters, caches, logs of hooks), except in
    the modules ``but``; see `Snapshot`. Weights that a forward exchanges (``weight.data = ...``) are put back, too, and
    with ``weights`` those that it writes to, for which each call of a function of torch takes longer."""
    before, written = Snapshot(model, but), WeightsKept(model)
    exchanged = [(parameter, parameter.data) for parameter in model.parameters() if not is_lazy(parameter)]
    try:
        with written if weights else nullcontext():
            yield
    finally:
        before.restore()
        for parameter, data in exchanged:
            if _storage(parameter.data) != _storage(data):
                parameter.data = data
        written.restore()


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor are: two that have them in the same place are one."""
    try:
        return cast(int, tensor.untyped_storage()._cdata), tensor.storage_offset(), tensor.shape
    except (RuntimeError, NotImplementedError):  # sparse tensors, wrappers of other packages
        return ()
