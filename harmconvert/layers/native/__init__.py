"""factored.c, compiled for this machine when it is first needed, and called on tensors.

A C compiler (``cc``, or what ``CC`` names) makes it in half a second; the library is kept in the cache folder under a
name that says which source, which compiler and which processor it was made of. Where there is no compiler, or
``HARMCONVERT_NATIVE=0`` says so, everything works without it, only slower: `unavailable` says why.
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
# Channels of a block are chosen so that a row of responses has about this many numbers: fewer, and forming them costs
# more beside the product; more, and they leave no room in the cache.
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
    """How a two-dimensional kernel goes over a map: zeros above and left of it, steps, size of what comes out."""

    top: int
    left: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """A layer as factored.c reads it: ``vertical`` (V, rows) and ``horizontal`` (F, columns), float32; ``vertical_of``
    (F,) int32; ``weights`` in panels of output channels, ``bias`` padded to whole panels."""

    vertical: Tensor
    horizontal: Tensor
    vertical_of: Tensor
    weights: Tensor
    bias: Tensor


def unavailable() -> str | None:
    """Why the compiled kernel is not to be had here, or None where it is."""
    return _library()[1]


def block_of(channels: int, frequencies: int) -> int:
    """Channels whose responses are formed at a time."""
    return min(channels, max(16, DEPTH // frequencies // 16 * 16))


def pack(
    coefficients_OIF: Tensor, bias_O: Tensor | None, vertical: Tensor, horizontal: Tensor, vertical_of: Tensor
) -> Packed:
    """Lay a layer out for `run`: coefficients (O, I, F), of the basis kernels vertical[vertical_of[f]] x horizontal[f].

    Raises:
        RuntimeError: the compiled kernel is not available.
    """
    library, why = _library()
    if library is None:
        raise RuntimeError(why)
    panel = library.harmconvert_panel()
    out, channels, frequencies = coefficients_OIF.shape
    missing = -out % panel
    blocks = []
    for part_OIF in coefficients_OIF.detach().float().split(block_of(channels, frequencies), 1):
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
    """The factored convolution of a float32 map in CPU memory; the result is laid out channels_last.

    Raises:
        RuntimeError: the map has other channels than the layer, or memory is short.
    """
    x = x_NCHW.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    y = torch.empty((batch, out_channels, *geometry.out), dtype=x.dtype, memory_format=torch.channels_last)
    verticals, rows = layer.vertical.shape
    frequencies, columns = layer.horizontal.shape
    if layer.weights.numel() != layer.bias.numel() * channels * frequencies:  # it would be read past its end
        raise RuntimeError(f"a map of {channels} channels is not for this layer")
    shape = _Shape(
        batch, height, width, channels, *geometry.out, out_channels, rows, columns, *geometry.stride,
        *geometry.dilation, geometry.top, geometry.left, verticals, frequencies, block_of(channels, frequencies),
    )  # fmt: skip
    library = _library()[0]
    assert library is not None
    tensors = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, *_tensors(layer), y))
    if y.numel() and library.harmconvert_factored(ctypes.byref(shape), *tensors, torch.get_num_threads()):
        raise RuntimeError("not enough memory for the responses of a tile")
    return y


def _tensors(layer: Packed) -> tuple[Tensor, ...]:
    """The tensors of a packed layer, in the order of factored.c (dataclasses.astuple would copy them)."""
    return layer.vertical, layer.horizontal, layer.vertical_of, layer.weights, layer.bias


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("HARMCONVERT_NATIVE", "1") == "0":
        return None, "HARMCONVERT_NATIVE=0"
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        return None, f"no compiled kernel ({first_line(RuntimeError(said)) or first_line(error)})"
    library.harmconvert_panel.restype = ctypes.c_int64
    library.harmconvert_factored.restype = ctypes.c_int
    library.harmconvert_factored.argtypes = [*[ctypes.c_void_p] * 8, ctypes.c_int]
    return library, None


def _built() -> Path:
    """The path of the compiled library, which is made first where it is not there yet."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source, runtime = SOURCE.read_bytes(), _openmp()
    # The macros say the compiler's version and all that -march=native stands for on this processor.
    macros = _call([*compiler, *FLAGS, "-E", "-dM", "-x", "c", os.devnull])
    key = hashlib.sha256(b"\0".join((source, macros, str(runtime).encode(), repr(FLAGS).encode()))).hexdigest()[:16]
    path = _own_folder() / f"factored-{key}.so"
    if path.exists():
        return path
    with TemporaryDirectory(dir=path.parent) as folder:
        made, objects = Path(folder) / path.name, str(Path(folder) / "factored.o")
        openmp = ["-fopenmp"] if sys.platform != "darwin" else []
        _call([*compiler, *FLAGS, *openmp, "-c", str(SOURCE), "-o", objects])
        # torch's own OpenMP runtime by its path: a second one would have threads of its own, at odds with torch's.
        _call([*compiler, "-shared", objects, "-o", str(made), *([str(runtime)] if runtime else openmp)])
        made.replace(path)
    return path


def _own_folder() -> Path:
    """The cache folder, where nobody else can put a library for us to load."""
    folder = cache_folder()
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others may write in {folder}: chmod go-w it, or name another with HARMCONVERT_CACHE")
    return folder


def _openmp() -> Path | None:
    folder = Path(torch.__file__).parent
    places = (folder / "lib", folder.parent / "torch.libs")
    found = (path for place in places for path in sorted(place.glob("lib[gi]omp*.so*")))
    return next(found, None) if sys.platform != "darwin" else None


def _call(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
