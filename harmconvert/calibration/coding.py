"""Code the weights of a network on calibration inputs: choose the distortion of each weight, and round with feedback.

The level of a row is the squared error of its output in each direction. It is one number for the whole network, divided
by the measured effect of the row's errors on the network's outputs (`sensitivity`). The number follows from the wanted
bits. It is corrected after each weight, because the bits of a weight are known only when it is coded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..codecs.codec import Entry
from ..errors import first_line
from ..kernels.quantisation import row_bits
from ..network.distributed import from_first_rank
from ..plan import CodedWeight, Plan, coded_weights
from .coding_metrics import ErrorMetric, identity, measured_moments, moments_of, pooled, spread_columns
from .equations import Problem
from .inputs import CalibrationSet
from .limits import return_freed_memory
from .records import LayerCalibration, Progress
from .sensitivity import squared_changes
from .weight_coding import (
    MOST_WEIGHT_BITS,
    Coded,
    Floats,
    Shrinkage,
    best_shrinkage,
    code_weight,
    column_variances,
)

log = logging.getLogger(__name__)

# If errors on the inputs that are held back are larger by more than this on average, the inputs lack variety.
MOST_SURPRISE = 1.5
# Rounding needs up to this many bits per weight more than the bound: all of them from 2.8 bits up, none below 0.8.
_EXCESS, _EXCESS_FROM, _EXCESS_OVER = 0.27, 0.8, 2.0
# Bits of the steps and scales of each column and each row, and the most of them per weight.
_SIDE_BITS, _MOST_SIDE_BITS = (1.5, 3.0), 0.5
# The prediction is corrected by the weights that are coded already: fully if they are more than this share of all.
_TRUST_AFTER = 0.1
# The correction changes the level by at most this factor: a quarter of a bit.
_MOST_CHANGE = 2**0.5
# Levels at which the bits of a row are computed, relative to the mean power of its outputs.
_GRID = tuple(4.0**-k for k in range(-2, 10))
# Number of random errors of each weight, and the level at which they are drawn.
_ERRORS, _ERROR_LEVEL = 3, 2.0**-6
# Errors of coded weights are not small. Their effect on a divergence is nearer to that of small errors on probabilities
# at this temperature: classes that are unlikely now can become likely.
_TEMPERATURE = 2.0
# The measured effects of the rows of one weight are brought nearer to their mean, and limited to this factor.
_ROW_EXPONENT, _ROW_LIMIT = 0.8, 16.0
# The table of bits by the logarithm of the level: the distance of its entries, and how far it goes below and above the
# known levels.
_TABLE_STEP, _TABLE_BELOW, _TABLE_ABOVE = 0.2, 12.0, 4.0
# A number of bits for a single weight is met within this share.
_NEAR = 0.02
# The shrinkage is chosen on at most about so many columns of a weight.
_MOST_COLUMNS = 1024


@dataclass
class _State:
    """What is known about a weight before it is coded.

    ``moments``: in float32, because those of all weights are in memory. ``measured``: they are measured on inputs.
    ``log_effects_GO``: logarithm of the squared change of the outputs for a unit of squared error in each direction of
    a row. ``log_levels``, ``bits_GL``: logarithms of levels, ascending, and the bits of one row at each of them.
    """

    weight: CodedWeight
    moments: ErrorMetric
    log_levels: Floats
    bits_GL: Floats
    log_effects_GO: Floats
    shrinkage: Shrinkage
    measured: bool = True

    def bits_at(self, log_level: float) -> float:
        """Return the bits of the whole weight if the outputs have this squared error for each direction."""
        grid, bits_GL = self.log_levels, self.bits_GL
        x_GO = log_level - self.log_effects_GO
        place_GO = np.clip(np.searchsorted(grid, x_GO), 1, len(grid) - 1)
        # Outside the grid this extrapolates.
        share_GO = (x_GO - grid[place_GO - 1]) / (grid[place_GO] - grid[place_GO - 1])
        left, right = (np.take_along_axis(bits_GL, place_GO - side, 1) for side in (1, 0))
        bits_GO = np.maximum(left + share_GO * (right - left), 0) / self.weight.layout.columns
        excess_GO = _EXCESS * np.clip((bits_GO - _EXCESS_FROM) / _EXCESS_OVER, 0, 1)
        return float((bits_GO + excess_GO).sum()) * self.weight.layout.columns + self.side_bits

    @property
    def side_bits(self) -> float:
        """Return about how many bits the steps and scales of the weight need."""
        layout = self.weight.layout
        side = layout.groups * (_SIDE_BITS[0] * layout.columns + _SIDE_BITS[1] * layout.rows)
        return min(side, _MOST_SIDE_BITS * self.weight.count)


class _Rates:
    """The bits of several weights together as a function of the level, in a table.

    So the level for the weights that are left is found in a time that does not depend on their number.
    """

    def __init__(self, states: Mapping[str, _State]) -> None:
        low = min(s.log_levels[0] + s.log_effects_GO.min() for s in states.values()) - _TABLE_BELOW
        high = max(s.log_levels[-1] + s.log_effects_GO.max() for s in states.values()) + _TABLE_ABOVE
        self.log_levels = np.arange(low, high + _TABLE_STEP, _TABLE_STEP)
        self._bits = {key: np.array([s.bits_at(x) for x in self.log_levels]) for key, s in states.items()}
        self._total = np.sum(list(self._bits.values()), axis=0)

    def remove(self, key: str) -> None:
        """Leave out a weight that is coded."""
        self._total = self._total - self._bits.pop(key, 0.0)

    def level_at(self, bits: float) -> float:
        """Return the level at which the weights together have this number of bits."""
        return math.exp(np.interp(-bits, -self._total, self.log_levels))


@dataclass
class Coder:
    """Codes the weights of a network one after the other. Make it with `Coder.measured`."""

    states: dict[str, _State]
    results: dict[str, Coded] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _first_level: float = 0.0
    _rates: _Rates | None = None
    _excess: tuple[float, float] = (0.0, 0.0)  # bits above the prediction, and the weights for which it was seen

    @property
    def entries(self) -> dict[str, Entry]:
        """Return the entries of the weights that are coded, by key."""
        return {key: coded.entry for key, coded in self.results.items()}

    @classmethod
    def measured(
        cls,
        network: nn.Module,
        plan: Plan,
        data: CalibrationSet,
        seed: int,
        memory: int,
        progress: Progress,
    ) -> Coder:
        """Measure the metric and the effect of every weight that the plan codes."""
        weights = coded_weights(network, plan)
        states, errors = {}, {}
        for number, (weight, moments) in enumerate(measured_moments(network, weights, data, seed, memory)):
            progress(number, len(weights), f"measuring {weight.names[0]}")
            if isinstance(moments, str):
                log.info("%s is coded without a metric: %s", weight.key, moments)
            fit, held = (identity(weight), None) if isinstance(moments, str) else moments
            states[weight.key], errors[weight.key] = _state(weight, fit, held, seed + number)
            states[weight.key].measured = held is not None
        return_freed_memory()
        coder = cls(states)
        coder._check_variety()
        coder._measure_effects(network, data, errors, seed, progress)
        return coder

    def _check_variety(self) -> None:
        """Note if the metrics do not hold on the inputs that are held back."""
        measured = [state for state in self.states.values() if state.measured]
        count = sum(state.weight.count for state in measured)
        surprise = sum(state.weight.count * math.log(state.shrinkage.surprise) for state in measured) / max(count, 1)
        if surprise > math.log(MOST_SURPRISE):
            self.notes.append(
                "the calibration inputs lack variety: rounding errors are "
                f"{math.exp(surprise):.1f} times as large on the inputs held back as on those for the fit; give more "
                "inputs that show other things, or more bits"
            )

    def _measure_effects(
        self, network: nn.Module, data: CalibrationSet, errors: Mapping[str, Tensor], seed: int, progress: Progress
    ) -> None:
        def changes(key: str, gradient: Tensor) -> Tensor:
            state = self.states[key]
            layout = state.weight.layout
            values = np.ascontiguousarray(layout.to_matrices(gradient.to("cpu", torch.float32).numpy()))
            projected_DBO = (state.moments.blocks(torch.from_numpy(values)) * errors[key]).sum(-1)
            projected_DGO = projected_DBO.unflatten(1, (layout.groups, -1)).sum(2)
            return projected_DGO.square().mean(0).double()

        def tick(done: int, total: int) -> None:
            progress(done, total, "measuring the effect of errors")

        parameters = {key: state.weight.parameter for key, state in self.states.items()}
        try:
            effects = squared_changes(network, parameters, data.fit, changes, seed, tick, _TEMPERATURE)
        except Exception as error:  # such as a network that runs without gradients
            self.notes.append(
                f"the effect of errors on the outputs could not be measured ({first_line(error)}): all layers get the "
                "same relative error"
            )
            effects = {}
        known, unknown = [], []
        for key, state in self.states.items():
            own = effects.get(key)
            if own is None or not bool(own.isfinite().all()) or not float(own.sum()) > 0:
                state.log_effects_GO = _relative_effects(state)
                unknown.append(state)
            else:
                state.log_effects_GO = _smoothed(own.numpy() / state.weight.layout.columns)
                known.append(state)
        if known and unknown:
            # Layers without an effect, or that do not run, get the mean relative error of the others.
            offsets = [float((state.log_effects_GO - _relative_effects(state)).mean()) for state in known]
            offset = np.average(offsets, weights=[state.weight.count for state in known])
            for state in unknown:
                state.log_effects_GO = state.log_effects_GO + offset

    def level_of(self, key: str) -> float:
        """Return the level for the weight that is coded next."""
        state = self.states[key]
        seen_bits, seen = self._excess
        excess = seen_bits / (seen + _TRUST_AFTER * sum(state.weight.count for state in self.states.values()))
        if not state.weight.bits.shared:
            return _Rates({key: state}).level_at((state.weight.bits.bits - excess) * state.weight.count)
        shared = {k: s for k, s in self.states.items() if s.weight.bits.shared}
        if self._rates is None:
            self._rates = _Rates(shared)
        left = sum(s.weight.count for k, s in shared.items() if k not in self.results)
        total = sum(s.weight.count for s in shared.values()) * state.weight.bits.bits
        used = sum(self.results[k].bits * s.weight.count for k, s in shared.items() if k in self.results)
        level = self._rates.level_at(max(total - used, 0.0) - excess * left)
        # Few weights are left at the end: they must not get all bits that the others needed less, or more.
        self._first_level = self._first_level or level
        return min(max(level, self._first_level / _MOST_CHANGE), self._first_level * _MOST_CHANGE)

    def code(self, key: str, target_GON: Tensor, moments: ErrorMetric | None = None) -> Coded:
        """Code coefficients, and record the result.

        Args:
            target_GON: the coefficients with the smallest error.
            moments: the metric; default: the metric that was measured before.
        """
        state = self.states[key]
        weight = state.weight
        level = self.level_of(key)
        moments = moments or state.moments.to(torch.float64)
        coded = code_weight(weight, target_GON, moments, state.shrinkage, state.log_effects_GO, level)
        if not weight.bits.shared:
            for _ in range(3):
                off = coded.bits - weight.bits.bits
                if abs(off) <= _NEAR * max(weight.bits.bits, 0.5):
                    break
                level *= 4.0 ** min(max(off, -1), 1)
                coded = code_weight(weight, target_GON, moments, state.shrinkage, state.log_effects_GO, level)
        coded = from_first_rank(coded)  # rounding may differ between processes
        predicted = state.bits_at(math.log(level))
        self._excess = (self._excess[0] + coded.bits * weight.count - predicted, self._excess[1] + weight.count)
        self.results[key] = coded
        if self._rates is not None:
            self._rates.remove(key)
        state.moments = state.moments.of_columns(torch.empty(0, dtype=torch.long))  # not needed any more
        return coded

    def key_of(self, names: Sequence[str]) -> str | None:
        """Return the key of the only weight of these layers; None if it is not coded."""
        return next(iter(self._keys_of(names)), None)

    def _keys_of(self, names: Sequence[str]) -> list[str]:
        return [key for key, state in self.states.items() if set(names) & set(state.weight.names)]

    def code_layer(self, key: str, fit: Problem, held: Problem, scales_F: Tensor) -> Coded:
        """Code the present coefficients of a weight on the equations of its layer, and write the coded values."""
        weight = self.states[key].weight
        parts = [one for part in (fit, held) if (one := moments_of(part, scales_F)) is not None]
        both = pooled(*parts) if len(parts) == 2 else None
        del parts  # two of the largest tensors of a large layer
        coded = self.code(key, weight.matrices(), both)
        weight.write(coded.quantised)
        return coded

    def finished(self, names: Sequence[str], record: LayerCalibration) -> LayerCalibration:
        """Return the record of a layer with its bits; code weights without equations if that was not done yet."""
        keys = self._keys_of(names)
        for key in keys:
            if key not in self.results:
                self.code_alone(key)
        if not keys:
            return record
        sizes = [(self.results[key].bits, self.states[key].weight.count) for key in keys]
        bits = sum(bits * count for bits, count in sizes) / sum(count for _, count in sizes)
        return replace(record, bits=bits, shrinkage=self.results[keys[0]].shrinkage)

    def code_alone(self, key: str) -> None:
        """Code the present coefficients of a weight in the metric that was measured before, or without any metric."""
        state = self.states[key]
        try:
            coded = self.code(key, state.weight.matrices())
        except (RuntimeError, ValueError) as error:
            log.info("%s is coded without a metric: %s", key, first_line(error))
            coded = self.code(key, state.weight.matrices(), identity(state.weight))
        state.weight.write(coded.quantised)


def _state(weight: CodedWeight, fit: ErrorMetric, held: ErrorMetric | None, seed: int) -> tuple[_State, Tensor]:
    """Return the state of a weight, without its effects, and random errors (draws, blocks, rows, columns)."""
    blocks_BON = fit.blocks(weight.matrices())
    variances_BN = column_variances(blocks_BON)
    power = float((fit.gram_BNN.diagonal(dim1=1, dim2=2) * variances_BN).mean()) or 1.0
    penalty_BN = _ERROR_LEVEL * power / variances_BN
    shrinkage = Shrinkage()
    if held is not None:
        columns = spread_columns(variances_BN.shape[1], _MOST_COLUMNS, weight.layout.frequencies)
        shrinkage = best_shrinkage(fit.of_columns(columns), held.of_columns(columns), penalty_BN[:, columns])
    moments = fit if held is None else pooled(fit, held)
    gram_BNN = shrinkage.of(moments.gram_BNN)
    levels = torch.tensor(_GRID, dtype=torch.float64) * power
    bits_LB = row_bits(gram_BNN.float(), variances_BN.float(), levels.tolist()).double()
    bits_GL = bits_LB.unflatten(1, (weight.layout.groups, -1)).sum(2).flip(0).T.contiguous().numpy()
    bits_GL = np.minimum(bits_GL, MOST_WEIGHT_BITS * weight.layout.columns)
    gram_BNN.diagonal(dim1=1, dim2=2).add_(penalty_BN)
    factor = torch.linalg.cholesky(gram_BNN, upper=True).float()
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(_ERRORS, *blocks_BON.shape, generator=generator)
    errors = torch.linalg.solve_triangular(factor, white.permute(1, 3, 0, 2).flatten(2), upper=True)
    errors_DBON = errors.unflatten(2, (_ERRORS, -1)).permute(2, 0, 3, 1)
    log_effects = np.zeros((weight.layout.groups, weight.layout.rows))
    state = _State(weight, moments.to(torch.float32), levels.log().flip(0).numpy(), bits_GL, log_effects, shrinkage)
    return state, errors_DBON


def _relative_effects(state: _State) -> Floats:
    """Return the effects with which all layers get the same relative output error."""
    blocks_BON = state.moments.blocks(state.weight.matrices())
    power = float((blocks_BON @ state.moments.to(torch.float64).gram_BNN * blocks_BON).sum()) or 1.0
    return np.full_like(state.log_effects_GO, math.log(state.weight.count / power))


def _smoothed(effects_GO: Floats) -> Floats:
    """Return the logarithms of effects, nearer to their mean and within limits; the mean effect stays the same."""
    logs = np.log(np.maximum(effects_GO, effects_GO.mean() * 1e-6))
    limit = math.log(_ROW_LIMIT)
    smooth = logs.mean() + np.clip(_ROW_EXPONENT * (logs - logs.mean()), -limit, limit)
    return smooth + math.log(effects_GO.mean() / np.exp(smooth).mean())
