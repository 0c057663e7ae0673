"""Several processes as one: what torch.distributed gives, and nothing where there is one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

from ..errors import OutsideError, first_line

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return distributed.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes that work together."""
    return distributed.get_world_size() if _joined() else 1


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; every process must call it with the same shapes."""
    if world_size() > 1:
        for tensor in tensors:
            # A process group of nccl alone takes no tensors of the CPU.
            moved = tensor.cuda() if distributed.get_backend() == "nccl" else tensor
            distributed.all_reduce(moved)
            tensor.copy_(moved)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process: what one cannot do, all must leave together."""
    return any(gathered(flag))


def all_or_none(work: Callable[[], T], otherwise: Exception) -> T:
    """What ``work`` returns in this process; an error in any process is one in all of them, at the same place, because
    one that went on would wait for the others.

    Raises:
        Exception: what ``work`` raised here, or ``otherwise``, where it raised in another.
    """
    found: list[T] = []
    failure: Exception | None = None
    try:
        found.append(work())
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        raise failure or otherwise
    return found[0]


def on_first_rank(work: Callable[[], T]) -> T:
    """What ``work`` returns in the first process, which alone does it; the others wait for it.

    Raises:
        Exception: in the first process what ``work`` raised; OutsideError: in the others, where it raised.
    """
    done = all_or_none(lambda: work() if rank() == 0 else None, OutsideError("the first process failed"))
    return from_first_rank(cast(T, done))


def least_over_ranks(value: int) -> int:
    """The smallest of all processes' values."""
    return min(gathered(value))


def from_first_rank(value: T) -> T:
    """The first process's value, in all of them."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def local_world_size() -> int:
    """Number of processes that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started (gloo on CPUs, nccl on GPUs); nothing without torchrun.

    Raises:
        OutsideError: the others cannot be reached, or there are more processes than GPUs.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or _joined():
        yield
        return
    gpus = torch.cuda.is_available()
    try:
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    except (RuntimeError, ValueError, OSError) as error:
        raise OutsideError(f"cannot join the processes that torchrun started: {first_line(error)}") from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of their numbers."""
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
