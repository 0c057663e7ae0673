"""Digests of named tensors, from their names, dtypes, shapes and bytes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for part in _parts(tensors):
        digest.update(part)
    return digest.hexdigest()


def tensors_crc32(tensors: Mapping[str, Tensor], before: bytes = b"") -> str:
    """Return the CRC-32 of the bytes ``before`` and of the data that `tensors_sha256` hashes.

    It is faster and detects accidental damage, but not a deliberate change.
    """
    checksum = zlib.crc32(before)
    for part in _parts(tensors):
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for key in sorted(tensors):  # one by one, because the mapping may read them from a file
        tensor = tensors[key]
        # A file cannot hold a name with lone surrogates, but a network can have one.
        yield f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass")
        plain = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        plain = plain.dequantize() if plain.is_quantized else plain  # reading quantised storage crashes the process
        flat = plain.cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy()
