"""Train a network whose weights are coded so that their integers stay: each row of a weight has only a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..codecs.codec import Entry, codec_of
from ..codecs.integers import Layout, Quantised
from ..codecs.quantised import layout_of, quantised_entry
from ..codecs.stream import unpack
from ..network.state import tensors_of


@dataclass(frozen=True)
class _Weight:
    """A coded weight: its parameter, the integers, and their values without scales (groups, rows, columns)."""

    parameter: nn.Parameter
    layout: Layout
    quantised: Quantised
    values_GON: Tensor

    @torch.no_grad()
    def scales(self) -> Tensor:
        """Return the scale of each row that is nearest to the present values (groups, rows)."""
        values_GON = self.values_GON.to(self.parameter.device)
        now_GON = cast(Any, self.layout).to_matrices(self.parameter.detach().contiguous()).to(values_GON)
        squares_GO = values_GON.square().sum(-1)
        scales_GO = (now_GON * values_GON).sum(-1) / squares_GO.clamp_min(torch.finfo(squares_GO.dtype).tiny)
        return torch.where(squares_GO > 0, scales_GO, 1.0)

    @torch.no_grad()
    def project(self) -> None:
        """Replace the values by the nearest ones that are a scale for each row times the coded values."""
        scaled_GON = self.values_GON.to(self.parameter.device) * self.scales()[..., None]
        self.parameter.copy_(cast(Any, self.layout).from_matrices(scaled_GON))


class CodedRows:
    """The coded weights of a network in training.

    Args:
        entries: the codec entries of the weights with their streams, by key.
    """

    def __init__(self, model: nn.Module, entries: Mapping[str, Entry]) -> None:
        tensors = tensors_of(model, keep_vars=True)
        self._weights = {
            key: _weight(parameter, entry)
            for key, entry in entries.items()
            if isinstance(parameter := tensors.get(key), nn.Parameter) and entry.stream is not None
        }

    def project(self) -> None:
        """Let every coded weight be a scale for each row times its coded values; call it after each training step."""
        for weight in self._weights.values():
            weight.project()

    def entries(self) -> dict[str, Entry]:
        """Set the weights to values that a file can hold exactly; return their entries with the new scales."""
        entries = {}
        for key, weight in self._weights.items():
            scales_GO = weight.scales().to("cpu", torch.float32).numpy()
            before_GO = weight.quantised.scales_GO
            scales_GO = scales_GO if before_GO is None else scales_GO * before_GO
            scaled = replace(weight.quantised, scales_GO=scales_GO.astype(np.float32))
            entry = quantised_entry(scaled, weight.layout, weight.parameter.dtype)
            assert entry.stream is not None
            with torch.no_grad():
                weight.parameter.copy_(codec_of(entry).decode(entry.stream, entry))
            entries[key] = entry
        return entries


def _weight(parameter: nn.Parameter, entry: Entry) -> _Weight:
    assert entry.stream is not None
    layout = layout_of(entry)
    quantised = unpack(entry.stream.numpy().tobytes(), layout)
    return _Weight(parameter, layout, quantised, torch.from_numpy(quantised.values()).float())
