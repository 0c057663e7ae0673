"""evaluate(): how right a network is on labelled images, or how good by a metric of the caller's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.datasets import DataRequest
from ..data.loading import NO_LABEL, Batch, BatchLoader
from ..data.variety import Variety
from ..errors import Argument, Message, UsageError
from ..network.distributed import joined
from ..sources.opening import open_for_comparison
from ..sources.request import SourceRequest
from ..storage.checkpoint import Network
from ..training import evaluation
from ..training.evaluation import Evaluation, measure
from ..training.trainer import autocast
from .calibrating import warn_of
from .devices import machine_for, ready
from .listener import SILENT, Listener
from .networks import Openable, opened
from .testing import evaluation_loading, note_unread


@dataclass(frozen=True)
class Evaluated(Evaluation):
    """An `Evaluation` with the network that it is of, what was done to each image, and the mean of the caller's metric
    (None without one)."""

    source: str = ""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    metric: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict, the interval included."""
        found = super().to_json()
        metric = found.pop("metric")
        first = {"source": found.pop("source"), "preprocessing": dict(found.pop("preprocessing"))}
        return {**first, **found, **({} if metric is None else {"metric": metric})}


def evaluate(
    model: Openable,
    data: str | Path | DataRequest | Iterable[Any],
    *,
    metric: Callable[[Any, Any], Any] | None = None,
    compare: Openable | None = None,
    compare_weights: str | Path | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    amp: str = "float32",
    preprocessing: Mapping[str, Any] | None = None,
    device: str | None = None,
    listener: Listener = SILENT,
) -> Evaluated:
    """Top-1 with its 95 % interval, top-5, loss and speed of a classifier; or the mean of a metric of any network.

    >>> found = evaluate("sample:resnet_mnist5k", "sample:mnist5k")
    >>> found.images, found.top1
    (1000, 0.994)
    >>> squares = lambda outputs, targets: (outputs - targets).square().flatten(1).mean(1)
    >>> evaluate(nn.Identity(), [(torch.ones(4, 3), torch.zeros(4, 3))], metric=squares).metric
    1.0

    Args:
        model: a source string, a request or a network; a given network is not changed.
        data: a folder with a folder for each class, ``sample:NAME``, a timm data set, or batches of your own: (images,
            labels) pairs, or images alone.
        metric: of the outputs and the targets of a batch: a number for each example, or their mean. The network may
            then be anything, and the inputs of a batch of your own whatever it takes.
        compare: a second network to agree with, such as the uncut one. compare_weights: weights for it.
        batch_size: images at once. workers: processes that load images; default: one for each core.
        amp: precision of the forward: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        preprocessing: of images, in timm's words, where it is not the network's own (`harmconvert.data.preprocessing`).
        device: ``"cpu"`` or ``"cuda"``; default: where a given network is, else a GPU where there is one.
        listener: is told what happens.

    Raises:
        UsageError: no such data, or the network does not run on images of this size.
        InputError: no images, labels beyond the network's classes, a network that is no classifier.
        OutsideError: something has to be downloaded and cannot be.
    """
    with joined():
        machine = machine_for(model, device)
        network = opened(model, listener, form="dense")
        other = None
        if compare is not None:
            other = ready(_rival(compare, compare_weights, network, listener).model, compare, machine.device)
        loading, config = None, dict(preprocessing or {})
        if isinstance(data, str | Path | DataRequest):
            request = DataRequest.parse(data, holdout=0.0)
            many: dict[str, Any] = {
                "batch_size": batch_size,
                "workers": workers,
                "preprocessing": config,
                "listener": listener,
            }
            loading, config = evaluation_loading(request, network.model, machine, **many)
            data = loading.epoch(0)
        tested, variety = ready(network.model, model, machine.device), Variety()
        with listener.progress() as progress, autocast(amp, machine.device):
            seen = _counter(progress, loading)
            if metric is not None:
                found = _measured(tested, data, metric, seen)
            else:
                found = Evaluated(
                    **asdict(evaluation.evaluate(tested, _labelled(data), other, variety=variety, progress=seen))
                )
        warn_of(variety.warning(), listener)
        if loading:
            note_unread(loading, found, listener)
    return replace(found, source=str(network.source), preprocessing=config)


def _rival(compare: Openable, weights: str | Path | None, network: Network, listener: Listener) -> Network:
    """The second network; of the network that it is compared with it may be the uncut form."""
    if not isinstance(compare, str | Path | SourceRequest):
        if weights is not None:
            raise UsageError(Argument("compare_weights"), " are for a network that is named, not for one that is given")
        return opened(compare, listener)
    request = compare if isinstance(compare, SourceRequest) else SourceRequest(compare)
    known = network.source
    if network.header is None and known.scheme != "code":  # other weights of one architecture may be compared
        known = replace(known, sha256=None)
    with listener.busy(f"loading {request.text}"):
        return open_for_comparison(
            str(request.text),
            known,
            Message("give them with ", Argument("compare_weights", "FILE")),
            weights=weights or request.weights,
            trust_code=request.trust_code,
            code=request.code,
        )


def _counter(progress: Callable[[int, int, str], None], loading: BatchLoader | None) -> Callable[[int], None]:
    """What counts batches; in all, where that is known."""
    done, steps = itertools.count(1), (loading.steps if loading else None) or 0
    return lambda images: progress(next(done), steps, "batches")


def _labelled(batches: Iterable[Any]) -> Iterator[Batch]:
    """Batches of the caller's as `Batch`: (images, labels) pairs, or images alone."""
    for batch in batches:
        if isinstance(batch, Batch):
            yield batch
        elif isinstance(batch, Tensor):
            yield Batch(batch, torch.full((len(batch),), NO_LABEL), [])
        else:
            images, labels = batch
            yield Batch(torch.as_tensor(images), torch.as_tensor(labels).long(), [])


def _measured(
    model: nn.Module, batches: Iterable[Any], metric: Callable[[Any, Any], Any], progress: Callable[[int], None]
) -> Evaluated:
    """The mean of a metric over batches of inputs and targets."""
    pairs = ((batch[0], batch[1]) for batch in batches)
    count, value, seconds = measure(model, pairs, metric, progress)
    return Evaluated(count, 0, None, None, None, None, None, count / max(seconds, 1e-9), metric=value)
