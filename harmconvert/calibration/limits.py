"""Find out how much memory and how many threads a calibration may use, with the limits of a container."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ..network.distributed import least_over_ranks, local_world_size
from .records import CalibrationSettings

_GROUP = Path("/sys/fs/cgroup")
_FEW_THREADS = 1 << 12  # a user's limit below this is tight


def memory_for(model: nn.Module, settings: CalibrationSettings) -> int:
    """Return the bytes that one layer's equations may use in each process: as set, or half of the free memory."""
    free = free_memory(next(model.parameters()).device)
    return settings.memory or least_over_ranks(free // 2 // local_world_size())


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU or of this machine; 8 GB if the machine's kernel does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30
    return max(min(free, _left_in_container("memory", free)), 1 << 21)


def return_freed_memory() -> None:
    """Return memory that was freed to the system. glibc keeps it otherwise: 1.6 GB after the moments of ResNet-50."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def threads_free(most: int) -> int:
    """Return how many threads each process on this machine may start: half of the available ones, from ``most``."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if 0 <= limit < _FEW_THREADS:  # the number of threads in use is not easy to find: start none
            return 0
    return min(most, _left_in_container("pids", most)) // 2 // local_world_size()


def _left_in_container(kind: str, otherwise: int) -> int:
    """Return what the container's limit leaves; ``otherwise`` if there is no limit."""
    with suppress(OSError, ValueError):  # without a limit the file contains "max"
        left = int((_GROUP / f"{kind}.max").read_text()) - int((_GROUP / f"{kind}.current").read_text())
        return left + (_file_cache_bytes() if kind == "memory" else 0)
    return otherwise


def _file_cache_bytes() -> int:
    """Return the bytes of cached files that the container's kernel frees when memory is needed."""
    with suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return int(stat["inactive_file"]) + int(stat["active_file"])
    return 0
