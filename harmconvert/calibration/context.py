"""What several calibrations of one network on the same inputs have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line, shortened
from ..layers.ranked import channels_of, groups_of
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

# The effects of a layer with more outputs in a group are not measured: they need the square of this number of values.
MOST_OUTPUTS = 4096


@dataclass
class _Effects:
    """How much errors of the layers' outputs change those of the network, once this is measured."""

    by_name: dict[str, Tensor] = field(default_factory=dict)
    measured: bool = False
    failure: str = ""


@dataclass(frozen=True)
class CalibrationContext:
    """What several calibrations of one original network on the same inputs have in common.

    ``original``: the network, or a float32 copy if it is stored in 16 bits and runs only in float32 (``precise``).
    ``data``: the calibration set. ``compare``: compares outputs with those of the original on held-back inputs.
    ``whole``: equations of uncut layers, by name, for calibrations in which only one layer is cut. ``probe``: only the
    divergence of one cut is asked for, so ranks are reduced in one metric only.
    """

    original: nn.Module
    data: CalibrationSet
    compare: Divergence
    whole: Mapping[str, WholeLayer] = field(default_factory=dict)
    precise: bool = False
    probe: bool = False
    _effects: _Effects = field(default_factory=_Effects)

    @classmethod
    def of(cls, original: nn.Module, batches: Iterable[Any], settings: CalibrationSettings) -> CalibrationContext:
        """Read the calibration set and make a context without equations of layers; see `calibrate` for errors."""
        runnable, batches = in_runnable_precision(original, batches)
        precise, original = runnable is not original, runnable
        with unchanged(original):
            data = with_best_memory_format(original, calibration_set(batches, settings.inputs, original))
            data = replace(data, runs=check_repeatability(original, convolutions(original), data.probe))
            return cls(original, data, Divergence(original, data.held, undo=True), precise=precise)

    def effects_on(self, names: Collection[str], seed: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Return the effects of the layers' outputs, and a note if some of those in ``names`` are not known.

        They are measured for all layers when they are first asked for.
        """
        effects = self._effects
        if not effects.measured:
            effects.measured = True
            layers = {
                name: layer
                for name, layer in weighted_layers(self.original).items()
                if channels_of(layer)[1] // groups_of(layer) <= MOST_OUTPUTS
            }
            try:
                effects.by_name = effects_of_outputs(self.original, layers, self.data.fit, seed)
            except Exception as error:  # such as a network that runs without gradients
                effects.failure = f": {first_line(error)}"
        if not (missing := [name for name in names if name not in effects.by_name]):
            return effects.by_name, ()
        what = f"the effect of errors on the outputs is not known for {shortened(missing, 5)}{effects.failure}"
        return effects.by_name, (f"{what}; the ranks of these layers are fitted to each layer alone",)

    def runnable(self, network: nn.Module) -> nn.Module:
        """Return a network made from the original, or a float32 copy of it if the original runs only in float32."""
        return in_precision(network, torch.float32) if self.precise and in_sixteen_bits(network) else network
