"""Let several processes work together through torch.distributed; with one process the functions do nothing."""

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
    """Return the number of this process; 0 if it is the only one."""
    return distributed.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that work together."""
    return distributed.get_world_size() if _is_initialized() else 1


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; every process must call it with the same shapes."""
    if world_size() > 1:
        for tensor in tensors:
            # nccl does not accept tensors in CPU memory.
            moved = tensor.cuda() if distributed.get_backend() == "nccl" else tensor
            distributed.all_reduce(moved)
            tensor.copy_(moved)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    return any(gathered(flag))


def all_or_none(work: Callable[[], T], otherwise: Exception) -> T:
    """Return the result of ``work`` in this process; if ``work`` fails in any process, raise an error in all of them.

    Without this, the processes that did not fail would wait forever for the one that did.

    Raises:
        Exception: the error of ``work`` in this process, or ``otherwise`` if it failed only in another process.
    """
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(work())
    except Exception as error:
        failure = error
    if any_rank(failure is not None):
        raise failure or otherwise
    return results[0]


def on_first_rank(work: Callable[[], T]) -> T:
    """Call ``work`` in the first process only and return its result in all processes; the others wait.

    Raises:
        Exception: in the first process, the error of ``work``.
        OutsideError: in the other processes, if ``work`` failed.
    """
    done = all_or_none(lambda: work() if rank() == 0 else None, OutsideError("the first process failed"))
    return from_first_rank(cast(T, done))


def least_over_ranks(value: int) -> int:
    """Return the smallest of all processes' values."""
    return min(gathered(value))


def from_first_rank(value: T) -> T:
    """Return the first process's value in all processes."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started (gloo on CPUs, nccl on GPUs); do nothing without torchrun.

    Raises:
        OutsideError: the other processes cannot be reached, or there are more processes than GPUs.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or _is_initialized():
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
    """Return the values of all processes, in the order of their numbers."""
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
