"""The tensors of a checkpoint: encoded in its file, decoded in its network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..codecs.codec import Entry, codec_of
from ..codecs.packed import packed_entry
from ..codecs.table import Stored
from ..errors import HarmconvertWarning, InputError, first_line, shortened
from .weights import open_safetensors

# A file of a few bytes can claim a network of any size. Its tensors may need this much memory, plus this many bytes for
# each byte of the file.
_LEAST_LIMIT, _MOST_PER_BYTE = 1 << 30, 64


def memory_limit(path: str | Path) -> int:
    """Return the most bytes that the tensors of a file may need in memory."""
    return _LEAST_LIMIT + _MOST_PER_BYTE * Path(path).stat().st_size


def stored_tensors(path: str | Path) -> dict[str, Stored]:
    """Return the shape and dtype of every tensor in a safetensors file; read no values."""
    with open_safetensors(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
        return {key: Stored(tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()}


def read_stored(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, without decoding them."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, without decoding them; each is read when it is used, and not kept."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._keys = path, tuple(stored_tensors(path))

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        with open_safetensors(self._path) as file:
            return cast(Tensor, file.get_tensor(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def encode_tensors(
    tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Encode the tensors that have an entry; return all tensors for the file, and the entries that it needs.

    If there are entries, vectors are packed, too (`with_packed`).

    A tensor is stored plain, with a warning, if its codec would change it: its values were changed after its entry was
    made, for example by training.
    """
    stored, kept, changed = dict(tensors), dict[str, Entry](), []
    for key, entry in entries.items():
        if key not in tensors:
            continue
        codec, tensor = codec_of(entry), tensors[key].cpu()
        try:
            coded = codec.encode(tensor, entry)
            same = equal(codec.decode(coded, entry), tensor)
        except ValueError:
            same = False
        if same:
            stored[key], kept[key] = coded.contiguous(), entry
        else:
            changed.append(key)
    if changed:
        warnings.warn(
            f"{shortened(changed, 3)}: the values were changed after they were quantised, so they are stored uncoded "
            "and the file is larger; convert the network again to code them",
            HarmconvertWarning,
            stacklevel=4,
        )
    return with_packed(stored, kept)


def with_packed(
    stored: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Pack the vectors of a file with coded tensors where this saves bytes; return its tensors and entries."""
    packed = {
        key: entry
        for key, tensor in (stored.items() if entries else ())
        if key not in entries and (entry := packed_entry(key, tensor)) is not None
    }
    streams = {key: entry.stream for key, entry in packed.items() if entry.stream is not None}
    return {**stored, **streams}, {**entries, **packed}


def decode_tensors(stored: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Decode the tensors that have an entry; inverse of `encode_tensors`.

    Raises:
        InputError: the values of a tensor cannot be decoded.
    """
    tensors = dict(stored)
    for key, entry in entries.items():
        try:
            tensor = codec_of(entry).decode(stored[key], entry)
        except Exception as error:  # the values come from a file, and each codec raises other exceptions
            raise InputError(f"{key} cannot be decoded ({first_line(error)}): get the file again") from error
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise InputError(
                f"the decoded {key} does not have the shape and dtype of the codec table: get the file again"
            )
        tensors[key] = tensor
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and values; they may be on different devices."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
