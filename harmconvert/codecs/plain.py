"""Plain codecs: tensors stored as they are, in 32 or 16 bits or in any other dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec, Entry, codec_of


@dataclass(frozen=True)
class Plain(Codec):
    """A tensor stored in ``dtype``; None: in its own."""

    name: str
    dtype: torch.dtype | None
    tolerance: float
    version: int = 1
    plain: bool = True

    def entry(self, tensor: Tensor) -> Entry:
        return Entry(self.name, self.version, tuple(tensor.shape), self.dtype or tensor.dtype)

    def stored(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        return entry.shape, entry.dtype

    def encode(self, tensor: Tensor, entry: Entry) -> Tensor:
        return tensor.to(entry.dtype)

    def decode(self, stored: Tensor, entry: Entry) -> Tensor:
        return stored


# The tolerances with the whole basis: of float64 and float32 as the documentation promises; of 16 bits, the rounding of
# the coefficients bounds them, amplified layer by layer. Float64 weights are stored raw.
FLOAT32 = Plain("float32", torch.float32, 1e-5)
FLOAT16 = Plain("float16", torch.float16, 2e-2)
BFLOAT16 = Plain("bfloat16", torch.bfloat16, 1e-1)
RAW = Plain("raw", None, 1e-12)

# The dtypes of weights whose rounding a verification can tell apart.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BY_DTYPE = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
# The dtypes that a network can be stored in, by name.
FLOATS = {codec.name: dtype for dtype, codec in _BY_DTYPE.items()}


def plain_codec(dtype: torch.dtype) -> Plain:
    """The codec that stores tensors of a dtype as they are.

    >>> plain_codec(torch.float16).name, plain_codec(torch.int64).name
    ('float16', 'raw')
    """
    return _BY_DTYPE.get(dtype, RAW)


def stored_bytes(tensor: Tensor, entry: Entry | None = None) -> int:
    """The bytes of a tensor in a file: coded as ``entry`` says, or as it is.

    >>> stored_bytes(torch.zeros(3, 4, dtype=torch.float16))
    24
    """
    codec = plain_codec(tensor.dtype) if entry is None else codec_of(entry)
    return codec.bytes(codec.entry(tensor) if entry is None else entry)


def tolerance_of(dtype: torch.dtype, coded: Mapping[str, Entry] | None = None) -> float:
    """The relative difference of outputs that storing weights in a dtype, and some ``coded`` tensors, may make."""
    tolerances = [codec_of(entry).tolerance for entry in (coded or {}).values()]
    return max([plain_codec(dtype).tolerance, *tolerances])
