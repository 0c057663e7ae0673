"""Code the weights of a network on calibration inputs: choose the distortion of each weight, and round with feedback.

All weights get the same distortion of the network's outputs for each bit: the level of a weight's rows is one number
for the whole network, divided by the measured effect of their errors (`sensitivity`). The number follows from the bits
that are wanted. It is corrected after each weight, because the bits of a weight are known only when it is coded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..codecs.codec import Entry
from ..codecs.entropy import PER_OCTAVE, Integers
from ..codecs.integers import Quantised, step_indices, step_sizes
from ..codecs.scales import affordable_steps
from ..errors import first_line
from ..kernels.quantisation import Metric, metric_at, quantise, row_bits, shrunk, steps_at
from ..network.distributed import from_first_rank
from ..plan import CodedWeight, Plan, coded_weights
from .coding_metrics import ErrorMetric, identity, measured_moments, moments_of, pooled
from .equations import Problem
from .inputs import CalibrationSet
from .records import LayerCalibration, Progress
from .sensitivity import squared_changes

Floats = npt.NDArray[np.float64]

log = logging.getLogger(__name__)

# Partial roundings of each row that are kept.
SURVIVORS = 4
# The shares of the metric that may be replaced, in the order in which they are tried (`shrunk`).
SHARES = (1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4, 0.7, 1.0)
# This share is replaced by the same power in every direction in any case: no response may count nothing.
_FLOOR = 1e-3
# If more of the metric is replaced on average, the inputs lack variety.
MOST_SHRINKAGE = 0.25
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
# The largest integers, and the most bits of a weight that follow.
_LARGEST_INTEGER, _MOST_BITS = 500, 9.0
# Attempts to round with larger steps, before feedback is left out.
_MOST_ATTEMPTS = 4
# Number of random errors of each weight, and the level at which they are drawn.
_ERRORS, _ERROR_LEVEL = 3, 2.0**-6
# The measured effects of the rows of one weight are brought nearer to their mean, and limited to this factor.
_ROW_EXPONENT, _ROW_LIMIT = 0.8, 16.0
# A number of bits for a single weight is met within this share.
_NEAR = 0.02


@dataclass(frozen=True)
class Shrinkage:
    """How much of a metric is not trusted, because it differs on other inputs; see `shrunk`."""

    share: float = 0.1
    even: bool = False

    def of(self, gram_BNN: Tensor) -> Tensor:
        """Return the metric after shrinkage."""
        return shrunk(shrunk(gram_BNN, self.share, self.even), _FLOOR, even=True)


@dataclass
class _State:
    """What is known about a weight before it is coded.

    ``measured``: the moments are measured on inputs.
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
        share_GO = (x_GO - grid[place_GO - 1]) / (
            grid[place_GO] - grid[place_GO - 1]
        )  # outside the grid this extrapolates
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


@dataclass(frozen=True)
class Coded:
    """The result for one weight.

    ``bits``: per weight. ``shrinkage``: share of the metric that was replaced by the same power in every direction.
    """

    quantised: Quantised
    entry: Entry
    bits: float
    shrinkage: float | None


@dataclass
class Coder:
    """Codes the weights of a network one after the other. Make it with `Coder.measured`."""

    states: dict[str, _State]
    results: dict[str, Coded] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _first_level: float = 0.0
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
            fit, held = (identity(weight), None) if isinstance(moments, str) else moments
            states[weight.key], errors[weight.key] = _state(weight, fit, held, seed + number)
            states[weight.key].measured = held is not None
        coder = cls(states)
        coder._check_variety()
        coder._measure_effects(network, data, errors, seed, progress)
        return coder

    def _check_variety(self) -> None:
        """Note if the metrics of most weights differ on the inputs that are held back."""
        measured = [state for state in self.states.values() if state.measured]
        count = sum(state.weight.count for state in measured)
        share = sum(state.weight.count * state.shrinkage.share for state in measured) / max(count, 1)
        if share > MOST_SHRINKAGE:
            self.notes.append(
                "the calibration inputs lack variety: those for the fit say little about those held back, so "
                f"{share:.0%} of the metric is not used, and the same quality needs more bits; give more inputs that show "
                "other things"
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
            effects = squared_changes(network, parameters, data.fit, changes, seed, tick)
        except Exception as error:  # such as a network that runs without gradients
            self.notes.append(
                f"the effect of errors on the outputs could not be measured ({first_line(error)}): all layers get the "
                "same relative error"
            )
            effects = {}
        for key, state in self.states.items():
            own = effects.get(key)
            if own is None or not bool(own.isfinite().all()) or not float(own.sum()) > 0:
                state.log_effects_GO = _relative_effects(state)
            else:
                state.log_effects_GO = _smoothed(own.numpy() / state.weight.layout.columns)

    def level_for(self, keys: Sequence[str], bits: float) -> float:
        """Return the level at which these weights together have this number of bits; see `_State.bits_at`."""
        count = sum(self.states[key].weight.count for key in keys)
        seen_bits, seen = self._excess
        excess = seen_bits / (seen + _TRUST_AFTER * sum(state.weight.count for state in self.states.values()))
        low, high = -100.0, 100.0
        for _ in range(40):
            middle = (low + high) / 2
            more = sum(self.states[key].bits_at(middle) for key in keys) + excess * count > bits
            low, high = (middle, high) if more else (low, middle)
        return math.exp((low + high) / 2)

    def level_of(self, key: str) -> float:
        """Return the level for the weight that is coded next."""
        state = self.states[key]
        if not state.weight.bits.shared:
            return self.level_for([key], state.weight.bits.bits * state.weight.count)
        shared = [k for k, s in self.states.items() if s.weight.bits.shared]
        left = [k for k in shared if k not in self.results]
        total = sum(self.states[k].weight.count for k in shared) * state.weight.bits.bits
        used = sum(self.results[k].bits * self.states[k].weight.count for k in shared if k in self.results)
        level = self.level_for(left, max(total - used, 0.0))
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
        moments = moments or state.moments
        coded = _coded(state, target_GON, moments, level)
        if not weight.bits.shared:
            for _ in range(3):
                off = coded.bits - weight.bits.bits
                if abs(off) <= _NEAR * max(weight.bits.bits, 0.5):
                    break
                level *= 4.0 ** min(max(off, -1), 1)
                coded = _coded(state, target_GON, moments, level)
        coded = from_first_rank(coded)  # rounding may differ between processes
        predicted = state.bits_at(math.log(level))
        self._excess = (self._excess[0] + coded.bits * weight.count - predicted, self._excess[1] + weight.count)
        self.results[key] = coded
        return coded

    def key_of(self, names: Sequence[str]) -> str | None:
        """Return the key of the weight of these layers; None if it is not coded."""
        return next((key for key, state in self.states.items() if set(names) & set(state.weight.names)), None)

    def code_layer(self, key: str, fit: Problem, held: Problem, scales_F: Tensor) -> Coded:
        """Code the present coefficients of a weight on the equations of its layer, and write the coded values."""
        weight = self.states[key].weight
        parts = [one for part in (fit, held) if (one := moments_of(part, scales_F)) is not None]
        coded = self.code(key, weight.matrices(), pooled(*parts) if len(parts) == 2 else None)
        weight.write(coded.quantised)
        return coded

    def finished(self, names: Sequence[str], record: LayerCalibration) -> LayerCalibration:
        """Return the record of a layer with its bits; code the weight without equations if that was not done yet."""
        if (key := self.key_of(names)) is None:
            return record
        if key not in self.entries:
            self.code_alone(key)
        coded = self.results[key]
        return replace(record, bits=coded.bits, shrinkage=coded.shrinkage)

    def code_alone(self, key: str) -> None:
        """Code the present coefficients of a weight in the metric that was measured before, or without any metric."""
        state = self.states[key]
        try:
            coded = self.code(key, state.weight.matrices())
        except (RuntimeError, ValueError) as error:
            log.info("%s is coded without a metric: %s", key, first_line(error))
            coded = self.code(key, state.weight.matrices(), identity(state.weight))
        state.weight.write(coded.quantised)


def _coded(state: _State, target_GON: Tensor, moments: ErrorMetric, level: float) -> Coded:
    """Code coefficients at a level of the outputs."""
    weight, log_effects_GO = state.weight, state.log_effects_GO
    mean = float(log_effects_GO.mean())
    row_steps_GO = step_indices(np.exp((mean - log_effects_GO) / 2))
    scaled_GON = target_GON / torch.from_numpy(step_sizes(row_steps_GO))[..., None]
    target_BON = moments.blocks(scaled_GON)
    variances_BN = _variances(target_BON)
    level = level / math.exp(mean)
    gram_BNN = state.shrinkage.of(moments.gram_BNN)
    metric = metric_at(gram_BNN, target_BON @ gram_BNN, variances_BN, level)
    # Larger integers gain nothing: the tables of the entropy coder would need more bytes than they save.
    largest = largest_integer(weight.count)
    least_BN = metric.target_GON.abs().amax(1) / largest
    layout = weight.layout
    columns_GN = step_indices(torch.maximum(steps_at(metric, level), least_BN).numpy()).reshape(layout.groups, -1)
    # The steps of a single row are part of those of its columns.
    single_G1 = row_steps_GO if layout.rows == 1 else np.zeros_like(row_steps_GO[:, :1])
    columns_GN = affordable_steps(columns_GN + single_G1, layout) - single_G1
    integers_GON, columns_GN = _integers(metric, columns_GN, moments, layout.groups, largest)
    quantised = Quantised(integers_GON, columns_GN + single_G1, row_steps_GO if layout.rows > 1 else None)
    entry = weight.entry(quantised)
    return Coded(quantised, entry, 8 * int(entry.parameters["bytes"]) / weight.count, state.shrinkage.share)


def largest_integer(count: int) -> int:
    """Return the largest integer that a weight of so many coefficients should have.

    The tables of the entropy coder have an entry for each integer, and small weights may have few of them
    (`codecs.stream.too_many_tables`).
    """
    return min(_LARGEST_INTEGER, count // 2 + 32)


def _integers(
    metric: Metric, columns_GN: Integers, moments: ErrorMetric, groups: int, largest: int
) -> tuple[Integers, Integers]:
    """Return the rounded coefficients, and the indices of the steps: larger ones where integers would be too large.

    Feedback can move a coefficient far if its own error hardly counts.
    """
    for _ in range(_MOST_ATTEMPTS):
        steps_BN = torch.from_numpy(step_sizes(columns_GN).reshape(metric.factor_GNN.shape[:2]))
        integers_GON = moments.from_blocks(quantise(metric, steps_BN, SURVIVORS), groups).numpy()
        largest_GN = np.abs(integers_GON).max(1)
        if not (largest_GN > 2 * largest).any():
            return integers_GON.astype(np.int32), columns_GN
        columns_GN = columns_GN + np.ceil(PER_OCTAVE * np.log2(np.maximum(largest_GN / largest, 1))).astype(np.int32)
    target_GON = moments.from_blocks(metric.target_GON, groups).numpy()
    return np.rint(target_GON / step_sizes(columns_GN)[:, None]).astype(np.int32), columns_GN


def best_shrinkage(fit: ErrorMetric, held: ErrorMetric, penalty_BN: Tensor) -> Shrinkage:
    """Return the shrinkage with which the metric is most likely on other inputs.

    At a fixed level this is the smallest sum of squared error on the other inputs, and of ``level`` for each nat of the
    code: both are the same function of the metric as the likelihood of a Gaussian distribution.

    Args:
        penalty_BN: what the level adds to the diagonal of the metric, see `metric_at`.
    """
    best, least = Shrinkage(), math.inf
    for even in (False, True):
        worse, before = 0, math.inf
        for share in SHARES:
            shrinkage = Shrinkage(share, even)
            form_BNN = shrinkage.of(fit.gram_BNN) + torch.diag_embed(penalty_BN)
            factor, info = torch.linalg.cholesky_ex(form_BNN, upper=True)
            if bool(info.any()):
                continue
            inverse = torch.cholesky_inverse(factor, upper=True)
            cost = float((held.gram_BNN * inverse).sum() + (penalty_BN * inverse.diagonal(dim1=1, dim2=2)).sum())
            cost += 2 * float(factor.diagonal(dim1=1, dim2=2).log().sum())
            if cost < least:
                best, least = shrinkage, cost
            worse = worse + 1 if cost > before else 0
            before = min(cost, before)
            if worse == 2:
                break
    return best


def _state(weight: CodedWeight, fit: ErrorMetric, held: ErrorMetric | None, seed: int) -> tuple[_State, Tensor]:
    """Return the state of a weight, without its effects, and random errors (draws, blocks, rows, columns)."""
    blocks_BON = fit.blocks(weight.matrices())
    variances_BN = _variances(blocks_BON)
    power = float((fit.gram_BNN.diagonal(dim1=1, dim2=2) * variances_BN).mean()) or 1.0
    penalty_BN = _ERROR_LEVEL * power / variances_BN
    shrinkage = Shrinkage() if held is None else best_shrinkage(fit, held, penalty_BN)
    moments = fit if held is None else pooled(fit, held)
    gram_BNN = shrinkage.of(moments.gram_BNN)
    levels = torch.tensor(_GRID, dtype=torch.float64) * power
    bits_LB = row_bits(gram_BNN.float(), variances_BN.float(), levels.tolist()).double()
    bits_GL = bits_LB.unflatten(1, (weight.layout.groups, -1)).sum(2).flip(0).T.contiguous().numpy()
    bits_GL = np.minimum(bits_GL, _MOST_BITS * weight.layout.columns)
    factor = torch.linalg.cholesky(gram_BNN + torch.diag_embed(penalty_BN), upper=True).float()
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(_ERRORS, *blocks_BON.shape, generator=generator)
    errors = torch.linalg.solve_triangular(factor, white.permute(1, 3, 0, 2).flatten(2), upper=True)
    errors_DBON = errors.unflatten(2, (_ERRORS, -1)).permute(2, 0, 3, 1)
    log_effects = np.zeros((weight.layout.groups, weight.layout.rows))
    state = _State(weight, moments, levels.log().flip(0).numpy(), bits_GL, log_effects, shrinkage)
    return state, errors_DBON


def _variances(blocks_BON: Tensor) -> Tensor:
    """Return the mean square of each column; columns near zero get a small share of the mean."""
    variances_BN = blocks_BON.square().mean(1)
    mean = float(variances_BN.mean())
    return variances_BN.clamp_min(1e-4 * mean if mean > 0 else 1.0)


def _relative_effects(state: _State) -> Floats:
    """Return the effects with which all layers get the same relative output error."""
    blocks_BON = state.moments.blocks(state.weight.matrices())
    power = float((blocks_BON @ state.moments.gram_BNN * blocks_BON).sum()) or 1.0
    return np.full_like(state.log_effects_GO, math.log(state.weight.count / power))


def _smoothed(effects_GO: Floats) -> Floats:
    """Return the logarithms of effects, nearer to their mean and within limits; the mean effect stays the same."""
    logs = np.log(np.maximum(effects_GO, effects_GO.mean() * 1e-6))
    limit = math.log(_ROW_LIMIT)
    smooth = logs.mean() + np.clip(_ROW_EXPONENT * (logs - logs.mean()), -limit, limit)
    return smooth + math.log(effects_GO.mean() / np.exp(smooth).mean())
