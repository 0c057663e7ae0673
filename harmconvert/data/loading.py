"""Batches of pre-processed pictures; they are the same for any number of processes, workers and interruptions.

The augmentation of a picture (crop, flip) depends only on the seed, the epoch and the picture. The pictures of a batch
depend only on the seed, the epoch and the batch. So two processes together read the same pictures as one process, and a
run that was interrupted after batch 17 continues with batch 18.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..errors import Argument, HarmconvertError, InputError, Message, OutsideError, counted, first_line, shortened
from ..network.distributed import gathered, rank, world_size
from ..network.side_effects import preserve_random_states
from .datasets import Stream
from .joint import JointTransform
from .pictures import UNREADABLE, Pictures, convert_mode
from .preprocessing import Transform

# What is applied to the input of a sample alone, or to the input together with its target.
AnyTransform = Transform | JointTransform

# A broken picture is replaced by the next readable one; this many broken pictures in a row are an error.
REPLACEMENTS = 10
NO_LABEL = -1


class Batch(NamedTuple):
    """Inputs, targets, and the names of samples that could not be read.

    ``inputs``: images (N, C, H, W), or any other input that `harmconvert.network.call` takes. ``targets``: labels (N,;
    -1: no label), or targets of another task (None: there are none). ``too_many_unreadable``: `REPLACEMENTS` samples in
    a row could not be read.
    """

    inputs: Any
    targets: Any
    unreadable: list[str]
    too_many_unreadable: bool = False


class Batches(Protocol):
    """The interface that training needs: the batches of an epoch, from any step on.

    ``steps`` is the number of batches in an epoch (None: unknown). ``sampler`` is None for a stream, which may end
    earlier in one process than in another.
    """

    @property
    def steps(self) -> int | None: ...

    @property
    def sampler(self) -> object: ...

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]: ...


@dataclass
class BatchLoader:
    """Loads the batches of one process, for one part of a data set.

    ``steps`` is the number of batches in an epoch; ``images`` is the number of images over all processes. Both are None
    for a stream of unknown length. Training leaves out the last, incomplete batch.
    """

    loader: DataLoader[Any]
    sampler: _BatchSampler | None
    steps: int | None
    images: int | None
    set_epoch: Callable[[int], None]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the first epoch."""
        return self.epoch(0)

    def unread_note(self, read: int) -> Message | None:
        """Return a note if fewer images were read than the set has: each worker reads whole shards of a stream."""
        if self.images is None or read >= self.images:
            return None
        return Message(
            f"note: only {read} of {counted(self.images, 'image')} were read: a stream needs at least as many shards "
            "as processes times ",
            Argument("workers"),
        )

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from a step on.

        Raises:
            InputError: too many images in a row cannot be read.
            OutsideError: a worker process died.
        """
        self.set_epoch(number)
        if self.sampler is not None:
            self.sampler.epoch, self.sampler.first_step = number, first_step
        skipped = 0 if self.sampler is not None else first_step  # a stream cannot start later: read and skip
        try:
            for batch in islice(self.loader, skipped, None):
                # Raised here, because the message of an exception from a worker contains its whole traceback.
                if batch.too_many_unreadable:
                    names = shortened(batch.unreadable[-REPLACEMENTS:], 2)
                    raise InputError(f"{REPLACEMENTS} images in a row cannot be read: {names}: repair the data")
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            workers = Argument("workers")
            raise OutsideError(f"{first_line(error)}: give fewer ", workers, ", or more shared memory") from error
        except HarmconvertError as error:
            text = str(error.args[0])
            if not text.startswith("Caught "):
                raise
            # The message of an exception from a worker is its traceback; the last line is the original message.
            raise type(error)(text.strip().splitlines()[-1].partition(": ")[2]) from error


def training_batches(
    pictures: Pictures | Stream,
    transform: AnyTransform,
    mode: str | None,
    batch_size: int,
    *,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Return shuffled batches for training, without the incomplete last one; a set smaller than a batch is one batch.

    Raises:
        InputError: there are fewer images than processes.
    """
    if isinstance(pictures, Stream):
        stream = _TransformedStream(pictures.dataset, cast(Transform, transform), mode, seed)
        return _load_stream(stream, batch_size, workers, pin_memory, drop_last=True)
    batch_size = min(batch_size, len(pictures) // world_size() * world_size())
    if batch_size == 0:
        raise InputError(
            f"{counted(len(pictures), 'image')} for {counted(world_size(), 'process')}: use fewer processes"
        )
    items = _TransformedPictures(pictures, transform, mode, seed, replace=True)
    return _load_by_index(items, _BatchSampler(len(pictures), batch_size, seed, shuffle=True), workers, pin_memory)


def evaluation_batches(
    pictures: Pictures | Stream,
    transform: AnyTransform,
    mode: str | None,
    batch_size: int,
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Return batches with every picture once, in order; leave out broken pictures, which `Batch.unreadable` names."""
    if isinstance(pictures, Stream):
        stream = _TransformedStream(pictures.dataset, cast(Transform, transform), mode, 0)
        return _load_stream(stream, batch_size, workers, pin_memory, drop_last=False)
    items = _TransformedPictures(pictures, transform, mode, 0, replace=False)
    return _load_by_index(items, _BatchSampler(len(pictures), batch_size, 0, shuffle=False), workers, pin_memory)


def choose_inputs(
    pictures: Pictures | Stream, transform: AnyTransform, mode: str | None, count: int, seed: int
) -> list[Tensor]:
    """Return up to ``count`` pre-processed inputs, the same ones in every process; skip broken pictures.

    ``seed`` chooses the images. From a stream, each process takes the first images of its part.

    Raises:
        InputError: no image can be read.
    """
    if isinstance(pictures, Stream):
        share = islice(pictures.dataset, -(-count // world_size()))
        own = [cast(Transform, transform)(convert_mode(item[0], mode)) for item in share]
        images = list(chain.from_iterable(gathered(own)))[:count]
    else:
        items = _TransformedPictures(pictures, transform, mode, seed, replace=False)
        order = np.random.default_rng(seed).permutation(len(pictures))
        read = (items[0, int(index)][0] for index in order)
        images = list(islice((image for image in read if image is not None), count))
    if not images:
        raise InputError("no training image can be read: repair the data")
    return images


def input_batches(samples: Sequence[Tensor], size: int, as_lists: bool = False) -> tuple[Any, ...]:
    """Return batches of up to ``size`` samples in their order: lists, or tensors of samples of one shape."""
    if as_lists:
        return tuple([*samples[start : start + size]] for start in range(0, len(samples), size))
    runs = (list(run) for _, run in groupby(samples, key=lambda sample: sample.shape))
    return tuple(batch for run in runs for batch in torch.stack(run).split(size))


class _BatchSampler:
    """Yields the pictures of each batch that this process reads, as (epoch, index)."""

    def __init__(self, length: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.length // self.batch_size if self.shuffle else -(-self.length // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        for step in range(self.first_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in np.array_split(batch, world_size())[rank()]]


class _TransformedPictures(Dataset[Any]):
    """Pre-processed pictures by (epoch, index)."""

    def __init__(self, pictures: Pictures, transform: AnyTransform, mode: str | None, seed: int, replace: bool) -> None:
        self.pictures, self.transform, self.mode, self.seed, self.replace = pictures, transform, mode, seed, replace

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, list[str]]:
        epoch, index = key
        unreadable: list[str] = []
        for attempt in range(REPLACEMENTS if self.replace else 1):
            replacement = (index + attempt) % len(self.pictures)
            try:
                image, target = self.pictures.read(replacement)
                if isinstance(image, Image.Image):
                    image = convert_mode(image, self.mode)
            except HarmconvertError:
                raise
            except UNREADABLE as error:
                unreadable.append(f"{self.pictures.name(replacement)} ({first_line(error) or type(error).__name__})")
                continue
            with _fixed_seed(self.seed, epoch, index):
                if isinstance(self.transform, JointTransform):
                    return *self.transform(image, target), unreadable
                return self.transform(image), NO_LABEL if target is None else target, unreadable
        return None, NO_LABEL, unreadable


class _TransformedStream(IterableDataset[Any]):
    def __init__(self, dataset: Any, transform: Transform, mode: str | None, seed: int) -> None:
        self.dataset, self.transform, self.mode, self.seed, self.epoch = dataset, transform, mode, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int, list[str]]]:
        worker = get_worker_info()
        reader = rank() * 1000 + (worker.id if worker else 0)
        for number, (image, label, *_) in enumerate(self.dataset):
            with _fixed_seed(self.seed, self.epoch, reader, number):
                yield self.transform(convert_mode(image, self.mode)), int(label), []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _load_by_index(items: _TransformedPictures, sampler: _BatchSampler, workers: int, pin_memory: bool) -> BatchLoader:
    loader = _data_loader(items, workers, pin_memory, batch_sampler=sampler, persistent_workers=workers > 0)
    return BatchLoader(loader, sampler, len(sampler), sampler.length, lambda epoch: None)


def _load_stream(
    stream: _TransformedStream, batch_size: int, workers: int, pin_memory: bool, drop_last: bool
) -> BatchLoader:
    own_batch_size = max(1, batch_size // world_size())
    loader = _data_loader(stream, workers, pin_memory, batch_size=own_batch_size, drop_last=drop_last)
    try:
        images: int | None = len(stream.dataset)
    except TypeError:
        images = None
    steps = None if images is None else images // batch_size
    return BatchLoader(loader, None, steps, images, stream.set_epoch)


def _data_loader(items: Dataset[Any], workers: int, pin_memory: bool, **batching: Any) -> DataLoader[Any]:
    return DataLoader(
        items,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_ignore_first_signal,
        pin_memory=pin_memory,
        # The loader draws random numbers. Its own generator keeps those of dropout the same when a run is resumed.
        generator=torch.Generator(),
        **batching,
    )


def _ignore_first_signal(worker: int) -> None:
    """Make a worker process survive Ctrl-C and the first SIGTERM.

    Ctrl-C and schedulers send signals to the whole process group, but the main process needs its workers until it has
    saved its state. A second SIGTERM ends the worker: the main process sends it to a worker that does not stop.
    """

    def end_on_next_signal(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_on_next_signal)


def _collate(items: Sequence[tuple[Any, Any, list[str]]]) -> Batch:
    unreadable = [name for _, _, names in items for name in names]
    readable = [(image, target) for image, target, _ in items if image is not None]
    too_many = any(image is None and len(names) >= REPLACEMENTS for image, _, names in items)
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), unreadable, too_many)
    inputs, targets = [image for image, _ in readable], [target for _, target in readable]
    if isinstance(targets[0], dict):  # detectors take lists of images of any size
        return Batch(inputs, targets, unreadable, too_many)
    stacked = _stacked(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)
    return Batch(_stacked(inputs), stacked, unreadable, too_many)


def _stacked(samples: Sequence[Tensor]) -> Tensor:
    sizes = sorted({"x".join(map(str, sample.shape)) for sample in samples})
    if len(sizes) > 1:
        raise InputError(
            f"the samples of a batch have different sizes ({shortened(sizes, 3)}): give ",
            Argument("batch_size", 1), ", or a size to which they are resized: ", Argument("input_size", "C,H,W"),
        )  # fmt: skip
    return torch.stack([*samples])


@contextmanager
def _fixed_seed(*key: int) -> Iterator[None]:
    """Seed the random numbers of torch, NumPy and Python from a key; restore their states afterwards."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    with preserve_random_states():
        torch.default_generator.manual_seed(seed)  # only the CPU's generator: torch.manual_seed also seeds the GPU's
        np.random.seed(seed)
        random.seed(seed)
        yield
