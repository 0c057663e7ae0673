"""How long one harmonic convolution takes on this machine, dense and factored; measured once for each shape.

Times are kept as JSON in the cache folder, under a name that says which machine, which torch, how many threads; delete
the file to measure anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..documents import check, finite
from ..errors import OutsideError
from ..files import cache_folder, read_json, write_text
from . import native
from .factored import to_factored
from .harmonic import HarmonicMixin, base_class, to_dense
from .timing import in_turns

_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Site:
    """What a convolution is fed: the shape, dtype and device of its input (the last where it runs more than once)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layer_times(conv: HarmonicMixin, site: Site) -> tuple[float, float]:
    """Seconds of a forward of its dense and of its factored form on inputs of that kind, both laid out channels_last,
    without gradients; measured in turns, or as they were measured before."""
    path, key = _file(), _key(conv, site)
    known = _known(path)
    if key not in known:
        known[key] = _measured(conv, site)
        _keep(known, path)
    return known[key]


def lay_out(model: nn.Module) -> nn.Module:
    """Lay a network's kernels out channels_last, in place, so that all maps between them are; gives it back."""
    for dimensions, layout in _MEMORY_FORMATS.items():
        for parameter in model.parameters():
            if parameter.dim() == dimensions:
                parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


def _measured(conv: HarmonicMixin, site: Site) -> tuple[float, float]:
    dense, factored = lay_out(to_dense(conv)).eval(), to_factored(conv).eval()
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(site.shape, generator=generator).to(site.device, site.dtype)
    if layout := _MEMORY_FORMATS.get(input.dim()):
        input = input.contiguous(memory_format=layout)
    with torch.no_grad():
        times = in_turns({"dense": lambda: dense(input), "factored": lambda: factored(input)}, 7, 3, 2.0)
    return times["dense"].median, times["factored"].median


def _key(conv: HarmonicMixin, site: Site) -> str:
    geometry = [
        cast(Any, getattr(conv, name)) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    ]
    parts = (
        base_class(conv).__name__, cast(int, conv.in_channels), cast(int, conv.out_channels), cast(int, conv.groups),
        *geometry, conv.bias is not None, [*map(list, conv.frequencies)], conv.basis_spec.fitted, list(site.shape),
        str(site.dtype), str(conv.coefficients.dtype), str(site.device.type),
    )  # fmt: skip
    return json.dumps(parts)


@cache
def _known(path: Path | None) -> dict[str, tuple[float, float]]:
    return read_times(path)


def read_times(path: Path | None) -> dict[str, tuple[float, float]]:
    """The times in a file of the cache; none where the file is missing or damaged."""
    try:
        content = read_json(path) if path else {}
        check(content, {...: [_seconds]}, "times")
        return {key: (float(dense), float(factored)) for key, (dense, factored) in content.items()}
    except (OSError, ValueError):
        return {}  # of no harm: they are measured again


def _seconds(value: Any) -> bool:
    return finite(value) and value > 0


def _keep(known: dict[str, tuple[float, float]], path: Path | None) -> None:
    if path is None:
        return
    known.update({key: times for key, times in read_times(path).items() if key not in known})  # of other processes
    with suppress(OutsideError, OSError):  # a cache that cannot be written costs time, nothing else
        write_text(path, json.dumps(known, indent=1), force=True)


def _file() -> Path | None:
    """Where the times of this machine, as it is set up now, are kept."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine: Sequence[Any] = (
        platform.node(), _processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__, device,
        native.unavailable(), native.SOURCE.read_bytes(),
    )  # fmt: skip
    name = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
    try:
        return cache_folder() / f"layer-times-{name}.json"
    except OSError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.machine())
