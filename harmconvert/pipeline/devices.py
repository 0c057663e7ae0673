"""The device and the number of processes of a flow."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..errors import Argument, UsageError, first_line
from ..network.distributed import local_world_size
from ..network.exchange import exchange, in_sixteen_bits
from ..storage.checkpoint import Network
from ..storage.precision import in_float32
from ..training.trainer import MachineSettings
from .convert import Conversion
from .networks import Openable, is_given


def place(model: nn.Module, device: str | None, gpu: bool = False) -> None:
    """Move a network to a device; without a name, to this process's GPU if there is one and ``gpu`` is set.

    Raises:
        UsageError: the device does not exist, or it has no values or no float64.
    """
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu and torch.cuda.is_available() else "cpu"
    argument = Argument("device", device)
    if device.startswith("mps"):
        raise UsageError(argument, " has no float64, which projections and fits need: use cpu")
    try:
        if torch.device(device).type == "meta":
            raise UsageError(argument, " holds no values: use cpu or cuda")
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(argument, f": {first_line(error)}") from error


def machine_on(
    device: str | None = None, channels_last: bool = True, compile: bool = False, sync_bn: bool = True
) -> MachineSettings:
    """Return the machine that trains or tests on a device; without a name, on a GPU if there is one.

    Raises:
        UsageError: the device does not exist, or is neither a CPU nor a CUDA GPU.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":  # each process of a machine uses its own GPU
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    argument = Argument("device", name)
    try:
        torch_device = torch.device(name)
        torch.zeros(1, device=torch_device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(argument, f": {first_line(error)}") from error
    if torch_device.type not in ("cpu", "cuda"):
        raise UsageError(argument, ": use cpu or cuda")
    return MachineSettings(torch_device, channels_last, compile, sync_bn)


def machine_for(model: Openable, device: str | None) -> MachineSettings:
    """Return the machine that tests a network; without a name, the device of a network object is used."""
    if device is None and isinstance(model, Network | Conversion | nn.Module):
        network = model if isinstance(model, nn.Module) else model.model
        device = str(next((parameter.device for parameter in network.parameters()), "cpu"))
    return machine_on(device)


def ready(model: nn.Module, requested: Openable, device: torch.device) -> nn.Module:
    """Return the network on a device and in float32; if that changes a network object of the caller, a copy of it.

    ``requested`` is what the caller gave: a source, or a network object.
    """
    current = next((parameter.device for parameter in model.parameters()), device)
    if is_given(requested) and (current != device or in_sixteen_bits(model)):
        model = exchange(model, {})
    return in_float32(model.to(device))


def workers_for(workers: int | None, dataset: str) -> int:
    """Return the number of processes that load images; default: the cores of each training process, at most 8."""
    if workers is not None:
        return workers
    if dataset.startswith("sample:"):
        return 0  # a few thousand small arrays: sending them from another process costs more than making them
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_world_size()))
