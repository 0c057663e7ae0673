"""Run a network on an input without changing the network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import Argument, UsageError, first_line
from .faults import user_code_error
from .side_effects import ParameterBackup, Snapshot
from .values import describe_input


def call(model: nn.Module, example_input: Any) -> Any:
    """Call a network: a tuple gives its arguments, a dict its keyword arguments, anything else is the one argument."""
    if isinstance(example_input, tuple):
        return model(*example_input)
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(example_input)


@contextmanager
def usage_errors(example_input: Any) -> Iterator[None]:
    """Turn any error of a run on an example input into a UsageError that describes the input.

    A bug in a hook or in a forward becomes a UserCodeError instead.
    """
    try:
        yield
    except Exception as error:
        if (bug := user_code_error(error)) is not None:
            raise bug from error
        raise UsageError(
            f"the network does not run on an example input of {describe_input(example_input)}: "
            f"{type(error).__name__}: {first_line(error)}; give an input that it takes (",
            Argument("example_input"),
            ")",
        ) from error


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Switch to eval mode and no gradients inside the context; restore every module's training flag afterwards."""
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
    """Restore, at the end, everything that forwards change in a network besides their outputs; see `Snapshot`.

    Such changes are counters, caches and logs of hooks, and weights that a forward replaces (``weight.data = ...``).

    Args:
        but: modules that are not restored.
        weights: also restore weights that a forward overwrites. This makes each call of a torch function slower.
    """
    before, written = Snapshot(model, but), ParameterBackup(model)
    data_before = [(parameter, parameter.data) for parameter in model.parameters() if not is_lazy(parameter)]
    try:
        with written if weights else nullcontext():
            yield
    finally:
        before.restore()
        for parameter, data in data_before:
            if _memory_of(parameter.data) != _memory_of(data):
                parameter.data = data
        written.restore()


def _memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the memory of a tensor's values, equal for two tensors that share it."""
    try:
        return cast(int, tensor.untyped_storage()._cdata), tensor.storage_offset(), tensor.shape
    except (RuntimeError, NotImplementedError):  # sparse tensors, tensor classes of other packages
        return ()
