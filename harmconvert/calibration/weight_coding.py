"""Round one weight with feedback in the metric of its layer, and code it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..codecs.codec import Entry
from ..codecs.entropy import PER_OCTAVE, Integers
from ..codecs.integers import Quantised, step_indices, step_sizes
from ..codecs.scales import affordable_steps
from ..kernels.quantisation import Metric, metric_at, quantise, shrunk, steps_at
from ..plan import CodedWeight
from .coding_metrics import ErrorMetric

Floats = npt.NDArray[np.float64]

# Partial roundings of each row that are kept.
SURVIVORS = 4
# The shares of the metric that may be replaced, in the order in which they are tried (`shrunk`).
SHARES = (1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.4, 0.7, 1.0)
# This share is replaced by the same power in every direction in any case: no response may count nothing.
_FLOOR = 1e-3
# The largest integers, and the most bits of a weight that follow.
_LARGEST_INTEGER, MOST_WEIGHT_BITS = 500, 9.0
# Attempts to round with larger steps, before feedback is left out.
_MOST_ATTEMPTS = 4


@dataclass(frozen=True)
class Shrinkage:
    """How much of a metric is not trusted, because it differs on other inputs; see `shrunk`.

    ``surprise``: the error that the metric lets through on the other inputs, relative to that on its own inputs.
    """

    share: float = 0.1
    even: bool = False
    surprise: float = 1.0

    def of(self, gram_BNN: Tensor) -> Tensor:
        """Return the metric after shrinkage."""
        return shrunk(shrunk(gram_BNN, self.share, self.even), _FLOOR, even=True)


@dataclass(frozen=True)
class Coded:
    """The result for one weight.

    ``bits``: per weight. ``shrinkage``: share of the metric that was not trusted (`Shrinkage`).
    """

    quantised: Quantised
    entry: Entry
    bits: float
    shrinkage: float | None


def code_weight(
    weight: CodedWeight,
    target_GON: Tensor,
    moments: ErrorMetric,
    shrinkage: Shrinkage,
    log_effects_GO: Floats,
    level: float,
) -> Coded:
    """Code coefficients so that each direction of a row changes the network's outputs by ``level``, squared.

    Args:
        target_GON: the coefficients with the smallest error.
        log_effects_GO: logarithm of the squared change of the outputs for a unit of squared error of a row.
    """
    mean = float(log_effects_GO.mean())
    row_steps_GO = step_indices(np.exp((mean - log_effects_GO) / 2))
    scaled_GON = target_GON / torch.from_numpy(step_sizes(row_steps_GO))[..., None]
    target_BON = moments.blocks(scaled_GON)
    variances_BN = column_variances(target_BON)
    level = level / math.exp(mean)
    gram_BNN = shrinkage.of(moments.gram_BNN)
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
    return Coded(quantised, entry, 8 * int(entry.parameters["bytes"]) / weight.count, shrinkage.share)


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

    The time is proportional to the cube of the columns; a part of the channels is enough (`spread_columns`).

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
            penalty = float((penalty_BN * inverse.diagonal(dim1=1, dim2=2)).sum())
            own, other = (float((part.gram_BNN * inverse).sum()) + penalty for part in (fit, held))
            cost = other + 2 * float(factor.diagonal(dim1=1, dim2=2).log().sum())
            if cost < least:
                best, least = Shrinkage(share, even, other / max(own, 1e-300)), cost
            worse = worse + 1 if cost > before else 0
            before = min(cost, before)
            if worse == 2:
                break
    return best


def column_variances(blocks_BON: Tensor) -> Tensor:
    """Return the mean square of each column; columns near zero get a small share of the mean."""
    variances_BN = blocks_BON.square().mean(1)
    mean = float(variances_BN.mean())
    return variances_BN.clamp_min(1e-4 * mean if mean > 0 else 1.0)
