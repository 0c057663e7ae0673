"""The quality of a network as one number, and by how much it falls when the network is converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.loading import Batch
from ..errors import Argument, UsageError
from .measuring import TaskBatches, measure, measure_whole
from .metric import UNCUT, Measurement, Metric
from .registry import MetricLike, metric_of
from .user import higher_is_better, name_of, needs_data, number_of


@dataclass(frozen=True)
class NetworkMetric:
    """A metric of a network alone, in points, such as its top-1 in % on some data.

    >>> size = NetworkMetric(lambda network: sum(p.numel() for p in network.parameters()), "size", False)
    >>> size(nn.Linear(2, 1)), size.drop(3.0, nn.Linear(3, 1))
    (3.0, 1.0)
    """

    function: Callable[[nn.Module], Any]
    name: str
    higher_is_better: bool = True

    def __call__(self, network: nn.Module) -> float:
        """Return the value for a network.

        Raises:
            InputError: the function returns no number, several, or NaN.
        """
        return number_of(self.function(network), self.name)

    def drop(self, before: float, network: nn.Module) -> float:
        """Return by how many points a network is worse than the value ``before``; negative if it is better."""
        after = self(network)
        return before - after if self.higher_is_better else after - before


def network_metric(metric: MetricLike | NetworkMetric | None, labelled: Iterable[Any] | None, uncut: nn.Module) -> Any:
    """Return the `NetworkMetric` that a caller means.

    Args:
        metric: a name, a `Metric` or a function of (outputs, targets) or (model, loader), with ``labelled``; a function
            of a network, without. None: top-1.
        labelled: batches, as for `TaskBatches`.
        uncut: the network to compare with.

    Raises:
        UsageError: there is no such metric, it needs data and there is none, or it has no value for the uncut network.
    """
    if isinstance(metric, NetworkMetric):
        return metric
    if labelled is not None:
        batches = tuple(labelled) if isinstance(labelled, Iterator) else labelled
        return metric_on(metric_of("top1" if metric is None else metric), TaskBatches(batches), uncut)
    if isinstance(metric, str | Metric) or not callable(metric) or needs_data(metric):
        name = metric.name if isinstance(metric, Metric) else name_of(metric) if callable(metric) else metric
        raise UsageError(f"the metric {name} is measured on data: give ", Argument("labelled", "DATA"))
    return NetworkMetric(metric, name_of(metric), higher_is_better(metric))


def metric_on(metric: Metric, batches: Iterable[Batch], uncut: nn.Module) -> NetworkMetric:
    """Return a metric of networks on some data, which can be read several times."""

    def value(network: nn.Module) -> float:
        return measured_on(metric, batches, network, uncut).value

    return NetworkMetric(value, metric.name, metric.higher_is_better)


def measured_on(
    metric: Metric, batches: Iterable[Batch], network: nn.Module, uncut: nn.Module, data: str = ""
) -> Measurement:
    """Measure a network on some data; compare it with the uncut network if the metric does.

    Raises:
        UsageError: the metric would compare the uncut network with itself and has no value there. See `measure`.
    """
    if metric.whole is not None:
        return measure_whole(network, batches, metric).measurement(metric, data)
    other = uncut if UNCUT in metric.compares_with and metric.finite else None
    return measure(network, batches, [metric], other).measurement(metric, data)
