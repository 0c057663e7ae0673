"""What calibration is asked for, and what it says that it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError, counted

# Fitted on ten positions per unknown, a linear model's error is about a tenth over the best one's.
ENOUGH_POSITIONS = 10

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationSettings:
    """``damping``: fixed, relative to the mean square of a layer's responses; None chooses on held-back inputs.
    ``memory``: bytes that one layer's equations may take; None takes half of what is free. ``batch_norm``: re-estimate
    batch-norm statistics where that helps. ``refit``: False leaves the coefficients alone. ``seed``: of the positions
    sampled. ``inputs``: no more than so many are read (to the end of a batch), lest a whole training set is."""

    damping: float | None = None
    memory: int | None = None
    batch_norm: bool = True
    refit: bool = True
    seed: int = 0
    inputs: int = 1024

    def __post_init__(self) -> None:
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping (={self.damping}) must be zero or more; leave it out to have it chosen")
        if self.inputs < 1:
            raise UsageError(f"{counted(self.inputs, 'calibration input')}: there must be at least 1")
        if self.memory is not None and self.memory < 1 << 20:
            raise UsageError(f"calibration memory (={self.memory} bytes) must be at least a megabyte")


@dataclass(frozen=True)
class LayerCalibration:
    """What calibration made of one truncated convolution (or of several that share their coefficients).

    ``decision``: ``refit``; ``rescaled`` (each channel's mean and variance repaired); ``projection`` (neither lowered
    the held-back error, so the plain cut stays); ``failed`` (the plain cut stays because something is wrong). Errors
    are relative output errors on held-back inputs, Frobenius norms. ``damping`` is relative to the mean square of the
    responses; ``condition`` that of their second moments. ``positions`` were fitted on, of ``unknowns`` per output
    channel; ``inputs_enough`` would have given ten positions per unknown. ``why`` explains what was not done.
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

    @property
    def positions_per_unknown(self) -> float:
        """How well the fit was determined."""
        return self.positions / max(self.unknowns, 1)


@dataclass(frozen=True)
class Calibration:
    """What was done to a whole network. Divergences are of its outputs from the original's on held-back inputs: mean
    KL divergence of a classifier's probabilities (nats), for others the relative squared difference; None where
    outputs cannot be compared. ``kept`` is the share of the refit's change that was taken (1 unless that made the
    outputs worse than the plain cut). ``changed`` has the keys of the tensors written, each with the
    sha256 of what was written. ``incomparable`` says why outputs could not be compared. ``plain_agreement`` and
    ``agreement``: the shares of held-back inputs on which the plain cut, and the network now, have the same top-1 class
    as the original (None where outputs are no logits)."""

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

    @property
    def failed(self) -> tuple[LayerCalibration, ...]:
        """Layers that something is wrong with."""
        return tuple(layer for layer in self.layers if layer.decision == "failed")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        layers = [{**asdict(r), "positions_per_unknown": r.positions_per_unknown} for r in self.layers]
        return {**asdict(self), "layers": layers}
