"""Digests of tensors: their names, dtypes, shapes and bytes."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of named tensors: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for part in _parts(tensors):
        digest.update(part)
    return digest.hexdigest()


def tensors_crc32(tensors: Mapping[str, Tensor], before: bytes = b"") -> str:
    """The CRC-32 of some bytes and then of what `tensors_sha256` hashes: it reports damage, not intent, but is
    faster."""
    checksum = zlib.crc32(before)
    for part in _parts(tensors):
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for key, tensor in sorted(tensors.items()):
        # A file cannot hold a name with lone surrogates, but a network can have one.
        yield f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass")
        plain = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        plain = plain.dequantize() if plain.is_quantized else plain  # reading their storage ends the process
        flat = plain.cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy()
