"""Read inputs without their targets for calibration, from folders, files, timm's data sets or the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..arguments import STREAMS, check_unlabelled
from ..errors import HarmconvertError, InputError, UsageError, counted, first_line, shortened
from ..network.distributed import gathered, world_size
from ..samples import mnist5k
from .datasets import DataRequest, Stream, open_data, open_timm, pictures_from_timm, split_folder
from .folders import Files
from .joint import JointTransform
from .loading import input_batches
from .pictures import BOXES, CLASSES, UNREADABLE, Pictures, convert_mode, photographs, random_crop
from .preprocessing import color_mode, sample_transform, task_preprocessing
from .recognising import recognised

# A data set may have up to three broken files, or up to this share of the requested images.
UNREADABLE_SHARE = 0.1


@dataclass(frozen=True)
class CalibrationImages:
    """Pre-processed ``batches`` (N, C, H, W), their pre-processing config, and the files that could not be read.

    Batches for a detector are lists of images (C, H, W), those from files of tensors (N, ...). ``origin``: the name of
    the data, or the folder with the images.
    """

    batches: tuple[Any, ...]
    preprocessing: Mapping[str, Any]
    unreadable: tuple[str, ...] = ()
    origin: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.batches))


def calibration_images(
    data: str | Path | DataRequest,
    model: nn.Module,
    count: int = 256,
    batch_size: int = 32,
    *,
    overrides: Mapping[str, Any] | None = None,
    channels: int = 3,
    seed: int = 0,
    training_part: bool = False,
) -> CalibrationImages:
    """Return up to ``count`` inputs of a data set, chosen by ``seed``, with the network's own pre-processing.

    Args:
        data: a folder (all images below it are used, labels do not matter; if it has a folder for training and one for
            testing, those for training), ``sample:mnist5k``, ``sample:photographs`` (random crops of two photographs),
            or a timm data set (``torch/cifar10``, ``hfds/USER/NAME``, ``wds/NAME``, ``tfds/NAME``). A request also
            names the folder of a timm data set, and its ``train_split`` is read. Of a folder or file of another kind
            of data, the inputs are used.
        overrides: changes to the pre-processing, see `preprocessing`.
        channels: of the network's input, if its size is not known; see `task_preprocessing`.
        training_part: of a folder or file, use only the part that is not for testing.

    Raises:
        UsageError: the data set does not exist, or the network's input size or pre-processing is unknown.
        InputError: there are no images, or too many cannot be read.
        OutsideError: the download of the data set failed, or a package is missing.
    """
    if count < 1 or batch_size < 1:
        raise UsageError(f"{counted(count, 'calibration image')} in batches of {batch_size}: both must be at least 1")
    request = DataRequest.parse(data)
    samples = _training_samples(request) if training_part else _other_kind(request)
    config = task_preprocessing(model, overrides or {}, CLASSES if samples is None else samples.task, channels)
    transform, mode = sample_transform(config), color_mode(config)
    unreadable: list[str] = []
    is_stream = request.name.startswith(STREAMS)  # a stream gives each process its own part
    own_count = -(-count // world_size()) if is_stream else count
    if samples is not None:
        read = _readable_samples(samples, request.name, count, np.random.default_rng(seed), mode, unreadable)
    else:
        read = ((picture, None) for picture in _pictures(request, count, seed, mode, unreadable))
    images = [
        transform(*sample)[0] if isinstance(transform, JointTransform) else transform(sample[0])
        for sample in islice(read, own_count)
    ]
    if is_stream:
        images = list(chain.from_iterable(gathered(images)))[:count]
    if not images:
        raise InputError(f"{request.name} has no image: give a folder of images, sample:NAME or a timm data set")
    batches = input_batches(images, batch_size, as_lists=config.get("task") == BOXES)
    return CalibrationImages(batches, config, tuple(unreadable), _origin(request, samples))


def _origin(request: DataRequest, samples: Pictures | None) -> str:
    """Return the folder with the images, or the name of the data."""
    if isinstance(samples, Files):
        return str(samples.root)
    return str(_root(request)) if samples is None and Path(request.name).is_dir() else request.name


def _training_samples(request: DataRequest) -> Pictures | None:
    """Return the samples of a folder or file that are not for testing; None for other data, which has splits."""
    if not Path(request.name).exists():
        return None
    samples = open_data(request).train
    return samples if isinstance(samples, Pictures) else None


def _other_kind(request: DataRequest) -> Pictures | None:
    """Return the samples of a folder or file that has another kind of data than pictures with or without labels."""
    root = Path(request.name)
    if not root.exists() or request.name.endswith(".tar"):
        return None
    folder = split_folder(root, request.train_split, "train") if root.is_dir() else None
    return recognised(root, (request.train_split, "train")) or (recognised(folder) if folder else None)


def _pictures(
    request: DataRequest, count: int, seed: int, mode: str | None, unreadable: list[str]
) -> Iterator[Image.Image]:
    data = request.name
    check_unlabelled(data)
    generator = np.random.default_rng(seed)
    if data == "sample:mnist5k":
        images = mnist5k()[0].numpy()
        return (convert_mode(Image.fromarray(images[i]), mode) for i in generator.permutation(len(images)))
    if data == "sample:photographs":
        pictures = photographs()
        return (convert_mode(random_crop(pictures, generator), mode) for _ in count_from(0))
    if Path(data).is_dir():
        return _inputs(_readable_samples(Files(_root(request)), data, count, generator, mode, unreadable))
    name, root = ("", data) if data.endswith(".tar") else (data, request.data_dir)
    opened = pictures_from_timm(open_timm(name, root, split=request.train_split, seed=0))
    if isinstance(opened, Stream):  # a stream has no random access: use its first images
        return (convert_mode(item[0], mode) for item in opened.dataset)
    return _inputs(_readable_samples(opened, data, count, generator, mode, unreadable))


def _root(request: DataRequest) -> Path:
    """Return the folder of training images if a folder has one beside one of test images, else the folder itself."""
    root = Path(request.name)
    train = split_folder(root, request.train_split, "train")
    return train if train is not None and split_folder(root, request.val_split, "validation") else root


def _inputs(samples: Iterator[tuple[Any, Any]]) -> Iterator[Any]:
    return (input for input, _ in samples)


def _readable_samples(
    pictures: Pictures, data: str, count: int, generator: np.random.Generator, mode: str | None, unreadable: list[str]
) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets in random order; skip broken pictures and add their names to ``unreadable``."""
    limit = max(3, int(UNREADABLE_SHARE * count))
    for index in generator.permutation(len(pictures)):
        try:
            input, target = pictures.read(int(index))
            yield (convert_mode(input, mode) if isinstance(input, Image.Image) else input), target
        except HarmconvertError:
            raise
        except UNREADABLE as error:
            unreadable.append(pictures.name(int(index)))
            if len(unreadable) > limit:
                raise InputError(
                    f"{counted(len(unreadable), 'image')} of {data} cannot be read "
                    f"({shortened(unreadable, 3)}; the last error: {first_line(error)}): repair or remove these images"
                ) from error
