"""The codec of packed vectors: numbers on a linear or a logarithmic grid, each in the same number of bits.

It is lossless. A vector whose values were rounded to a coarse grid before, such as the parameters of a batch norm
(`plan.precision.vectors`), needs few bits.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..documents import check, count
from ..errors import counted
from .codec import Codec, Entry
from .integers import MOST_INDEX, step_indices, step_sizes

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

# The prefix of a stream: the kind of the grid, the exponent of its step, the smallest number, and the bits of a number.
_PREFIX = struct.Struct("<BhiB")
LINEAR, LOGARITHMIC = 0, 1
_MOST_BITS, _MOST_EXPONENT = 31, 1100
# For fewer values, the entry of the codec table would need most of the bytes that are saved.
LEAST_VALUES = 32
# An entry is about so much longer than its key.
_ENTRY_BYTES = 16


class PackedCodec(Codec):
    """Stores a vector as numbers on a grid: multiples of 2^e, or powers of 2^(1/4).

    The grid follows from the values: it is the coarsest one that has them all.
    """

    name = "packed"
    version = 1
    tolerance = 0.0

    def entry(self, tensor: Tensor) -> Entry:
        """Return the entry of a vector.

        Raises:
            ValueError: the values have no common grid with numbers of 31 bits.
        """
        entry = Entry(self.name, self.version, tuple(tensor.shape), tensor.dtype, {"bytes": 0})
        stream = self.encode(tensor, entry)
        return replace(entry, parameters={"bytes": len(stream)}, stream=stream)

    def stored(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        return (int(entry.parameters["bytes"]),), torch.uint8

    def entry_to_json(self, entry: Entry) -> Any:
        """Return a list, because a network has many vectors: their length and bytes, and a dtype other than float32."""
        dtype = () if entry.dtype == torch.float32 else (str(entry.dtype).removeprefix("torch."),)
        return [*entry.shape, entry.parameters["bytes"], *dtype]

    def fields(self, data: Any) -> Mapping[str, Any]:
        if not isinstance(data, list) or len(data) not in (2, 3):
            raise ValueError("its entry is not a list of the length, the bytes and the dtype")
        return {"shape": data[:1], "bytes": data[1], "dtype": (*data[2:], "float32")[0]}

    def encode(self, tensor: Tensor, entry: Entry) -> Tensor:
        values = tensor.detach().to("cpu", torch.float64).numpy()
        kind, exponent, numbers = LOGARITHMIC, 0, _powers(values, tensor)
        if numbers is None:
            kind, (exponent, numbers) = LINEAR, _multiples(values)
        least = int(numbers.min())
        bits = (int(numbers.max()) - least).bit_length()
        if bits > _MOST_BITS or not -(2**31) <= least < 2**31:
            raise ValueError("the values have no common grid of this size")
        places = ((numbers - least)[:, None] >> np.arange(bits)).astype(np.uint8) & 1
        packed = np.packbits(places.ravel(), bitorder="little").tobytes()
        return torch.frombuffer(bytearray(_PREFIX.pack(kind, exponent, least, bits) + packed), dtype=torch.uint8)

    def decode(self, stored: Tensor, entry: Entry) -> Tensor:
        data, length = stored.numpy().tobytes(), entry.shape[0]
        if len(data) < _PREFIX.size:
            raise ValueError("the stream ends in its prefix")
        kind, exponent, least, bits = _PREFIX.unpack_from(data)
        if kind not in (LINEAR, LOGARITHMIC) or bits > _MOST_BITS or abs(exponent) > _MOST_EXPONENT:
            raise ValueError("its grid is unknown")
        if len(data) != _PREFIX.size + -(-length * bits // 8):
            raise ValueError(
                f"its {counted(len(data), 'byte')} do not hold {counted(length, 'number')} of {counted(bits, 'bit')}"
            )
        places = np.unpackbits(np.frombuffer(data, np.uint8, offset=_PREFIX.size), bitorder="little")
        if places[length * bits :].any():
            raise ValueError("the bits after its last number are not zero")
        numbers = np.full(length, least, np.int64)
        for bit in range(bits):
            numbers += places[bit : length * bits : bits].astype(np.int64) << bit
        if kind == LINEAR:
            with np.errstate(over="ignore"):  # infinite values are refused with the network
                values = np.ldexp(numbers.astype(np.float64), exponent)
        elif np.abs(numbers).max(initial=0) > MOST_INDEX:
            raise ValueError("a value is out of range")
        else:
            values = step_sizes(numbers.astype(np.int32))
        return torch.from_numpy(values).to(entry.dtype)

    def check(self, entry: Entry) -> None:
        if (parameters := {*entry.parameters}) != {"bytes"}:
            raise ValueError(f"its parameters are {sorted(parameters)!r:.80} instead of bytes")
        check(dict(entry.parameters), {"bytes": count}, self.name)
        if not entry.dtype.is_floating_point:
            raise ValueError(f"the dtype {entry.dtype} is not a floating-point one")
        if len(entry.shape) != 1 or 0 in entry.shape:
            raise ValueError(f"shape {list(entry.shape)[:8]} is not that of a vector")


PACKED = PackedCodec()


def packed_entry(key: str, tensor: Tensor) -> Entry | None:
    """Return the entry, with its stream, of a vector that needs fewer bytes packed than plain; else None."""
    if tensor.dim() != 1 or tensor.numel() < LEAST_VALUES or not tensor.is_floating_point() or tensor.is_meta:
        return None
    if not bool(torch.isfinite(tensor).all()):
        return None
    size = tensor.numel() * tensor.element_size()
    try:
        entry = PACKED.entry(tensor)
    except ValueError:
        return None
    return entry if PACKED.bytes(entry) + len(key) + _ENTRY_BYTES < size else None


def entry_in_file(key: str, tensor: Tensor, coded: Mapping[str, Entry]) -> Entry | None:
    """Return the entry of a tensor in a file with ``coded`` weights; None if it is stored plain."""
    return coded.get(key) or (packed_entry(key, tensor) if coded else None)


def _powers(values: Floats, tensor: Tensor) -> Numbers | None:
    """Return the indices of values that are powers of 2^(1/4) in the dtype of ``tensor``; None if not all are."""
    if not (values > 0).all():
        return None
    indices = step_indices(values)
    powers = torch.from_numpy(step_sizes(indices)).to(tensor.dtype)
    return indices.astype(np.int64) if torch.equal(powers, tensor.detach().cpu()) else None


def _multiples(values: Floats) -> tuple[int, Numbers]:
    """Return the largest exponent e for which all values are multiples of 2^e, and the multiples.

    >>> _multiples(np.array([0.75, -2.0]))
    (-2, array([ 3, -8]))

    Raises:
        ValueError: the multiples are not numbers of 31 bits.
    """
    mantissas, exponents = np.frexp(values[values != 0])
    if not mantissas.size:
        return 0, np.zeros(len(values), np.int64)
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    lowest_bits = (whole & -whole).astype(np.float64)
    exponent = int((exponents - 53 + np.log2(lowest_bits).astype(np.int64)).min())
    with np.errstate(over="ignore"):
        multiples = np.ldexp(values, -exponent)
    if abs(exponent) > _MOST_EXPONENT or np.abs(multiples).max() >= 2**_MOST_BITS:
        raise ValueError("the values have no common grid of this size")
    return exponent, multiples.astype(np.int64)
