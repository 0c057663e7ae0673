"""Batches of pre-processed pictures: the same ones whatever the number of processes, workers and interruptions.

What happens to a picture in an epoch (crop, flip) is a function of the seed, the epoch and the picture alone; which
pictures make up a batch is a function of the seed, the epoch and the batch. So two processes see what one would, and a
run that goes on after batch 17 goes on with batch 18.
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

from ..errors import HarmconvertError, InputError, OutsideError, counted, first_line, shortened
from ..network.distributed import gathered, rank, world_size
from .datasets import Stream
from .pictures import UNREADABLE, Pictures, in_mode
from .preprocessing import Transform

# A broken picture is replaced by the next one that can be read; a run of this many is a broken data set.
REPLACEMENTS = 10
NO_LABEL = -1


class Batch(NamedTuple):
    """Images (N, C, H, W), labels (N,; -1 where there are none), what could not be read, and whether that is final."""

    images: Tensor
    labels: Tensor
    problems: list[str]
    broken: bool = False


class Batches(Protocol):
    """What training wants of its data: ``steps`` batches in an epoch (None: nobody knows how many), from any of
    them on; ``order`` is None for a stream, which may end sooner in one process than in another."""

    @property
    def steps(self) -> int | None: ...

    @property
    def order(self) -> object: ...

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]: ...


@dataclass
class Loading:
    """Batches of one part of a data set for this process, epoch by epoch.

    ``steps``: batches in an epoch, ``images``: all there are, over all processes (None for a stream whose length is not
    known); the last, incomplete batch is left out when training.
    """

    loader: DataLoader[Any]
    order: _Order | None
    steps: int | None
    images: int | None
    set_epoch: Callable[[int], None]

    def unread(self, read: int) -> str | None:
        """A note where fewer images came than there are: streams are shared out shard by shard."""
        if self.images is None or read >= self.images:
            return None
        return (
            f"note: {read} of {counted(self.images, 'image')} were read: a stream wants as many shards as "
            f"there are processes "
            "times --workers"
        )

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on.

        Raises:
            InputError: too many images in a row cannot be read. OutsideError: a worker died.
        """
        self.set_epoch(number)
        if self.order is not None:
            self.order.epoch, self.order.first_step = number, first_step
        skipped = 0 if self.order is not None else first_step  # a stream can only be run through
        try:
            for batch in islice(self.loader, skipped, None):
                # Raised here: an exception that crosses from a worker brings its traceback as its message.
                if batch.broken:
                    what = shortened(batch.problems[-REPLACEMENTS:], 2)
                    raise InputError(f"{REPLACEMENTS} images in a row cannot be read: {what}: mend the data")
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OutsideError(f"{first_line(error)}: give fewer --workers, or more shared memory") from error
        except HarmconvertError as error:
            text = str(error.args[0])
            if not text.startswith("Caught "):
                raise
            # A worker's error brings its traceback as its message; the last line is the worker's own message.
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
    """Shuffled and augmented, the incomplete last batch left out (a set smaller than a batch is one batch)."""
    if isinstance(pictures, Stream):
        return _streamed(pictures, transform, mode, batch_size, seed, workers, pin_memory, drop_last=True)
    batch_size = min(batch_size, len(pictures) // world_size() * world_size())
    if batch_size == 0:
        raise InputError(
            f"{counted(len(pictures), 'image')} for {counted(world_size(), 'process')}: use fewer processes"
        )
    order = _Order(len(pictures), batch_size, seed, shuffle=True)
    return _indexed(_Items(pictures, transform, mode, seed, replace=True), order, workers, pin_memory)


def evaluation_batches(
    pictures: Pictures | Stream,
    transform: Transform,
    mode: str | None,
    batch_size: int,
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Loading:
    """Every picture once, in order; broken ones are left out and named."""
    if isinstance(pictures, Stream):
        return _streamed(pictures, transform, mode, batch_size, 0, workers, pin_memory, drop_last=False)
    order = _Order(len(pictures), batch_size, 0, shuffle=False)
    return _indexed(_Items(pictures, transform, mode, 0, replace=False), order, workers, pin_memory)


def some_images(pictures: Pictures | Stream, transform: Transform, mode: str | None, count: int, seed: int) -> Tensor:
    """Up to ``count`` pre-processed images (N, C, H, W), chosen by ``seed`` (of a stream the first of each process's
    share), the same in every process; broken ones are passed over.

    Raises:
        InputError: none can be read.
    """
    if isinstance(pictures, Stream):
        share = islice(pictures.dataset, -(-count // world_size()))
        mine = [transform(in_mode(item[0], mode)) for item in share]
        found = list(chain.from_iterable(gathered(mine)))[:count]
    else:
        items = _Items(pictures, transform, mode, seed, replace=False)
        order = np.random.default_rng(seed).permutation(len(pictures))
        read = (items[0, int(index)][0] for index in order)
        found = list(islice((image for image in read if image is not None), count))
    if not found:
        raise InputError("none of the training images can be read")
    return torch.stack(found)


class _Order:
    """Which pictures this process reads, batch by batch, as (epoch, picture)."""

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
            this = (index + attempt) % len(self.pictures)
            try:
                image, label = self.pictures.read(this)
                image = in_mode(image, self.mode)
            except HarmconvertError:
                raise
            except UNREADABLE as error:
                problems.append(f"{self.pictures.name(this)} ({first_line(error) or type(error).__name__})")
                continue
            with _seeded(self.seed, epoch, index):
                return self.transform(image), NO_LABEL if label is None else label, problems
        return None, NO_LABEL, problems


class _StreamItems(IterableDataset[Any]):
    def __init__(self, dataset: Any, transform: Transform, mode: str | None, seed: int) -> None:
        self.dataset, self.transform, self.mode, self.seed, self.epoch = dataset, transform, mode, seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int, list[str]]]:
        worker = get_worker_info()
        place = rank() * 1000 + (worker.id if worker else 0)
        for number, (image, label, *_) in enumerate(self.dataset):
            with _seeded(self.seed, self.epoch, place, number):
                yield self.transform(in_mode(image, self.mode)), int(label), []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _indexed(items: _Items, order: _Order, workers: int, pin_memory: bool) -> Loading:
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_sampler=order,
        collate_fn=_collated,
        num_workers=workers,
        worker_init_fn=_outlast_a_signal,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        # Its own, because a loader draws from the generator it has, and dropout's must not notice a resumption.
        generator=torch.Generator(),
    )
    return Loading(loader, order, len(order), order.length, lambda epoch: None)


def _streamed(
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
        collate_fn=_collated,
        num_workers=workers,
        worker_init_fn=_outlast_a_signal,
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


def _outlast_a_signal(worker: int) -> None:
    """Ctrl-C and schedulers signal the whole process group: a worker must live until the main process, which saves the
    state first, is done with it. Only a second SIGTERM, such as that process sends to a stuck one, ends it."""

    def wait_for_another(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, wait_for_another)


def _collated(items: Sequence[tuple[Tensor | None, int, list[str]]]) -> Batch:
    problems = [problem for _, _, problems in items for problem in problems]
    whole = [(image, label) for image, label, _ in items if image is not None]
    broken = any(image is None and len(tried) >= REPLACEMENTS for image, _, tried in items)
    if not whole:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), problems, broken)
    images = torch.stack([image for image, _ in whole])
    return Batch(images, torch.tensor([label for _, label in whole]), problems, broken)


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """The random numbers that transforms draw (torch's, numpy's, Python's), from a key, and as they were afterwards."""
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would touch the GPU's, too
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
