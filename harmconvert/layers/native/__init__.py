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
DTYPES = (torch.float32, torch.bfloat16)
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC")
# Target number of responses of one pixel for one block of channels. With fewer, computing the responses takes more time
# than the product with the coefficients; with more, the responses do not fit into the cache.
DEPTH = 288
# Target number of responses in bfloat16 that are computed at a time.
CACHED_RESPONSES = 1 << 23


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
    index of the vertical vector of each basis kernel, int32. ``weights``: in float32 the coefficients in panels of
    output channels, and ``bias`` is padded to whole panels; in bfloat16 the coefficients (O, F x I), and ``bias`` (O,).
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
    factors = vertical.float().contiguous(), horizontal.float().contiguous(), vertical_of.to(torch.int32)
    out, channels, frequencies = coefficients_OIF.shape
    if coefficients_OIF.dtype == torch.bfloat16:
        weights = coefficients_OIF.detach().transpose(1, 2).flatten(1).contiguous()
        return Packed(*factors, weights, weights.new_zeros(out) if bias_O is None else bias_O.detach().clone())
    panel = library.harmconvert_panel()
    missing = -out % panel
    blocks = []
    for part_OIF in coefficients_OIF.detach().float().split(channels_per_block(channels, frequencies), 1):
        depth_O = functional.pad(part_OIF.permute(2, 1, 0).flatten(0, 1), (0, missing))
        blocks.append(depth_O.unflatten(1, (-1, panel)).transpose(0, 1).flatten())
    bias = torch.zeros(out) if bias_O is None else bias_O.detach().float()
    return Packed(*factors, torch.cat(blocks).contiguous(), functional.pad(bias, (0, missing)).contiguous())


def run(x_NCHW: Tensor, layer: Packed, out_channels: int, geometry: Geometry) -> Tensor:
    """Return the factored convolution of a map (N, C, H, W) in CPU memory; the result is channels_last.

    The map is in float32 or bfloat16, and the layer was packed from coefficients of the same dtype.

    Raises:
        RuntimeError: the map does not have the layer's number of channels, or there is not enough memory.
    """
    x = x_NCHW.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    verticals, rows = layer.vertical.shape
    frequencies, columns = layer.horizontal.shape
    if layer.weights.numel() != layer.bias.numel() * channels * frequencies:  # factored.c would read past its end
        raise RuntimeError(f"a map of {channels} channels does not fit this layer")
    shape = _Shape(
        batch, height, width, channels, *geometry.out, out_channels, rows, columns, *geometry.stride,
        *geometry.dilation, geometry.top, geometry.left, verticals, frequencies,
        channels_per_block(channels, frequencies),
    )  # fmt: skip
    if x.dtype == torch.bfloat16:
        return _run_in_bfloat16(x, layer, shape)
    y = torch.empty((batch, out_channels, *geometry.out), dtype=x.dtype, memory_format=torch.channels_last)
    if y.numel():
        _call("harmconvert_factored", shape, x, *_factors(layer), layer.weights, layer.bias, y)
    return y


def _run_in_bfloat16(x: Tensor, layer: Packed, shape: _Shape) -> Tensor:
    """Compute the responses of a few images at a time, so that they stay in the cache, and multiply them by torch."""
    out_NHWO = x.new_empty((shape.batch, shape.out_height, shape.out_width, shape.out_channels))
    pixels, depth = shape.out_height * shape.out_width, shape.frequencies * shape.channels
    images = min(shape.batch, max(1, CACHED_RESPONSES // max(pixels * depth, 1)))
    responses = x.new_empty((images * pixels, depth))
    weights, parts = layer.weights.t(), zip(x.split(images), out_NHWO.flatten(0, 2).split(images * pixels), strict=True)
    for part, out in parts:
        shape.batch, z = len(part), responses[: len(out)]
        if z.numel():
            _call("harmconvert_responses", shape, part, *_factors(layer), z)
        torch.addmm(layer.bias, z, weights, out=out)
    return out_NHWO.permute(0, 3, 1, 2)


def _call(function: str, shape: _Shape, *tensors: Tensor) -> None:
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    if getattr(_library()[0], function)(ctypes.byref(shape), *pointers, torch.get_num_threads()):
        raise RuntimeError("not enough memory for the responses of a tile")


def _factors(layer: Packed) -> tuple[Tensor, ...]:
    """Return the factors of the basis kernels in the order of factored.c."""
    return layer.vertical, layer.horizontal, layer.vertical_of


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
    for function, pointers in ((library.harmconvert_factored, 8), (library.harmconvert_responses, 6)):
        function.restype = ctypes.c_int
        function.argtypes = [*[ctypes.c_void_p] * pointers, ctypes.c_int]
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
