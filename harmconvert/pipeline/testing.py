"""Load the images on which a flow tests a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..data.datasets import Data, DataRequest, open_data, split_folder, user_loader
from ..data.folders import Files
from ..data.loading import BatchLoader, evaluation_batches
from ..data.pictures import BOXES, IMAGES, MASKS
from ..data.preprocessing import color_mode, sample_transform
from ..errors import counted
from ..metrics import Metric, metric_of
from ..storage.checkpoint import Header
from ..training.evaluation import Evaluation
from ..training.trainer import MachineSettings
from .devices import workers_for
from .finetuning import check_classes
from .inputs import image_config
from .listener import Listener

# The data of a flow: its name, or batches of the caller.
TaskData = str | Path | DataRequest | Iterable[Any]


def opened_data(request: DataRequest, parts: Sequence[str], listener: Listener) -> Data:
    """Return the data of a request; send its notes, and which folder is used for what, to the listener."""
    data = open_data(request, parts)
    for note in data.notes:
        listener.say(f"note: {note}")
    for samples, use in ((data.train, "training"), (data.test, "testing")):
        if isinstance(samples, Files):
            listener.say(f"{use} on {counted(len(samples), 'image')} of {samples.root}")
    return data


def note_known_images(header: Header | None, request: DataRequest, listener: Listener) -> None:
    """Send a note to the listener if a command that made a checkpoint read the folder on which it is tested."""
    if header is None or not request.data_dir or not Path(request.data_dir).is_dir():
        return
    root = Path(request.data_dir)
    tested = (split_folder(root, request.val_split, "validation") or root).absolute()
    for step in (header.history, *header.history.get("training", [])):
        command = step.get("command") or {"name": "", "words": []}
        if any(Path(word).absolute() == tested for word in command["words"]):
            listener.say(
                f"note: {command['name']} read images of {tested.name} when it made this network, so the figures can "
                "be too good: test it on other images"
            )
            return


def own_loader(data: TaskData) -> tuple[TaskData, str]:
    """Return the loader of the user's function if the data names one, else the data; and the name of the data."""
    if not isinstance(data, str | Path | DataRequest):
        return data, ""
    request = DataRequest.parse(data)
    loader = user_loader(request)
    return (data if loader is None else loader), request.name


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
    config = image_config(model, preprocessing, listener, task=data.task)
    loading = evaluation_batches(
        data.test,
        sample_transform(config),
        color_mode(config),
        batch_size,
        workers=workers_for(workers, request.dataset),
        pin_memory=machine.device.type == "cuda",
    )
    return loading, config


def metric_for(metric: Metric | None, task: str) -> Metric | None:
    """Return the metric that is asked for, else that of the kind of data; None: the accuracy of a classifier."""
    name = {MASKS: "miou", BOXES: "map", IMAGES: "psnr"}.get(task)
    return metric if metric is not None or name is None else metric_of(name)


def note_unread(loading: BatchLoader, evaluation: Evaluation, listener: Listener) -> None:
    """Send a note to the listener if the evaluation saw fewer images than there are."""
    if note := loading.unread_note(evaluation.images + len(evaluation.unreadable)):
        listener.say(note)
