"""The tensors of a checkpoint: as its file holds them, and as its network has them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..codecs.codec import Entry, codec_of
from ..codecs.table import Stored
from ..errors import HarmconvertWarning, InputError, first_line, shortened
from .weights import open_safetensors

# A file of a few bytes can claim a network of any size: it may take this much memory, and this many times the file's.
_LEAST_LIMIT, _MOST_PER_BYTE = 1 << 30, 64


def memory_limit(path: str | Path) -> int:
    """The bytes that the tensors of a file may take in memory, whatever the file says."""
    return _LEAST_LIMIT + _MOST_PER_BYTE * Path(path).stat().st_size


def stored_in(path: str | Path) -> dict[str, Stored]:
    """The shape and dtype of every tensor in a safetensors file; reads no tensor."""
    with open_safetensors(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  not a dict
        return {key: Stored(tuple(one.get_shape()), str(one.get_dtype())) for key, one in slices.items()}


def read_stored(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, as it holds them."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict


def encoded(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """Encode the tensors that have an entry; returns all tensors as a file holds them, and the entries that it needs.

    A tensor that its codec would change is stored as it is, with a warning: it has been changed since its entry was
    made, by training for example.
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
            f"{shortened(changed, 3)}: the values were changed after they were quantised, so the file holds them "
            "uncoded and is larger; convert the network again to code them",
            HarmconvertWarning,
            stacklevel=4,
        )
    return stored, kept


def decoded(stored: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Decode the tensors that have an entry; the inverse of `encoded`.

    Raises:
        InputError: the values of a tensor cannot be decoded.
    """
    tensors = dict(stored)
    for key, entry in entries.items():
        try:
            tensor = codec_of(entry).decode(stored[key], entry)
        except Exception as error:  # the values come from a file, and codecs differ in what they raise
            raise InputError(f"{key} cannot be decoded ({first_line(error)}): get the file again") from error
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise InputError(f"{key} is not what the codec table says once it is decoded: get the file again")
        tensors[key] = tensor
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values, on any device."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())
