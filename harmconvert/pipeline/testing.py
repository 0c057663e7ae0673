"""Load the images on which a flow tests a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.datasets import Data, DataRequest, open_data
from ..data.loading import BatchLoader, evaluation_batches
from ..data.preprocessing import color_mode, evaluation_transform
from ..training.evaluation import Evaluation
from ..training.trainer import MachineSettings
from .devices import workers_for
from .finetuning import check_classes
from .inputs import image_config
from .listener import Listener


def opened_data(request: DataRequest, parts: Sequence[str], listener: Listener) -> Data:
    """Return the data of a request; send its notes to the listener."""
    data = open_data(request, parts)
    for note in data.notes:
        listener.say(f"note: {note}")
    return data


def evaluation_loading(
    request: DataRequest,
    model: nn.Module,
    machine: MachineSettings,
    *,
    batch_size: int,
    workers: int | None,
    preprocessing: Mapping[str, Any],
    listener: Listener,
) -> tuple[BatchLoader, dict[str, Any]]:
    """Return batches of the test images, and the pre-processing of the images.

    Raises:
        UsageError: the images do not exist, or their pre-processing is not known.
        InputError: the images have other classes than the network.
    """
    data = opened_data(request, ("test",), listener)
    assert data.test is not None
    if data.labelled:
        check_classes(data, model, "evaluate a network of these classes")
    config = image_config(model, preprocessing, listener)
    loading = evaluation_batches(
        data.test,
        evaluation_transform(config),
        color_mode(config),
        batch_size,
        workers=workers_for(workers, request.dataset),
        pin_memory=machine.device.type == "cuda",
    )
    return loading, config


def note_unread(loading: BatchLoader, evaluation: Evaluation, listener: Listener) -> None:
    """Send a note to the listener if the evaluation saw fewer images than there are."""
    if note := loading.unread_note(evaluation.images + len(evaluation.unreadable)):
        listener.say(note)
