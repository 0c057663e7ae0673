"""evaluate(): measure a network on data, with the accuracy of a classifier or with any metric."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.datasets import DataRequest
from ..data.loading import BatchLoader
from ..data.variety import Variety
from ..errors import Argument, Message, UsageError
from ..metrics import MetricLike, TaskBatches, metric_of
from ..network.distributed import joined
from ..sources.opening import open_for_comparison
from ..sources.request import SourceRequest
from ..storage.checkpoint import Network
from ..training import evaluation
from ..training.evaluation import Evaluation
from ..training.trainer import autocast
from .calibrating import warn
from .devices import machine_for, ready
from .listener import Listener
from .networks import Openable, opened
from .showing import listener_for
from .testing import evaluation_loading, metric_for, note_known_images, note_unread, own_loader


@dataclass(frozen=True)
class Evaluated(Evaluation):
    """An `Evaluation` with the source of the network and the pre-processing of the images."""

    source: str = ""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> float | None:
        """Return the value of the metric that was asked for, in points; None if none was."""
        return None if self.measurement is None else self.measurement.value

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation and its interval as JSON values."""
        result = super().to_json()
        first = {"source": result.pop("source"), "preprocessing": dict(result.pop("preprocessing"))}
        return {**first, **result, **({} if self.metric is None else {"metric": self.metric})}


def evaluate(
    model: Openable,
    data: str | Path | DataRequest | Iterable[Any],
    *,
    metric: MetricLike | None = None,
    compare: Openable | None = None,
    compare_weights: str | Path | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    amp: str = "float32",
    preprocessing: Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: bool | None = None,
    listener: Listener | None = None,
) -> Evaluated:
    """Measure top-1 with its 95 % interval, top-5, loss and speed of a classifier; or another metric of any network.

    >>> result = evaluate("sample:resnet_mnist5k", "sample:mnist5k")
    >>> result.images, result.top1
    (1000, 0.994)
    >>> import torch
    >>> from torch import nn
    >>> squares = lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1)
    >>> evaluate(nn.Identity(), [(torch.ones(4, 3), torch.zeros(4, 3))], metric=squares).metric
    1.0

    Args:
        model: a source string, a request, or a network object, which is not changed.
        data: a folder with a folder for each class, ``sample:NAME``, a timm data set, a folder or file of another
            kind (see the guide), ``FILE.py:FUNCTION`` that returns a loader, or batches of your own: (inputs,
            targets) pairs, inputs alone, or dicts of keywords with the targets under ``labels`` or ``targets``.
        metric: a name (`harmconvert.metrics.METRICS`), ``FILE.py:FUNCTION``, a `harmconvert.metrics.Metric` or a
            function. A function takes (outputs, targets) of a batch and returns a number for each example, or their
            mean. If its first parameter is named model, network, net or module (or its attribute ``takes`` is
            ``"model"``), it takes (model, loader) and returns one number. With a metric that is not one of classes, the
            network need not be a classifier, and your own batches may hold any inputs.
        compare: a second network, such as the uncut one, to measure the agreement with.
        compare_weights: weights for the second network.
        batch_size: images in one forward pass.
        workers: processes that load images; default: one for each core.
        amp: precision of the forward pass: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        preprocessing: of images, with timm's names, if it is not the network's own (`harmconvert.data.preprocessing`).
        device: ``"cpu"`` or ``"cuda"``; default: the device of a network object, else a GPU if there is one.
        progress: show progress bars; None: in an interactive session (a Python prompt, IPython, a notebook).
        listener: receives messages and progress instead; without it, the logger ``harmconvert`` gets them.

    Raises:
        UsageError: the data does not exist, or the network does not run on images of this size.
        InputError: there are no images, labels are beyond the network's classes, or the metric does not fit the outputs
            or the targets.
        OutsideError: a download fails, or a package is not installed.
    """
    listener = listener_for(listener, progress)
    chosen = None if metric is None else metric_of(metric)
    with joined():
        machine = machine_for(model, device)
        network = opened(model, listener, form="dense")
        other = None
        if compare is not None:
            other = ready(_second_network(compare, compare_weights, network, listener).model, compare, machine.device)
        loading, batches, config = None, None, dict(preprocessing or {})
        data, name = own_loader(data)
        if isinstance(data, str | Path | DataRequest):
            request = DataRequest.parse(data, holdout=0.0)
            note_known_images(network.header, request, listener)
            loading, config = evaluation_loading(
                request, network.model, machine,
                batch_size=batch_size, workers=workers, preprocessing=config, listener=listener,
            )  # fmt: skip
            name, chosen = request.name, metric_for(chosen, config.get("task", ""))
        else:
            batches = TaskBatches(data)
        tested, variety = ready(network.model, model, machine.device), Variety()
        with listener.progress("testing") as report:
            result = evaluation.evaluate(
                tested, loading or batches or (), other, metric=chosen, data=name,
                autocast=partial(autocast, amp, machine.device), variety=variety if loading or chosen is None else None,
                paired=True, progress=_batch_counter(report, loading),
            )  # fmt: skip
        warn(variety.warning(), listener)
        if loading:
            note_unread(loading, result, listener)
    return Evaluated(**vars(result), source=str(network.source), preprocessing=config)


def _second_network(compare: Openable, weights: str | Path | None, network: Network, listener: Listener) -> Network:
    """Open the network to compare with ``network``; it may be the uncut form of ``network``."""
    if not isinstance(compare, str | Path | SourceRequest):
        if weights is not None:
            raise UsageError(
                Argument("compare_weights"), " are for a source string, not for a network object: leave them out"
            )
        return opened(compare, listener)
    request = compare if isinstance(compare, SourceRequest) else SourceRequest(compare)
    source = network.source
    if network.header is None and source.scheme != "code":  # other weights of the same architecture are allowed
        source = replace(source, sha256=None)
    with listener.busy(f"loading {request.text}"):
        return open_for_comparison(
            str(request.text),
            source,
            Message("give them with ", Argument("compare_weights", "FILE")),
            weights=weights or request.weights,
            trust_code=request.trust_code,
            code=request.code,
        )


def _batch_counter(progress: Callable[[int, int, str], None], loading: BatchLoader | None) -> Callable[[int], None]:
    """Return a function that reports one more batch, and the number of all batches if that is known."""
    done, steps = itertools.count(1), (loading.steps if loading else None) or 0
    return lambda images: progress(next(done), steps, "batches")
