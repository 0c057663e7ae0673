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
    """How a file holds one tensor: the codec, the shape and dtype of the tensor once it is decoded, and what else the
    codec needs to decode it (``parameters``, JSON-able)."""

    codec: str
    version: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decoded_bytes(self) -> int:
        """The bytes of the tensor in memory."""
        return prod(self.shape) * self.dtype.itemsize


class Codec(ABC):
    """How one tensor is written to a file, and read back.

    ``plain`` codecs store a tensor of their dtype as it is: the file needs no entry for it. All others store one
    tensor of another shape or dtype under the same key, and the file's codec table holds an `Entry` for it.
    ``tolerance`` is the difference of a network's outputs, relative to the largest output, that storing its weights
    with this codec may make.
    """

    name: str
    version: int
    tolerance: float
    plain: bool = False

    def entry(self, tensor: Tensor) -> Entry:
        """Choose the parameters with which a tensor is to be stored."""
        return Entry(self.name, self.version, tuple(tensor.shape), tensor.dtype)

    @abstractmethod
    def stored(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype of the tensor in the file. A codec whose size depends on the values records the size in
        the entry's parameters."""

    def bytes(self, entry: Entry) -> int:
        """The bytes of the tensor in the file."""
        shape, dtype = self.stored(entry)
        return prod(shape) * dtype.itemsize

    @abstractmethod
    def encode(self, tensor: Tensor, entry: Entry) -> Tensor:
        """The tensor that is stored in the file."""

    @abstractmethod
    def decode(self, stored: Tensor, entry: Entry) -> Tensor:
        """The tensor of ``entry``'s shape and dtype. Encoding it again with the same entry gives the same bytes.

        Raises:
            ValueError: the stored values cannot be decoded.
        """

    def check(self, entry: Entry) -> None:
        """Raise ValueError unless the entry, which may come from any file, can be decoded without more memory than
        `Entry.decoded_bytes` and what is in proportion to it."""
        if entry.parameters:
            raise ValueError(f"unknown parameter {min(entry.parameters)!r:.80}")


CODECS: dict[tuple[str, int], Codec] = {}


def register(codec: Codec) -> None:
    """Make a codec known. Older versions of a codec stay registered, so that their files are read for good."""
    CODECS[codec.name, codec.version] = codec


def codec_of(entry: Entry) -> Codec:
    """The codec of an entry."""
    return CODECS[entry.codec, entry.version]
