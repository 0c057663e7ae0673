"""Batches of pre-processed pictures, the same ones for any number of processes, workers and interruptions.

The augmentation of a picture (crop, flip) depends only on the seed, the epoch and the picture. The pictures of a batch
depend only on the seed, the epoch and the batch. So two processes read the same pictures as one, and a run that was
interrupted after batch 17 continues with batch 18.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..errors import Argument, HarmconvertError, InputError, Message, OutsideError, counted, first_line, shortened
from ..network.distributed import gathered, rank, world_size
from .datasets import Stream
from .pictures import UNREADABLE, Pictures, in_mode
from .preprocessing import Transform

# A broken picture is replaced by the next readable one; this many broken pictures in a row are an error.
REPLACEMENTS = 10
NO_LABEL = -1


class Batch(NamedTuple):
    """Images (N, C, H, W), labels (N,; -1 where there are none), and the names of pictures that could not be read.

    ``broken``: a picture could not be replaced, because all the next ones are broken, too.
    """

    images: Tensor
    labels: Tensor
    problems: list[str]
    broken: bool = False


class Batches(Protocol):
    """The interface that training needs: ``steps`` batches in an epoch (None: unknown), from any step on.

    ``order`` is None for a stream, which may end earlier in one process than in another.
    """

    @property
    def steps(self) -> int | None: ...

    @property
    def order(self) -> object: ...

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]: ...


@dataclass
class Loading:
    """This process's batches of one part of a data set, epoch by epoch.

    ``steps`` is the number of batches in an epoch, ``images`` the number of images over all processes (both None for a
    stream of unknown length). Training leaves out the last, incomplete batch.
    """

    loader: DataLoader[Any]
    order: _Order | None
    steps: int | None
    images: int | None
    set_epoch: Callable[[int], None]

    def unread(self, read: int) -> Message | None:
        """Return a note if fewer images were read than the set has: a stream is divided by whole shards."""
        if self.images is None or read >= self.images:
            return None
        what = f"{read} of {counted(self.images, 'image')}"
        return Message(
            f"note: {what} were read: a stream wants as many shards as there are processes times ", Argument("workers")
        )

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from a step on.

        Raises:
            InputError: too many images in a row cannot be read.
            OutsideError: a worker process died.
        """
        self.set_epoch(number)
        if self.order is not None:
            self.order.epoch, self.order.first_step = number, first_step
        skipped = 0 if self.order is not None else first_step  # a stream cannot start later: read and skip
        try:
            for batch in islice(self.loader, skipped, None):
                # Raised here, because the message of an exception from a worker contains its whole traceback.
                if batch.broken:
                    what = shortened(batch.problems[-REPLACEMENTS:], 2)
                    raise InputError(f"{REPLACEMENTS} images in a row cannot be read: {what}: repair the data")
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            fewer = Argument("workers")
            raise OutsideError(f"{first_line(error)}: give fewer ", fewer, ", or more shared memory") from error
        except HarmconvertError as error:
            text = str(error.args[0])
            if not text.startswith("Caught "):
                raise
            # The message of an exception from a worker is its traceback; the last line is the original message.
            raise type(error)(text.strip().splitlines()[-1].partition(": ")[2]) from error


def training_batches(
    pictures: Pictures | Stream,
    transform: Transform,
    mode: str | None,
    batch_size: int,
    *,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Loading:
    """Return shuffled batches for training, without the incomplete last one; a set smaller than a batch is one batch.

    Raises:
        InputError: there are fewer images than processes.
    """
    if isinstance(pictures, Stream):
        return _load_stream(pictures, transform, mode, batch_size, seed, workers, pin_memory, drop_last=True)
    batch_size = min(batch_size, len(pictures) // world_size() * world_size())
    if batch_size == 0:
        raise InputError(
            f"{counted(len(pictures), 'image')} for {counted(world_size(), 'process')}: use fewer processes"
        )
    order = _Order(len(pictures), batch_size, seed, shuffle=True)
    return _load_by_index(_Items(pictures, transform, mode, seed, replace=True), order, workers, pin_memory)


def evaluation_batches(
    pictures: Pictures | Stream,
    transform: Transform,
    mode: str | None,
    batch_size: int,
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Loading:
    """Return batches with every picture once, in order; `Batch.problems` names broken pictures, which are left out."""
    if isinstance(pictures, Stream):
        return _load_stream(pictures, transform, mode, batch_size, 0, workers, pin_memory, drop_last=False)
    order = _Order(len(pictures), batch_size, 0, shuffle=False)
    return _load_by_index(_Items(pictures, transform, mode, 0, replace=False), order, workers, pin_memory)


def some_images(pictures: Pictures | Stream, transform: Transform, mode: str | None, count: int, seed: int) -> Tensor:
    """Return up to ``count`` pre-processed images (N, C, H, W), the same ones in every process; skip broken ones.

    The images are chosen by ``seed``; of a stream they are the first ones of each process's part.

    Raises:
        InputError: no image can be read.
    """
    if isinstance(pictures, Stream):
        share = islice(pictures.dataset, -(-count // world_size()))
        own = [transform(in_mode(item[0], mode)) for item in share]
        images = list(chain.from_iterable(gathered(own)))[:count]
    else:
        items = _Items(pictures, transform, mode, seed, replace=False)
        order = np.random.default_rng(seed).permutation(len(pictures))
        read = (items[0, int(index)][0] for index in order)
        images = list(islice((image for image in read if image is not None), count))
    if not images:
        raise InputError("none of the training images can be read")
    return torch.stack(images)


class _Order:
    """The pictures that this process reads, batch by batch, as (epoch, index)."""

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


class _Items(Dataset[Any]):
    """Pre-processed pictures by (epoch, index)."""

    def __init__(self, pictures: Pictures, transform: Transform, mode: str | None, seed: int, replace: bool) -> None:
        self.pictures, self.transform, self.mode, self.seed, self.replace = pictures, transform, mode, seed, replace

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor | None, int, list[str]]:
        epoch, index = place
        problems: list[str] = []
        for attempt in range(REPLACEMENTS if self.replace else 1):
            replacement = (index + attempt) % len(self.pictures)
            try:
                image, label = self.pictures.read(replacement)
                image = in_mode(image, self.mode)
            except HarmconvertError:
                raise
            except UNREADABLE as error:
                problems.append(f"{self.pictures.name(replacement)} ({first_line(error) or type(error).__name__})")
                continue
            with _fixed_seed(self.seed, epoch, index):
                return self.transform(image), NO_LABEL if label is None else label, problems
        return None, NO_LABEL, problems


class _StreamItems(IterableDataset[Any]):
    def __init__(self, dataset: Any, transform: Transform, mode: str | None, seed: int) -> None:
        self.dataset, self.transform, self.mode, self.seed, self.epoch = dataset, transform, mode, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int, list[str]]]:
        worker = get_worker_info()
        place = rank() * 1000 + (worker.id if worker else 0)
        for number, (image, label, *_) in enumerate(self.dataset):
            with _fixed_seed(self.seed, self.epoch, place, number):
                yield self.transform(in_mode(image, self.mode)), int(label), []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _load_by_index(items: _Items, order: _Order, workers: int, pin_memory: bool) -> Loading:
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_ignore_first_signal,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # The loader uses random numbers; with its own generator, those of dropout stay the same when a run is resumed.
        generator=torch.Generator(),
    )
    return Loading(loader, order, len(order), order.length, lambda epoch: None)


def _load_stream(
    stream: Stream,
    transform: Transform,
    mode: str | None,
    batch_size: int,
    seed: int,
    workers: int,
    pin_memory: bool,
    drop_last: bool,
) -> Loading:
    items = _StreamItems(stream.dataset, transform, mode, seed)
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=max(1, batch_size // world_size()),
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_ignore_first_signal,
        pin_memory=pin_memory,
        drop_last=drop_last,
        generator=torch.Generator(),
    )
    try:
        images: int | None = len(stream.dataset)
    except TypeError:
        images = None
    steps = None if images is None else images // batch_size
    return Loading(loader, None, steps, images, items.set_epoch)


def _ignore_first_signal(worker: int) -> None:
    """Make a worker process survive Ctrl-C and the first SIGTERM.

    Ctrl-C and schedulers signal the whole process group, but the main process needs its workers until it has saved its
    state. A second SIGTERM, which the main process sends to a stuck worker, ends the worker.
    """

    def wait_for_another(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, wait_for_another)


def _collate(items: Sequence[tuple[Tensor | None, int, list[str]]]) -> Batch:
    problems = [problem for _, _, problems in items for problem in problems]
    readable = [(image, label) for image, label, _ in items if image is not None]
    broken = any(image is None and len(tried) >= REPLACEMENTS for image, _, tried in items)
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), problems, broken)
    images = torch.stack([image for image, _ in readable])
    return Batch(images, torch.tensor([label for _, label in readable]), problems, broken)


@contextmanager
def _fixed_seed(*key: int) -> Iterator[None]:
    """Seed the random numbers of torch, numpy and Python from a key; restore their states afterwards."""
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)  # only the CPU's generator: torch.manual_seed also seeds the GPU's
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
