"""Plain codecs: tensors stored without coding, in 32 bits, 16 bits or any other dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec, Entry, codec_of


@dataclass(frozen=True)
class Plain(Codec):
    """Stores a tensor in ``dtype``; None: in the tensor's own dtype."""

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


# The last number is the tolerance with the whole basis. For float64 (stored raw) and float32 it is the bound in the
# documentation; for 16 bits it follows from the rounding of the coefficients, amplified layer by layer.
FLOAT32 = Plain("float32", torch.float32, 1e-5)
FLOAT16 = Plain("float16", torch.float16, 2e-2)
BFLOAT16 = Plain("bfloat16", torch.bfloat16, 1e-1)
RAW = Plain("raw", None, 1e-12)

# The dtypes of weights that have different tolerances in a verification.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BY_DTYPE = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
# The dtypes that a network can be stored in, by name.
FLOATS = {codec.name: dtype for dtype, codec in _BY_DTYPE.items()}


def plain_codec(dtype: torch.dtype) -> Plain:
    """Return the codec that stores tensors of a dtype without coding.

    >>> plain_codec(torch.float16).name, plain_codec(torch.int64).name
    ('float16', 'raw')
    """
    return _BY_DTYPE.get(dtype, RAW)


def stored_bytes(tensor: Tensor, entry: Entry | None = None) -> int:
    """Return the bytes of a tensor in a file: coded by ``entry``, or plain if there is none.

    >>> stored_bytes(torch.zeros(3, 4, dtype=torch.float16))
    24
    """
    codec = plain_codec(tensor.dtype) if entry is None else codec_of(entry)
    return codec.bytes(codec.entry(tensor) if entry is None else entry)


def tolerance_of(dtype: torch.dtype, coded: Mapping[str, Entry] | None = None) -> float:
    """Return the relative difference that storing weights in a dtype and ``coded`` tensors may make to outputs."""
    tolerances = [codec_of(entry).tolerance for entry in (coded or {}).values()]
    return max([plain_codec(dtype).tolerance, *tolerances])
