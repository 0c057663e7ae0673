"""Compile factored.c for this machine when it is first needed, and call it on tensors.

A C compiler (``cc``, or the command in ``CC``) compiles it in half a second. The library is stored in the cache folder;
its name depends on the source, the compiler and the processor. Without a compiler, or with ``HARMCONVERT_NATIVE=0``,
everything still works, but more slowly; `reason_unavailable` returns the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import first_line
from ...files import cache_folder

SOURCE = Path(__file__).with_name("factored.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC")
# Target number of responses of one pixel for one block of channels. With fewer, computing the responses takes more time
# than the product with the coefficients; with more, the responses do not fit into the cache.
DEPTH = 288


class _Shape(ctypes.Structure):
    """shape_t of factored.c."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "batch", "height", "width", "channels", "out_height", "out_width", "out_channels", "rows", "columns",
            "stride_y", "stride_x", "dilation_y", "dilation_x", "top", "left", "verticals", "frequencies", "block",
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over a two-dimensional map: zeros above and to the left, stride, dilation, output size."""

    top: int
    left: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """A layer in the memory layout of factored.c.

    ``vertical`` (V, rows) and ``horizontal`` (F, columns): factors of the basis kernels, float32. ``vertical_of`` (F,):
    index of the vertical vector of each basis kernel, int32. ``weights``: coefficients in panels of output channels.
    ``bias``: padded to whole panels.
    """

    vertical: Tensor
    horizontal: Tensor
    vertical_of: Tensor
    weights: Tensor
    bias: Tensor


def reason_unavailable() -> str | None:
    """Return why the compiled kernel is not available on this machine, or None if it is."""
    return _library()[1]


def channels_per_block(channels: int, frequencies: int) -> int:
    """Return the number of channels whose responses are computed at a time."""
    return min(channels, max(16, DEPTH // frequencies // 16 * 16))


def pack(
    coefficients_OIF: Tensor, bias_O: Tensor | None, vertical: Tensor, horizontal: Tensor, vertical_of: Tensor
) -> Packed:
    """Copy a layer to the memory layout that `run` needs.

    Args:
        coefficients_OIF: coefficients of the basis kernels vertical[vertical_of[f]] x horizontal[f].

    Raises:
        RuntimeError: the compiled kernel is not available.
    """
    library, reason = _library()
    if library is None:
        raise RuntimeError(reason)
    panel = library.harmconvert_panel()
    out, channels, frequencies = coefficients_OIF.shape
    missing = -out % panel
    blocks = []
    for part_OIF in coefficients_OIF.detach().float().split(channels_per_block(channels, frequencies), 1):
        depth_O = functional.pad(part_OIF.permute(2, 1, 0).flatten(0, 1), (0, missing))
        blocks.append(depth_O.unflatten(1, (-1, panel)).transpose(0, 1).flatten())
    bias = torch.zeros(out) if bias_O is None else bias_O.detach().float()
    return Packed(
        vertical.float().contiguous(),
        horizontal.float().contiguous(),
        vertical_of.to(torch.int32),
        torch.cat(blocks).contiguous(),
        functional.pad(bias, (0, missing)).contiguous(),
    )


def run(x_NCHW: Tensor, layer: Packed, out_channels: int, geometry: Geometry) -> Tensor:
    """Return the factored convolution of a float32 map (N, C, H, W) in CPU memory; the result is channels_last.

    Raises:
        RuntimeError: the map does not have the layer's number of channels, or there is not enough memory.
    """
    x = x_NCHW.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    y = torch.empty((batch, out_channels, *geometry.out), dtype=x.dtype, memory_format=torch.channels_last)
    verticals, rows = layer.vertical.shape
    frequencies, columns = layer.horizontal.shape
    if layer.weights.numel() != layer.bias.numel() * channels * frequencies:  # factored.c would read past its end
        raise RuntimeError(f"a map of {channels} channels does not fit this layer")
    shape = _Shape(
        batch, height, width, channels, *geometry.out, out_channels, rows, columns, *geometry.stride,
        *geometry.dilation, geometry.top, geometry.left, verticals, frequencies,
        channels_per_block(channels, frequencies),
    )  # fmt: skip
    library = _library()[0]
    assert library is not None
    tensors = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *_packed_tensors(layer), y))
    if y.numel() and library.harmconvert_factored(ctypes.byref(shape), *tensors, torch.get_num_threads()):
        raise RuntimeError("not enough memory for the responses of a tile")
    return y


def _packed_tensors(layer: Packed) -> tuple[Tensor, ...]:
    """Return the tensors of a packed layer in the order of factored.c (dataclasses.astuple would copy them)."""
    return layer.vertical, layer.horizontal, layer.vertical_of, layer.weights, layer.bias


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("HARMCONVERT_NATIVE", "1") == "0":
        return None, "HARMCONVERT_NATIVE=0"
    try:
        library = ctypes.CDLL(str(_compiled_library()))
    except (OSError, subprocess.SubprocessError) as error:
        compiler_output = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        return None, f"no compiled kernel ({first_line(RuntimeError(compiler_output)) or first_line(error)})"
    library.harmconvert_panel.restype = ctypes.c_int64
    library.harmconvert_factored.restype = ctypes.c_int
    library.harmconvert_factored.argtypes = [*[ctypes.c_void_p] * 8, ctypes.c_int]
    return library, None


def _compiled_library() -> Path:
    """Return the path of the compiled library; compile it if it is not in the cache."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source, runtime = SOURCE.read_bytes(), _torch_openmp()
    # The predefined macros contain the compiler's version and the features that -march=native selects.
    macros = _run_compiler([*compiler, *FLAGS, "-E", "-dM", "-x", "c", os.devnull])
    key = hashlib.sha256(b"\0".join((source, macros, str(runtime).encode(), repr(FLAGS).encode()))).hexdigest()[:16]
    path = _safe_cache_folder() / f"factored-{key}.so"
    if path.exists():
        return path
    with TemporaryDirectory(dir=path.parent) as folder:
        library, objects = Path(folder) / path.name, str(Path(folder) / "factored.o")
        openmp = ["-fopenmp"] if sys.platform != "darwin" else []
        _run_compiler([*compiler, *FLAGS, *openmp, "-c", str(SOURCE), "-o", objects])
        # Link torch's own OpenMP runtime by its path: a second runtime would compete with torch's threads.
        _run_compiler([*compiler, "-shared", objects, "-o", str(library), *([str(runtime)] if runtime else openmp)])
        library.replace(path)
    return path


def _safe_cache_folder() -> Path:
    """Return the cache folder; raise OSError if other users could put a library into it."""
    folder = cache_folder()
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others may write in {folder}: chmod go-w it, or set HARMCONVERT_CACHE to another folder")
    return folder


def _torch_openmp() -> Path | None:
    torch_folder = Path(torch.__file__).parent
    folders = (torch_folder / "lib", torch_folder.parent / "torch.libs")
    paths = (path for folder in folders for path in sorted(folder.glob("lib[gi]omp*.so*")))
    return next(paths, None) if sys.platform != "darwin" else None


def _run_compiler(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
