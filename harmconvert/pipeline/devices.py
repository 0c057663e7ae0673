"""Where a flow runs."""

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
    """Move a network to a device; where None is named to this process's GPU, if there is one and ``gpu`` is set.

    Raises:
        UsageError: no such device, or one without values or float64.
    """
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu and torch.cuda.is_available() else "cpu"
    named = Argument("device", device)
    if device.startswith("mps"):
        raise UsageError(named, " has no float64, which projections and fits need: use cpu")
    try:
        if torch.device(device).type == "meta":
            raise UsageError(named, " holds no values: use cpu or cuda")
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(named, f": {first_line(error)}") from error


def machine_on(
    device: str | None = None, channels_last: bool = True, compile: bool = False, sync_bn: bool = True
) -> MachineSettings:
    """The machine that trains or tests on a device; where None is named on a GPU, if there is one.

    Raises:
        UsageError: no such device, or none of a CPU or a GPU.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":  # each process of a machine has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    named = Argument("device", name)
    try:
        found = torch.device(name)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(named, f": {first_line(error)}") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(named, ": use cpu or cuda")
    return MachineSettings(found, channels_last, compile, sync_bn)


def machine_for(model: Openable, device: str | None) -> MachineSettings:
    """The machine that tests a network; where no device is named, the one that a given network is on."""
    if device is None and isinstance(model, Network | Conversion | nn.Module):
        network = model if isinstance(model, nn.Module) else model.model
        device = str(next((parameter.device for parameter in network.parameters()), "cpu"))
    return machine_on(device)


def ready(model: nn.Module, given: Openable, device: torch.device) -> nn.Module:
    """A network on a device and in float32; a copy of one that the caller gave, where it has to be changed."""
    here = next((parameter.device for parameter in model.parameters()), device)
    if is_given(given) and (here != device or in_sixteen_bits(model)):
        model = exchange(model, {})
    return in_float32(model.to(device))


def workers_for(workers: int | None, dataset: str) -> int:
    """Processes that load images for this one; where None is said, as many as there are cores to share, up to 8."""
    if workers is not None:
        return workers
    if dataset.startswith("sample:"):
        return 0  # a few thousand small arrays: handing them over would cost more than making them
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_world_size()))
