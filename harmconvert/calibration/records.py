"""The settings of a calibration, and the record of what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..codecs.codec import Entry
from ..errors import UsageError, counted

# With ten positions per unknown, the error of a fitted linear model is about a tenth higher than the smallest possible.
ENOUGH_POSITIONS = 10

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings of a calibration.

    Args:
        damping: relative to the mean square of a layer's responses; None chooses it on held-back inputs.
        memory: bytes that one layer's equations may use; None uses half of the free memory.
        batch_norm: re-estimate batch-norm statistics if that brings the outputs nearer to the original's.
        refit: False does not change the coefficients.
        seed: seed of the sampled positions.
        inputs: the most inputs that are read (to the end of a batch), so that no whole training set is read.

    Raises:
        UsageError: a setting is out of its range.
    """

    damping: float | None = None
    memory: int | None = None
    batch_norm: bool = True
    refit: bool = True
    seed: int = 0
    inputs: int = 1024

    def __post_init__(self) -> None:
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping (={self.damping}) must be zero or more; leave it out to choose it automatically")
        if self.inputs < 1:
            raise UsageError(f"{counted(self.inputs, 'calibration input')}: there must be at least 1")
        if self.memory is not None and self.memory < 1 << 20:
            raise UsageError(f"calibration memory (={self.memory} bytes) must be at least a megabyte")


@dataclass(frozen=True)
class LayerCalibration:
    """The record of calibrating one truncated convolution, or several that share their coefficients.

    ``decision``: ``refit``; ``rescaled`` (the mean and variance of each channel were corrected); ``projection``
    (neither reduced the held-back error: the plain cut remains); ``failed`` (an error occurred: the plain cut remains).
    ``error_before``, ``error_after``: relative output errors (Frobenius norms) on held-back inputs. ``damping``:
    relative to the mean square of the responses. ``condition``: condition number of their second moments.
    ``positions``: number of positions in the fit. ``unknowns``: per output channel. ``inputs_enough``: the number of
    inputs that would give ten positions per unknown. ``why``: why the layer was not refitted. ``bits``: per weight, if
    the weights were coded; then ``error_after`` includes their rounding. ``shrinkage``: the share of the metric of the
    rounding that was not trusted, because it differs on held-back inputs. ``spectrum``: if the rank was reduced, the
    share of the power of the outputs that is outside the leading k directions, for k from 0 to the full rank in equal
    steps, in the metric in which the rank was reduced.
    """

    name: str
    decision: str
    solver: str | None = None
    damping: float | None = None
    condition: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    positions: int = 0
    unknowns: int = 0
    inputs: int = 0
    inputs_enough: int = 0
    seconds: float = 0.0
    why: str | None = None
    bits: float | None = None
    shrinkage: float | None = None
    spectrum: tuple[float, ...] | None = None

    @property
    def positions_per_unknown(self) -> float:
        """Return the number of positions in the fit for each unknown."""
        return self.positions / max(self.unknowns, 1)

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON, without ``spectrum`` if there is none."""
        record = {**asdict(self), "positions_per_unknown": self.positions_per_unknown}
        if self.spectrum is None:
            del record["spectrum"]
        return record


@dataclass(frozen=True)
class Calibration:
    """The record of calibrating a network.

    ``inputs``, ``held_back``: number of inputs, and of those that were held back.
    ``plain_divergence``, ``refit_divergence``, ``divergence``: how far the outputs are from the original's on held-back
    inputs, for the plain cut, after the refit, and at the end. This is the mean KL divergence of a classifier's
    probabilities in nats, or the relative squared difference for other networks; None if outputs cannot be compared.
    ``incomparable``: why outputs cannot be compared.
    ``kept``: the share of the refit's change that was kept: 1 unless the whole change made the outputs worse than the
    plain cut. ``batch_norms``: number of re-estimated batch norms.
    ``changed``: the keys of the changed tensors, each with the sha256 of its new values.
    ``fallbacks``: each faster method that was not used, and why; they change the time, not the result.
    ``plain_agreement``, ``agreement``: the share of held-back inputs with the same top-1 class as the original, for the
    plain cut and at the end; None if outputs are not logits.
    ``coded``: the entries of the coded weights, by key; they are not part of the JSON.
    """

    layers: tuple[LayerCalibration, ...]
    inputs: int
    held_back: int
    plain_divergence: float | None = None
    refit_divergence: float | None = None
    divergence: float | None = None
    kept: float = 1.0
    batch_norms: int = 0
    notes: tuple[str, ...] = ()
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    changed: Mapping[str, str] = field(default_factory=dict)
    incomparable: str | None = None
    plain_agreement: float | None = None
    agreement: float | None = None
    fallbacks: tuple[str, ...] = ()
    coded: Mapping[str, Entry] = field(default_factory=dict, repr=False, compare=False)

    @property
    def failed(self) -> tuple[LayerCalibration, ...]:
        """Return the layers whose calibration failed with an error."""
        return tuple(layer for layer in self.layers if layer.decision == "failed")

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        record = asdict(replace(self, coded={}, layers=()))
        del record["coded"]
        return {**record, "layers": [layer.to_json() for layer in self.layers]}
