"""Reduce the rank of a layer's weight in the metric of its inputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.ranks import low_rank, low_rank_of_channels
from ..plan import Rank
from .coding_metrics import MOST_COLUMNS
from .equations import Problem
from .layers import Choice
from .solvers import ChannelEquations, NormalEquations, Operator, Samples

# The share of the mean power of the responses that is added to every response, so that directions that the calibration
# inputs hardly show count a little. The damping of the refit is used instead if it is larger.
_DAMPING = 1e-3


def reduced(choice: Choice, fit: Problem, held: Problem, rank: Rank) -> Choice:
    """Return the choice of a refit with its coefficients reduced to a rank.

    The nearest coefficients without the metric are taken instead if their error on the held-back inputs is smaller.
    """
    coefficients_GON = fit.layer.coefficients
    nearest = _nearest(coefficients_GON, fit, rank)
    assert nearest is not None
    plain = fit.layer.reachable(fit.with_best_bias(nearest - coefficients_GON))
    best = replace(choice, decision="projection", change=plain, error_before=held.error(plain))
    best = replace(best, error_after=best.error_before)
    targets = [coefficients_GON]
    damping = _DAMPING
    if choice.change is not None:
        targets.append(coefficients_GON + choice.change.coefficients)
        damping = max(damping, choice.change.damping or 0.0)
    for target_GON, decision in zip(targets, ("rank", choice.decision), strict=False):
        if (near := _nearest(target_GON, fit, rank, damping)) is None:
            continue
        change = fit.layer.reachable(fit.with_best_bias(near - coefficients_GON))
        change = replace(change, damping=damping)
        if (error := held.error(change)) < best.error_after:
            best = replace(best, decision=decision, change=change, error_after=error)
    return best


def _nearest(target_GON: Tensor, problem: Problem, rank: Rank, damping: float | None = None) -> Tensor | None:
    """Return the nearest coefficients of a rank; in the metric of the inputs if ``damping`` is given."""
    assert rank.rank is not None
    frequencies = len(problem.layer.basis)
    if rank.kernel_second:
        gram_GNN = None if damping is None else _gram(problem, damping)
        if gram_GNN is None and damping is not None:
            return None
        return low_rank_of_channels(target_GON, frequencies, rank.rank, gram_GNN).product_GON
    outputs_GOO = None if damping is None else _outputs(target_GON, problem, damping)
    if outputs_GOO is None and damping is not None:
        return None
    return low_rank(target_GON, frequencies, rank.rank, outputs_GOO).product_GON


def _outputs(target_GON: Tensor, problem: Problem, damping: float) -> Tensor | None:
    """Return the second moments of the outputs, damped."""
    if isinstance(problem, ChannelEquations):
        return None
    if isinstance(problem, NormalEquations):
        gram_GNN = problem.centred_gram
        moments_GOO = target_GON @ gram_GNN @ target_GON.mT
        power_G = gram_GNN.diagonal(dim1=1, dim2=2).mean(1)
    elif isinstance(problem, Samples):
        z_GRN = _centred(problem)
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
    if isinstance(problem, Samples):
        z_GRN = _centred(problem)
        gram_GNN = z_GRN.mT @ z_GRN
    else:
        assert isinstance(problem, NormalEquations)
        gram_GNN = problem.centred_gram
    powers_GN = gram_GNN.diagonal(dim1=1, dim2=2)
    return gram_GNN + torch.diag_embed(damping * powers_GN.mean(1, keepdim=True).expand(powers_GN.shape))


def _centred(problem: Samples) -> Tensor:
    z_GRN, _ = problem.all_samples()
    return z_GRN - z_GRN.mean(1, keepdim=True) if problem.layer.fits_bias else z_GRN
