"""Metrics that are functions of the user."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import HarmconvertError, InputError, UsageError, counted, first_line
from .metric import Metric, Outcome

# Names of a first parameter that is a network.
_NETWORKS = ("model", "network", "net", "module")


def takes_network(function: Callable[..., Any]) -> bool:
    """Return whether a function takes (model, loader); else it takes (outputs, targets).

    Its attribute ``takes`` (``"model"`` or ``"outputs"``) decides; without it, the name of its first parameter: model,
    network, net or module.

    >>> takes_network(lambda model, loader: 1.0), takes_network(lambda outputs, targets: 1.0)
    (True, False)

    Raises:
        UsageError: the attribute has another value.
    """
    declared = getattr(function, "takes", None)
    if declared is not None:
        if declared not in ("model", "outputs"):
            raise UsageError(f"{name_of(function)}.takes is {declared!r}: use 'model' or 'outputs'")
        return bool(declared == "model")
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return bool(parameters) and parameters[0] in _NETWORKS


def needs_data(function: Callable[..., Any]) -> bool:
    """Return whether a function has more than one argument without a default: then it does not take a network alone."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in places and one.default is one.empty for one in parameters) > 1


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function for messages."""
    name = getattr(function, "__name__", type(function).__name__)
    return "metric" if name == "<lambda>" else str(name)


def user_metric(function: Callable[..., Any], name: str | None = None) -> Metric:
    """Return the metric that a function computes.

    >>> error = user_metric(lambda outputs, targets: (outputs - targets).abs().flatten(1).mean(1))
    >>> error.states(Outcome(torch.ones(2, 3), torch.zeros(2, 3), count=2)).tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    Args:
        function: of (outputs, targets) of a batch, which returns a number for each sample or their mean; or of
            (model, loader), which returns one number; see `takes_network`. Higher is better, unless the function has
            the attribute ``higher_is_better = False``. The attribute ``unit`` names the unit of its points.

    Raises:
        UsageError: the attribute ``takes`` is wrong.
    """
    name = name or name_of(function)
    higher, unit = higher_is_better(function), str(getattr(function, "unit", ""))

    def states(outcome: Outcome) -> np.ndarray:
        numbers = _numbers(_called(function, name, outcome.outputs, outcome.targets), outcome.count, name)
        if len(numbers) == outcome.count:
            return np.stack([numbers, np.ones_like(numbers)], axis=1)
        return np.array([[numbers[0] * outcome.count, outcome.count]])

    def whole(model: nn.Module, loader: Iterable[Any]) -> float:
        return number_of(_called(function, name, model, loader), name)

    of_network = takes_network(function)
    title = name.rpartition(":")[2]
    return Metric(name, title, states, _mean_of_sums, unit, 1.0, higher, (), whole=whole if of_network else None)


def higher_is_better(function: Callable[..., Any]) -> bool:
    """Return whether a higher value of a function is better: yes, unless its attribute says False."""
    return getattr(function, "higher_is_better", True) is not False


def number_of(value: Any, name: str) -> float:
    """Return the number that a user's function returned.

    Raises:
        InputError: it returned no number, several, or NaN.
    """
    number = _numbers(value, 1, name)[0]
    if not math.isfinite(number):
        raise InputError(f"the metric {name} returns {number}: it should return a finite number")
    return float(number)


def _called(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except HarmconvertError:
        raise
    except Exception as error:
        raise InputError(f"the metric {name} fails: {type(error).__name__}: {first_line(error)}") from error


def _numbers(value: Any, count: int, name: str) -> np.ndarray:
    """Return one number, or one for each of ``count`` samples, as float64 (1,) or (count,)."""
    wanted = "one number" if count == 1 else f"one number, or one for each of the {counted(count, 'sample')}"
    if value is None:
        raise InputError(f"the metric {name} returns nothing: it should return {wanted}")
    try:
        numbers = torch.as_tensor(value).detach().double().cpu().reshape(-1).numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise InputError(f"the metric {name} returns a {kind}: it should return {wanted}") from error
    if len(numbers) not in (1, count):
        what = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else counted(len(numbers), "number")
        raise InputError(f"the metric {name} returns {what}: it should return {wanted}")
    return numbers


def _mean_of_sums(states: Any) -> Callable[[np.ndarray], float]:
    """Return the mean over samples; a state (sum of values, samples) may stand for one sample or for a batch."""
    sums = np.asarray(states, dtype=np.float64)
    return lambda counts: float(counts @ sums[:, 0] / (counts @ sums[:, 1]))
