"""Several processes as one: what torch.distributed gives, and nothing where there is one process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


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
            distributed.all_reduce(tensor)


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started (nccl on GPUs, gloo on CPUs); nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
