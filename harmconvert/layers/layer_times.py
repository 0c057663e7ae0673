"""Measure how long one harmonic convolution takes on this machine in dense and in factored form, once for each shape.

The times are stored as JSON in the cache folder. The file name depends on the machine, the version of torch and the
number of threads. Delete the file to measure again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
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
from .harmonic import basis_key, is_harmonic_layer
from .low_rank import can_factor_first, fast_form, plain_form, to_low_rank
from .ranked import RankedMixin, base_of, is_ranked, sizes_of
from .timing import in_turns

# A form counts as faster only if it saves at least this share of the time.
MARGIN = 0.02
_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class LayerInput:
    """The shape, dtype and device of a layer's input (of its last call if the layer runs more than once)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def layer_times(conv: nn.Module, layer_input: LayerInput) -> tuple[float, float]:
    """Return the seconds that a forward takes in dense and in factored form, with channels_last, without gradients.

    The two forms are timed in turns. The times of an earlier measurement are reused.
    """
    return measured_once(layer_key(conv, layer_input), lambda: _measure(conv, layer_input))


def measured_once(key: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Return the seconds of the dense and of the factored form with this key: measured now, or earlier if known."""
    path = _cache_path()
    times_by_key = _cached_times(path)
    if key not in times_by_key:
        times_by_key[key] = measure()
        _save_times(times_by_key, path)
    return times_by_key[key]


def first_is_faster_factored(ranked: RankedMixin, layer_input: LayerInput) -> bool:
    """Return whether the first of the two layers of a low rank is faster as a factored convolution (`layer_times`)."""
    if not can_factor_first(ranked):
        return False
    dense, factored = layer_times(to_low_rank(ranked, harmonic=True).first, layer_input)
    return factored < (1 - MARGIN) * dense


def kernels_to_channels_last(model: nn.Module) -> nn.Module:
    """Convert kernels to channels_last in place, so that the maps are channels_last, too; return the network."""
    for dimensions, memory_format in _MEMORY_FORMATS.items():
        for parameter in model.parameters():
            if parameter.dim() == dimensions:
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return model


def _measure(conv: nn.Module, layer_input: LayerInput) -> tuple[float, float]:
    first_factored = first_is_faster_factored(conv, layer_input) if is_ranked(conv) else None
    forms = (plain_form(conv), fast_form(conv, first_factored))
    dense, factored = (kernels_to_channels_last(form).eval() for form in forms)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(layer_input.shape, generator=generator).to(layer_input.device, layer_input.dtype)
    if memory_format := _MEMORY_FORMATS.get(input.dim()):
        input = input.contiguous(memory_format=memory_format)
    with torch.no_grad():
        times = in_turns({"dense": lambda: dense(input), "factored": lambda: factored(input)}, 7, 3, 2.0)
    return times["dense"].median, times["factored"].median


def layer_key(conv: nn.Module, layer_input: LayerInput) -> str:
    """Return all that the time of a layer depends on, as text."""
    geometry = [
        cast(Any, getattr(conv, name, None))
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    ]
    groups, rows, channels, _ = sizes_of(conv)
    ranks = (conv.rank, conv.kernel_second, "first as measured") if is_ranked(conv) else ()
    parts = (
        base_of(conv).__name__, groups * channels, groups * rows, groups,
        *geometry, conv.bias is not None, *(basis_key(conv) if is_harmonic_layer(conv) else ()), *ranks,
        list(layer_input.shape), str(layer_input.dtype), str(next(conv.parameters()).dtype),
        str(layer_input.device.type),
    )  # fmt: skip
    return json.dumps(parts)


@cache
def _cached_times(path: Path | None) -> dict[str, tuple[float, float]]:
    return read_times(path)


def read_times(path: Path | None) -> dict[str, tuple[float, float]]:
    """Return the times in a cache file; an empty dict if the file is missing or damaged."""
    try:
        content = read_json(path) if path else {}
        check(content, {...: [_positive_number]}, "times")
        return {key: (float(dense), float(factored)) for key, (dense, factored) in content.items()}
    except (OSError, ValueError):
        return {}  # no harm is done: the times are measured again


def _positive_number(value: Any) -> bool:
    return finite(value) and value > 0


def _save_times(times_by_key: dict[str, tuple[float, float]], path: Path | None) -> None:
    if path is None:
        return
    written_by_others = {key: times for key, times in read_times(path).items() if key not in times_by_key}
    times_by_key.update(written_by_others)
    with suppress(OutsideError, OSError):  # if the cache cannot be written, the times are measured again next time
        write_text(path, json.dumps(times_by_key, indent=1), force=True)


def _cache_path() -> Path | None:
    """Return the cache file for this machine with its current settings; None if there is no cache folder."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine: Sequence[Any] = (
        platform.node(), _processor(), os.cpu_count(), torch.get_num_threads(), torch.__version__, device,
        native.reason_unavailable(), native.SOURCE.read_bytes(),
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
