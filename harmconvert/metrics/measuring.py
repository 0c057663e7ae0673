"""Run a network once over batches of data, and measure it with any number of metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.loading import NO_LABEL, Batch
from ..data.variety import Variety
from ..errors import Argument, HarmconvertError, InputError, UsageError, counted, first_line, shortened
from ..network.distributed import gathered, sum_over_ranks
from ..network.faults import user_code_error
from ..network.running import call, evaluating
from ..network.values import batch_size, describe_input, first_tensor, match_dtype
from .intervals import bootstrap_interval, paired_interval, wilson_interval
from .metric import TARGETS, UNCUT, Measurement, Metric, Outcome

# The uncut network compared with itself has no value of such a metric, so there is no drop from it.
_WITHOUT_TARGETS = "to measure a drop without targets, use ssim, agreement or kl"
_NEEDS = {TARGETS: "the targets of the data", UNCUT: "the outputs of the uncut network"}


@dataclass(frozen=True)
class Collected:
    """The states of all samples for one metric, over all processes."""

    metric: Metric
    states: Sequence[Any] | np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    @property
    def value(self) -> float | None:
        """Return the value of the metric, as it is (a share from 0 to 1); None without a sample that has a target."""
        return self.metric.summary(self.states)(np.ones(len(self))) if len(self) else None

    def measurement(self, samples: int, data: str = "") -> Measurement:
        """Return the value in points, with its 95 % interval.

        Raises:
            InputError: there is no value, or it is not finite.
        """
        metric, value = self.metric, self.value
        if value is None:
            needs = " or ".join(_NEEDS[one] for one in metric.compares_with)
            remedy = "" if metric.finite else f"; {_WITHOUT_TARGETS}"
            raise InputError(f"{metric.name} compares with {needs}, and {data or 'the data'} has no targets{remedy}")
        where = f"on {counted(samples, 'sample')}" + (f" of {data}" if data else "")
        if not math.isfinite(value):
            raise InputError(
                f"{metric.name} is {value} {where}: the outputs of the network are not finite, or the "
                "metric has no value there"
            )
        return Measurement(
            metric.name, metric.title, metric.points(value), self._interval(value), metric.unit,
            metric.higher_is_better, samples, data,
        )  # fmt: skip

    def _interval(self, value: float) -> tuple[float, float] | None:
        states: Any = self.states
        interval: tuple[float, float] | None
        if self.metric.unit == "%" and np.ndim(states) == 1 and all(one in (0.0, 1.0) for one in states):
            interval = wilson_interval(value, len(self))
        elif self.metric.unit == "%" and self.metric.paired and set(np.ravel(states)) <= {0.0, 1.0}:
            own, other = np.transpose(states)
            interval = paired_interval(int((own > other).sum()), int((own < other).sum()), len(self))
        else:
            interval = bootstrap_interval(self.metric.summary(states), len(self))
        return None if interval is None else (self.metric.points(interval[0]), self.metric.points(interval[1]))


@dataclass(frozen=True)
class Measured:
    """What one pass over the data gave, over all processes.

    ``samples``: number of samples. ``seconds``: of the forward passes, in the slowest process. ``unreadable``: names of
    samples that could not be read.
    """

    samples: int
    seconds: float
    collected: dict[str, Collected] = field(repr=False)
    unreadable: tuple[str, ...] = ()

    def __getitem__(self, metric: Metric) -> Collected:
        return self.collected[metric.name]

    def measurement(self, metric: Metric, data: str = "") -> Measurement:
        """Return the value of a metric with its interval; see `Collected.measurement`."""
        return self[metric].measurement(self.samples, data)


@dataclass
class _Pass:
    """Sums and states of one process."""

    samples: int = 0
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)
    states: dict[str, list[Any]] = field(default_factory=dict)

    def measured(self, metrics: Sequence[Metric]) -> Measured:
        """Return the pass of all processes together.

        Raises:
            InputError: there is no sample.
        """
        unreadable = tuple(name for names in gathered(self.unreadable) for name in names)
        slowest = max(gathered(self.seconds))
        total = torch.tensor([self.samples], dtype=torch.float64)
        sum_over_ranks([total])
        if not total.item():
            if unreadable:
                names = shortened([*unreadable], 2)
                raise InputError(f"there are no images to evaluate on: none could be read ({names})")
            raise InputError(
                "there is no batch to evaluate on: the data is empty, or it is an iterator that was read before"
            )
        states = {metric.name: gathered(self.states.get(metric.name, [])) for metric in metrics}
        collected = {metric.name: Collected(metric, _joined(states[metric.name])) for metric in metrics}
        return Measured(int(total.item()), slowest, collected, unreadable)


def _joined(parts: Sequence[Sequence[Any]]) -> Any:
    """Return the states of all batches of all processes in one array or list."""
    batches = [batch for part in parts for batch in part if len(batch)]
    if all(isinstance(batch, np.ndarray) for batch in batches):
        return np.concatenate(batches) if batches else np.zeros(0)
    return [state for batch in batches for state in batch]


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    metrics: Sequence[Metric],
    uncut: nn.Module | None = None,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    variety: Variety | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Run a network once over the batches of all processes, and collect the states of metrics.

    The network runs in eval mode on its own device; its state is restored afterwards.

    >>> from harmconvert.metrics import metric_of
    >>> batches = [Batch(torch.eye(3), torch.tensor([0, 1, 1]), [])]
    >>> measure(nn.Identity(), batches, [metric_of("top1")]).measurement(metric_of("top1")).value
    66.66666666666666

    Args:
        uncut: the network to compare with.
        variety: collects the outputs of this process, to check whether they vary.
        progress: called with the number of samples of each batch.

    Raises:
        UsageError: the network does not run on the inputs, or a metric needs the uncut network and there is none.
        InputError: there are no samples, or a metric does not fit the outputs or the targets.
    """
    if (needy := [metric.name for metric in metrics if metric.needs_uncut]) and uncut is None:
        raise UsageError(f"{needy[0]} compares with the uncut network: name it with ", Argument("compare", "SOURCE"))
    networks = [network for network in (model, uncut) if network is not None]
    done = _Pass()
    with evaluating(*networks), autocast():
        for outcome in _outcomes(model, batches, uncut, done, variety):
            for metric in metrics:
                if metric.whole is None and _can_measure(metric, outcome):
                    done.states.setdefault(metric.name, []).append(metric.states(outcome))
            progress(outcome.count)
    return done.measured(metrics)


def measure_whole(model: nn.Module, batches: Iterable[Batch], metric: Metric) -> Measured:
    """Measure a network with a metric that is a function of the network and a loader of (inputs, targets) pairs.

    Raises:
        InputError: there are no samples, or the function does not return one finite number.
    """
    assert metric.whole is not None
    done = _Pass()
    with evaluating(model):
        start = time.perf_counter()
        value = metric.whole(model, _Pairs(model, batches, done))
        done.seconds = time.perf_counter() - start
    if not done.samples and not done.unreadable:
        raise InputError(
            f"the metric {metric.name} read no sample: the data is empty, it is an iterator that was read before, or "
            "the function does not use its loader"
        )
    done.states[metric.name] = [np.array([[value * done.samples, done.samples]])] if done.samples else []
    return done.measured([metric])


class _Pairs:
    """The loader for a user's function: (inputs, targets) of each batch, on the device of the network."""

    def __init__(self, model: nn.Module, batches: Iterable[Batch], done: _Pass) -> None:
        self.model, self.batches, self.done = model, batches, done

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        self.done.samples, self.done.unreadable = 0, []
        for inputs, targets, names, _ in self.batches:
            self.done.unreadable += names
            if count := samples_in(inputs):
                self.done.samples += count
                yield match_dtype(inputs, self.model), targets


def _outcomes(
    model: nn.Module, batches: Iterable[Batch], uncut: nn.Module | None, done: _Pass, variety: Variety | None
) -> Iterator[Outcome]:
    """Yield the outcome of each batch; add its samples, its seconds and the names of unreadable ones to ``done``."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for inputs, targets, names, _ in batches:
        done.unreadable += names
        if not (count := samples_in(inputs)):
            continue
        inputs = match_dtype(inputs, model)
        start = time.perf_counter()
        outputs = run_on(model, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.seconds += time.perf_counter() - start
        done.samples += count
        if variety is not None:
            _add_to_variety(variety, outputs, targets, count)
        expected = None if uncut is None else run_on(uncut, match_dtype(inputs, uncut))
        yield Outcome(outputs, None if _all_unlabelled(targets) else targets, expected, count)


def _all_unlabelled(targets: Any) -> bool:
    return isinstance(targets, Tensor) and targets.dim() == 1 and bool((targets == NO_LABEL).all())


def _can_measure(metric: Metric, outcome: Outcome) -> bool:
    """Return whether the outcome has what the metric compares with, or may have it."""
    return outcome.targets is not None or UNCUT not in metric.compares_with or outcome.uncut is not None


def _add_to_variety(variety: Variety, outputs: Any, targets: Any, count: int) -> None:
    output = first_tensor(outputs)
    if output is not None and output.is_floating_point() and output.dim() > 1 and len(output) == count:
        labels = targets if isinstance(targets, Tensor) and targets.dim() == 1 and targets.dtype == torch.long else None
        variety.add(output, labels)


def samples_in(inputs: Any) -> int:
    """Return the number of samples in the inputs of a batch."""
    return len(inputs) if isinstance(inputs, Tensor) and inputs.dim() else batch_size(inputs)


def run_on(model: nn.Module, inputs: Any) -> Any:
    """Return the outputs of a network on the inputs of a batch, in the form that `harmconvert.network.call` takes.

    If the memory is full, the function raises torch's own exception.

    Raises:
        UsageError: the network does not run on inputs of this size.
    """
    try:
        return call(model, inputs)
    except (HarmconvertError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error):
            raise
        if (bug := user_code_error(error)) is not None:
            raise bug from error
        images = isinstance(inputs, Tensor) and inputs.dim() == 4
        what = f"images of {'x'.join(map(str, inputs.shape[1:]))}" if images else f"inputs of {describe_input(inputs)}"
        problem = f"the network does not run on {what}: {type(error).__name__}: {first_line(error)}"
        raise UsageError(problem, "; give its own input size (", Argument("input_size", "C,H,W"), ")") from error


class TaskBatches:
    """The batches of a caller's loader as `Batch`; they can be read as often as the loader can.

    They may be (inputs, targets) pairs, tensors of inputs alone, or dicts of keywords, whose entry ``labels`` or
    ``targets`` has the targets.

    >>> [batch.targets for batch in TaskBatches([torch.zeros(2, 3), (torch.zeros(1, 3), [4])])]
    [tensor([-1, -1]), tensor([4])]

    When they are read, InputError is raised if a batch is none of these, or if the loader fails.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Tensor | np.ndarray | str | bytes | Mapping) or not isinstance(loader, Iterable):
            raise UsageError(
                f"the data is a {type(loader).__name__}: give a list or a loader of (inputs, targets) pairs"
            )
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        number, batches = 0, None
        while True:
            try:
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches)
            except StopIteration:
                return
            except HarmconvertError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise InputError(f"the data fails at batch {number}: {reason}; repair the loader") from error
            yield batch if isinstance(batch, Batch) else _as_batch(batch, number)
            number += 1


def _as_batch(batch: Any, number: int) -> Batch:
    if isinstance(batch, Tensor | np.ndarray):
        inputs = torch.as_tensor(batch)
        return Batch(inputs, torch.full((len(inputs),), NO_LABEL), [])
    if isinstance(batch, Mapping):
        rest = dict(batch)
        named = [rest.pop(name) for name in ("labels", "targets") if name in rest]
        return Batch(rest, _as_tensor(named[0]) if named else None, [])
    if isinstance(batch, list | tuple) and len(batch) in (1, 2):
        inputs = torch.as_tensor(batch[0]) if isinstance(batch[0], np.ndarray) else batch[0]
        return Batch(inputs, _as_tensor(batch[1]) if len(batch) == 2 else None, [])
    kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    raise InputError(f"batch {number} is a {kind}: give (inputs, targets) pairs, tensors, or dicts of keywords")


def _as_tensor(targets: Any) -> Any:
    """Return arrays and lists of numbers as tensors; other targets unchanged."""
    if isinstance(targets, np.ndarray) or (isinstance(targets, list | tuple) and all(map(_is_number, targets))):
        return torch.as_tensor(targets)
    return targets


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)
