"""Reduce the rank of a layer's weight in the metric of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ..kernels.quantisation import shrunk
from ..kernels.ranks import Pair, full_rank, low_rank, low_rank_of_channels, power_outside
from ..plan import Rank
from .coding_metrics import MOST_COLUMNS
from .equations import Problem
from .layers import Choice
from .solvers import ChannelEquations, NormalEquations, Operator, Samples

# The share of the mean power of the responses that is added to every response, so that directions that the calibration
# inputs hardly show count a little. The damping of the refit is used instead if it is larger.
_DAMPING = 1e-3
# How far the effects of errors are shrunk towards their diagonal: they are estimated from few gradients.
_SHRINKAGE = 0.3
# A layer whose outputs differ by less than this, relative to their size, needs no refit before its rank is reduced.
_NOTHING_TO_REFIT = 1e-6


def reduced(
    fit: Problem, held: Problem, dampings: Sequence[float], rank: Rank, effects_GOO: Tensor | None = None
) -> Choice:
    """Return the coefficients of a rank whose error on the held-back inputs has the smallest effect.

    Each candidate is a solution of the refit, reduced to the rank in the metric of the inputs. The candidate without
    the metric is the nearest map to the weight.

    Args:
        dampings: of the refit, the strongest first.
        effects_GOO: how much errors of the layer's outputs change those of the network, as a quadratic form.
    """
    coefficients_GON = fit.layer.coefficients
    root_GOO = None
    if isinstance(held, Operator):
        effects_GOO = None  # its candidates could not be compared by their effects
    if effects_GOO is not None:
        effects_GOO = _shrunk(effects_GOO.to(coefficients_GON))
        root_GOO = torch.linalg.cholesky(effects_GOO)
    plain = _nearest(coefficients_GON, fit, rank)
    assert plain is not None
    candidates: list[tuple[str, Pair, float | None]] = [("projection", plain, None)]
    for damping, target_GON in _targets(fit, dampings):
        if (near := _nearest(target_GON, fit, rank, max(damping, _DAMPING), root_GOO)) is not None:
            candidates.append(("refit" if target_GON is not coefficients_GON else "rank", near, damping))
    changes = [
        fit.layer.reachable(fit.with_best_bias(pair.product_GON - coefficients_GON, used))
        for _, pair, used in candidates
    ]
    squares = [held.change_of_squares(change, effects_GOO) for change in changes]
    best = squares.index(min(squares))
    # The projection was made without the metric. The next candidate reduces the same coefficients in the metric.
    spectrum = _spectrum(candidates[max(best, 1)][1], fit, rank) if len(candidates) > 1 else None
    change = changes[best]
    return Choice(candidates[best][0], change, held.error(changes[0]), held.error(change), spectrum)


def _spectrum(pair: Pair, problem: Problem, rank: Rank) -> tuple[float, ...] | None:
    """Return the shares of the output power outside the leading directions; None for a layer without outputs."""
    rows, columns = problem.layer.coefficients.shape[1:]
    frequencies = len(problem.layer.basis)
    assert pair.powers_GQ is not None
    most = full_rank(rows, columns // frequencies, frequencies, rank.kernel_second)
    outside = power_outside(pair.powers_GQ, most)
    return tuple(float(f"{share:.4g}") for share in outside.tolist()) if bool(outside.isfinite().all()) else None


def _targets(fit: Problem, dampings: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Yield dampings and the coefficients to reduce: without a refit first, then those of the refit."""
    yield 0.0, fit.layer.coefficients
    if fit.error(None) < _NOTHING_TO_REFIT:
        return
    for change in fit.candidates(dampings):
        yield cast(float, change.damping), fit.layer.coefficients + change.coefficients


def _shrunk(effects_GOO: Tensor) -> Tensor:
    """Return the effects shrunk towards their diagonal, positive definite and with a mean of 1 on the diagonal."""
    scaled_GOO = effects_GOO / effects_GOO.diagonal(dim1=1, dim2=2).mean()
    shrunk_GOO = shrunk(scaled_GOO, _SHRINKAGE)
    shrunk_GOO.diagonal(dim1=1, dim2=2).add_(_DAMPING)
    return shrunk_GOO


def _nearest(
    target_GON: Tensor, problem: Problem, rank: Rank, damping: float | None = None, root_GOO: Tensor | None = None
) -> Pair | None:
    """Return the nearest coefficients of a rank; in the metric of the inputs if ``damping`` is given."""
    assert rank.rank is not None
    frequencies = len(problem.layer.basis)
    if rank.kernel_second:
        gram_GNN = None if damping is None else _gram(problem, damping)
        if gram_GNN is None and damping is not None:
            return None
        return low_rank_of_channels(target_GON, frequencies, rank.rank, gram_GNN, root_GOO)
    outputs_GOO = None if damping is None else _outputs(target_GON, problem, damping)
    if outputs_GOO is None and damping is not None:
        return None
    return low_rank(target_GON, frequencies, rank.rank, outputs_GOO, root_GOO)


def _outputs(target_GON: Tensor, problem: Problem, damping: float) -> Tensor | None:
    """Return the second moments of the outputs, damped."""
    if isinstance(problem, ChannelEquations):
        return None
    if isinstance(problem, NormalEquations):
        gram_GNN = problem.centred_gram
        moments_GOO = target_GON @ gram_GNN @ target_GON.mT
        power_G = gram_GNN.diagonal(dim1=1, dim2=2).mean(1)
    elif isinstance(problem, Samples):
        z_GRN = problem.centred_samples
        y_GRO = z_GRN @ target_GON.mT
        moments_GOO, power_G = y_GRO.mT @ y_GRO, z_GRN.square().sum(1).mean(1)
    else:
        assert isinstance(problem, Operator)
        moments_GOO, power_G = problem.output_moments(target_GON)
    return moments_GOO + damping * power_G[:, None, None] * (target_GON @ target_GON.mT)


def _gram(problem: Problem, damping: float) -> Tensor | None:
    """Return the second moments of the responses, damped; None if they are too large or not stored."""
    if problem.layer.unknowns > MOST_COLUMNS or isinstance(problem, Operator | ChannelEquations):
        return None
    assert isinstance(problem, NormalEquations | Samples)
    gram_GNN = problem.centred_gram
    powers_GN = gram_GNN.diagonal(dim1=1, dim2=2)
    return gram_GNN + torch.diag_embed(damping * powers_GN.mean(1, keepdim=True).expand(powers_GN.shape))
