"""The interface of a codec, and the registry of all codecs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """The entry of one tensor in a codec table: its codec, and the shape and dtype of the decoded tensor.

    ``parameters`` (JSON-able) are all other values that the codec needs to decode the tensor. ``stream`` is the tensor
    in the file, for a codec that cannot compute it from the values; it is not part of a codec table.
    """

    codec: str
    version: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stream: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def decoded_bytes(self) -> int:
        """Return the number of bytes of the decoded tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """How one tensor is written to a file and read back.

    A ``plain`` codec stores a tensor of its dtype unchanged, and the file needs no entry for it. Any other codec stores
    a tensor of another shape or dtype under the same key, and the file's codec table has an `Entry` for it.
    ``tolerance`` is the largest difference that this codec may make to a network's outputs, relative to the largest
    output. ``entropy_coded``: one wrong bit changes all values after it, so a file with a wrong checksum is refused.
    """

    name: str
    version: int
    tolerance: float
    plain: bool = False
    entropy_coded: bool = False

    def entry(self, tensor: Tensor) -> Entry:
        """Return the entry for a tensor, with the parameters chosen for it."""
        return Entry(self.name, self.version, tuple(tensor.shape), tensor.dtype)

    @abstractmethod
    def stored(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of the tensor in the file.

        If the size depends on the values, the codec records it in the entry's parameters.
        """

    def bytes(self, entry: Entry) -> int:
        """Return the number of bytes of the tensor in the file."""
        shape, dtype = self.stored(entry)
        return prod(shape) * dtype.itemsize

    @abstractmethod
    def encode(self, tensor: Tensor, entry: Entry) -> Tensor:
        """Return the tensor that is stored in the file."""

    @abstractmethod
    def decode(self, stored: Tensor, entry: Entry) -> Tensor:
        """Return the tensor with the shape and dtype of ``entry``; encoding it with ``entry`` gives the same bytes.

        Raises:
            ValueError: the stored values cannot be decoded.
        """

    def entry_to_json(self, entry: Entry) -> Any:
        """Return the entry as it is in the codec table of a file."""
        dtype = str(entry.dtype).removeprefix("torch.")
        return {"shape": list(entry.shape), "dtype": dtype, **entry.parameters}

    def fields(self, data: Any) -> Mapping[str, Any]:
        """Return the shape, the dtype and the parameters of an entry in a codec table; the data is not checked.

        Raises:
            ValueError: the data is not an entry of this codec.
        """
        if not isinstance(data, Mapping):
            raise ValueError("its entry is not an object")
        return data

    def check(self, entry: Entry) -> None:
        """Raise ValueError if the entry is invalid, or if decoding it would need much more than `Entry.decoded_bytes`.

        The entry may come from an untrusted file. The memory for decoding must be proportional to `decoded_bytes`.
        """
        if entry.parameters:
            raise ValueError(f"unknown parameter {min(entry.parameters)!r:.80}")


CODECS: dict[tuple[str, int], Codec] = {}


def register(codec: Codec) -> None:
    """Register a codec. Older versions of a codec stay registered, so that their files remain readable."""
    CODECS[codec.name, codec.version] = codec


def codec_of(entry: Entry) -> Codec:
    """Return the codec of an entry."""
    return CODECS[entry.codec, entry.version]
