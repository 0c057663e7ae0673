"""What this machine has left for a calibration: memory and threads, of which a container may have less."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ..network.distributed import least_over_ranks, local_world_size
from .records import CalibrationSettings

_GROUP = Path("/sys/fs/cgroup")
_FEW_THREADS = 1 << 12


def memory_for(model: nn.Module, settings: CalibrationSettings) -> int:
    """Bytes that one layer's equations may take in each process: as set, or half of what is free where ``model`` is."""
    free = free_memory(next(model.parameters()).device)
    return settings.memory or least_over_ranks(free // 2 // local_world_size())


def free_memory(device: torch.device) -> int:
    """Bytes free on a device: of a GPU as its driver says, of the machine as its kernel does (8 GB if it does not)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30
    return max(min(free, _left("memory", free)), 1 << 21)


def threads_free(most: int) -> int:
    """Threads that each process here may start, ``most`` of them at the highest; half of what is left to all."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if 0 <= limit < _FEW_THREADS:  # how many of them are in use is not easily known
            return 0
    return min(most, _left("pids", most)) // 2 // local_world_size()


def _left(kind: str, otherwise: int) -> int:
    """What a container's limit leaves, where there is one."""
    with suppress(OSError, ValueError):  # "max" is no number
        left = int((_GROUP / f"{kind}.max").read_text()) - int((_GROUP / f"{kind}.current").read_text())
        return left + (_reclaimable() if kind == "memory" else 0)
    return otherwise


def _reclaimable() -> int:
    """Bytes of files that a container's kernel keeps in memory until somebody needs it."""
    with suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return int(stat["inactive_file"]) + int(stat["active_file"])
    return 0
