"""What several calibrations of one network on the same inputs have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..network.exchange import in_precision, in_sixteen_bits
from ..network.layers import convolutions, weighted_layers
from ..network.running import unchanged
from .cuts import WholeLayer
from .divergence import Divergence
from .inputs import CalibrationSet, calibration_set
from .memory_format import with_best_memory_format
from .reading import in_runnable_precision
from .records import CalibrationSettings
from .repeatability import check_repeatability
from .sensitivity import effects_of_outputs


@dataclass(frozen=True)
class CalibrationContext:
    """What several calibrations of one original network on the same inputs have in common.

    ``original``: the network, or a float32 copy if it is stored in 16 bits and runs only in float32 (``precise``).
    ``data``: the calibration set. ``compare``: compares outputs with those of the original on held-back inputs.
    ``whole``: equations of uncut layers, by name, for calibrations in which only one layer is cut.
    ``effects``: how much errors of the layers' outputs change those of the network, once they are measured.
    """

    original: nn.Module
    data: CalibrationSet
    compare: Divergence
    whole: Mapping[str, WholeLayer] = field(default_factory=dict)
    precise: bool = False
    effects: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, original: nn.Module, batches: Iterable[Any], settings: CalibrationSettings) -> CalibrationContext:
        """Read the calibration set and make a context without equations of layers; see `calibrate` for errors."""
        runnable, batches = in_runnable_precision(original, batches)
        precise, original = runnable is not original, runnable
        with unchanged(original):
            data = with_best_memory_format(original, calibration_set(batches, settings.inputs, original))
            data = replace(data, runs=check_repeatability(original, convolutions(original), data.probe))
            return cls(original, data, Divergence(original, data.held, undo=True), precise=precise)

    def measure_effects(self, seed: int) -> tuple[str, ...]:
        """Measure ``effects`` if this was not done before; return a note if it fails."""
        if self.effects:
            return ()
        try:
            self.effects.update(effects_of_outputs(self.original, weighted_layers(self.original), self.data.fit, seed))
        except Exception as error:  # such as a network that runs without gradients
            why = f"the effect of errors on the outputs could not be measured ({first_line(error)})"
            return (f"{why}: ranks are fitted to each layer alone",)
        return ()

    def runnable(self, network: nn.Module) -> nn.Module:
        """Return a network made from the original, or a float32 copy of it if the original runs only in float32."""
        return in_precision(network, torch.float32) if self.precise and in_sixteen_bits(network) else network
