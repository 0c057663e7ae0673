"""Where a flow runs."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..errors import Argument, UsageError, first_line


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
