"""Store a network in 16 bits, and measure the effect on its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.codec import Codec, Entry, codec_of
from ..codecs.plain import FLOATS, plain_codec, tolerance_of
from ..errors import CheckError, InputError, UsageError
from ..network.comparison import greatest_difference
from ..network.copying import deep_copy
from ..network.exchange import in_sixteen_bits
from ..network.heads import compared_outputs, floating_tensors
from ..network.running import call, evaluating
from ..network.state import fill, tensors_of
from ..network.values import clone_tensors, match_dtype


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        UsageError: networks cannot be stored in this dtype.
    """
    if name not in FLOATS:
        raise UsageError(f"unknown dtype {name!r}: use one of {', '.join(FLOATS)}")
    return FLOATS[name]


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a network with its parameters and buffers rounded to ``dtype``.

    Integers, complex numbers and fitted bases are not rounded.

    Raises:
        InputError: a value is out of the dtype's range.
    """
    codec = plain_codec(dtype)
    small = deep_copy(model)._apply(
        lambda tensor: (
            _encoded_and_decoded(tensor, codec, codec.entry(tensor)) if tensor.is_floating_point() else tensor
        )
    )
    for key, tensor in tensors_of(small).items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta and not tensor.isfinite().all():
            before = tensors_of(model)[key]
            if before.isfinite().all():
                largest = before.abs().max().item()
                name, others = _name_and_alternatives(dtype)
                raise InputError(f"{key} has values up to {largest:.3g}, out of {name}'s range: use {others}")
    return small


def as_stored(model: nn.Module, entries: Mapping[str, Entry]) -> nn.Module:
    """Return a copy of a network in which the tensors with an entry have the values that are read back from a file."""
    copied = deep_copy(model)
    tensors = tensors_of(copied)
    fill(copied, {key: _encoded_and_decoded(tensors[key], codec_of(entry), entry) for key, entry in entries.items()})
    return copied


def _encoded_and_decoded(tensor: Tensor, codec: Codec, entry: Entry) -> Tensor:
    return codec.decode(codec.encode(tensor, entry), entry)


def in_float32(model: nn.Module) -> nn.Module:
    """Convert a network's 16-bit parameters and buffers to float32, in place: 16 bits are only for files."""
    return model.float() if in_sixteen_bits(model) else model


def check_rounding(model: nn.Module, small: nn.Module, inputs: Any) -> float:
    """Return the relative difference of outputs that rounding causes; both networks compute in float32.

    Raises:
        CheckError: the difference exceeds the tolerance of the dtype's codec.
    """
    networks = [deep_copy(network).float() for network in (model, small)]
    with evaluating(*networks):
        expected, actual = (_outputs(network, inputs) for network in networks)
    difference = greatest_difference(actual, expected)
    dtype = next((p.dtype for p in small.parameters() if p.is_floating_point()), torch.float32)
    if not difference <= tolerance_of(dtype):
        name, others = _name_and_alternatives(dtype)
        raise CheckError(
            f"rounded to {name} the outputs differ by {difference:.1e} of the largest, tolerance "
            f"{tolerance_of(dtype):.0e}; nothing was written: use {others}"
        )
    return difference


def _name_and_alternatives(dtype: torch.dtype) -> tuple[str, str]:
    """Return a dtype's name, and the names of dtypes with more range or precision."""
    return str(dtype).removeprefix("torch."), "bfloat16 or float32" if dtype == torch.float16 else "float32"


def _outputs(network: nn.Module, inputs: Any) -> list[Tensor]:
    return floating_tensors(
        compared_outputs(network, lambda: call(network, clone_tensors(match_dtype(inputs, network))))
    )
