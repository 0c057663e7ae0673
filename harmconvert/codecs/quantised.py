"""The codec of quantised tensors: integers times steps, entropy coded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..documents import check, count
from .codec import Codec, Entry
from .integers import Layout, Quantised, step_indices
from .stream import pack, unpack

# The parameters of an entry; the last two are left out if they have these values.
_PARAMETERS = {"bytes": count, "groups": count, "transposed": bool}
_DEFAULTS = {"groups": 1, "transposed": False}
# `QuantisedCodec.entry` makes about this many steps of the largest value of a row.
_STEPS = 127


class QuantisedCodec(Codec):
    """Stores a floating-point tensor as integers times steps, see `Quantised`, in one entropy coded stream.

    Integers and steps cannot be computed from the values, so an entry contains its stream (`Entry.stream`), and
    `encode` returns this stream. The writer of a file must check that the stream still decodes to the tensor.
    """

    name = "quantised"
    version = 1
    # What the steps change is decided before a tensor gets an entry; the codec itself changes nothing.
    tolerance = 0.0
    entropy_coded = True

    def entry(self, tensor: Tensor) -> Entry:
        """Return an entry that rounds every value to one of about 255 multiples of a step for its row."""
        layout = Layout(tuple(tensor.shape))
        values_GON = layout.to_matrices(tensor.detach().to("cpu", torch.float64).numpy())
        largest_GO = np.abs(values_GON).max(-1, initial=0)
        row_steps_GO = step_indices(np.where(largest_GO > 0, largest_GO, 1.0) / _STEPS)
        zeros_GN = np.zeros(values_GON.shape[::2], np.int32)
        coarse = Quantised(np.zeros(values_GON.shape, np.int32), zeros_GN, row_steps_GO)
        integers_GON = np.rint(values_GON / coarse.steps()).astype(np.int32)
        return quantised_entry(Quantised(integers_GON, zeros_GN, row_steps_GO), layout, tensor.dtype)

    def stored(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        return (int(entry.parameters["bytes"]),), torch.uint8

    def encode(self, tensor: Tensor, entry: Entry) -> Tensor:
        """Return the stream of the entry.

        Raises:
            ValueError: the entry has no stream.
        """
        if entry.stream is None:
            raise ValueError("the entry has no stream")
        return entry.stream

    def decode(self, stored: Tensor, entry: Entry) -> Tensor:
        layout = layout_of(entry)
        values = unpack(stored.numpy().tobytes(), layout).values()
        return torch.from_numpy(layout.from_matrices(values)).to(entry.dtype)

    def check(self, entry: Entry) -> None:
        parameters = dict(entry.parameters)
        if unknown := parameters.keys() - _PARAMETERS.keys():
            raise ValueError(f"unknown parameter {min(unknown)!r:.80}")
        check({**_DEFAULTS, **parameters}, _PARAMETERS, self.name)
        layout = layout_of(entry)
        if not entry.dtype.is_floating_point:
            raise ValueError(f"the dtype {entry.dtype} is not a floating-point one")
        if not entry.shape or 0 in entry.shape or layout.groups < 1 or entry.shape[0] % layout.groups:
            raise ValueError(f"shape {list(entry.shape)[:8]} does not have {layout.groups} groups of rows")


QUANTISED = QuantisedCodec()


def layout_of(entry: Entry) -> Layout:
    """Return how the integers of an entry are arranged."""
    parameters: Mapping[str, Any] = {**_DEFAULTS, **entry.parameters}
    return Layout(tuple(entry.shape), parameters["groups"], parameters["transposed"])


def quantised_entry(quantised: Quantised, layout: Layout, dtype: torch.dtype) -> Entry:
    """Return the entry, with its stream, of a tensor that has the values of ``quantised`` in ``dtype``.

    Raises:
        ValueError: an integer or a step is out of range.
    """
    stream = torch.frombuffer(bytearray(pack(quantised, layout)), dtype=torch.uint8)
    return replace(entry_of_size(len(stream), layout, dtype), stream=stream)


def entry_of_size(size: int, layout: Layout, dtype: torch.dtype) -> Entry:
    """Return the entry of a tensor whose stream has this number of bytes, without the stream."""
    parameters: dict[str, Any] = {"bytes": size}
    for key, value in (("groups", layout.groups), ("transposed", layout.transposed)):
        if value != _DEFAULTS[key]:
            parameters[key] = value
    return Entry(QUANTISED.name, QUANTISED.version, layout.shape, dtype, parameters)


def zero_share(entry: Entry) -> float:
    """Return the share of the integers of an entry, with its stream, that are zero."""
    assert entry.stream is not None
    return float((unpack(entry.stream.numpy().tobytes(), layout_of(entry)).integers_GON == 0).mean())
