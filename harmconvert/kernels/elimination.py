"""In what order a layer can do without its frequencies, by the output error that each costs it. Tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elimination:
    """Indices of all frequencies, ``order``, the first to go first and the one that is never cut last; ``errors``, the
    squared output error once each but that last one is gone and the others are refitted."""

    order: tuple[int, ...]
    errors: tuple[float, ...]


def eliminate(gram_GNN: Tensor, coefficients_GON: Tensor, frequencies: int) -> Elimination:
    """Backward elimination from the whole basis: each time the frequency goes whose loss costs the output least.

    The whole layer answers C z; with the frequencies of S kept, the best that a refit can leave is the least of
    E |C z - D z_S|^2. Setting the coefficients C_f of one frequency to zero and refitting all others adds
    tr(C_f (P_ff)^-1 C_f^T), P = G^-1, to that; the others become C - C_f (P_ff)^-1 P_f, and their P the Schur
    complement P - P_f^T (P_ff)^-1 P_f, which is the inverse of what is left of G (Hassibi and Stork 1993, by blocks).
    So the chain from all frequencies to one costs one inversion.

    Args:
        gram_GNN: (G, I F, I F) second moments G of the responses, I input channels by F frequencies, per group;
            positive definite.
        coefficients_GON: (G, O, I F) of the whole layer.
        frequencies: F.

    >>> gram = torch.diag(torch.tensor([4.0, 1.0, 1.0]))[None]
    >>> eliminate(gram, torch.tensor([[[1.0, 3.0, 1.0]]]), 3)
    Elimination(order=(2, 0, 1), errors=(1.0, 5.0))
    """
    size = gram_GNN.shape[1]
    channels = size // frequencies
    by_frequency = torch.arange(size, device=gram_GNN.device).view(channels, frequencies).T.flatten()
    ordered_GNN = gram_GNN[:, by_frequency][:, :, by_frequency]
    inverse_GNN = torch.cholesky_inverse(torch.linalg.cholesky(ordered_GNN))
    kept_GON = coefficients_GON[:, :, by_frequency]
    left = list(range(frequencies))
    order: list[int] = []
    errors: list[float] = []
    while len(left) > 1:
        blocks = [slice(place * channels, (place + 1) * channels) for place in range(len(left))]
        costs = torch.stack([_cost(inverse_GNN[:, b, b], kept_GON[:, :, b]) for b in blocks])
        place = int(costs.argmin())
        order.append(left.pop(place))
        errors.append((errors[-1] if errors else 0.0) + float(costs[place]))
        kept_GON, inverse_GNN = _without(blocks[place], kept_GON, inverse_GNN)
    return Elimination((*order, *left), tuple(errors))


def _cost(inverse_GII: Tensor, coefficients_GOI: Tensor) -> Tensor:
    """tr(C_f (P_ff)^-1 C_f^T), summed over the groups."""
    factor_GII = torch.linalg.cholesky(inverse_GII)
    return torch.linalg.solve_triangular(factor_GII, coefficients_GOI.mT, upper=False).square().sum()


def _without(block: slice, kept_GON: Tensor, inverse_GNN: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients and inverse once the unknowns of ``block`` are zero and the others refitted."""
    factor_GII = torch.linalg.cholesky(inverse_GNN[:, block, block])
    gain_GIN = torch.cholesky_solve(inverse_GNN[:, block], factor_GII)
    rest = [*range(block.start), *range(block.stop, inverse_GNN.shape[1])]
    gain_GIR = gain_GIN[:, :, rest]
    inverse_GRR = inverse_GNN[:, rest][:, :, rest]
    inverse_GRR.baddbmm_(inverse_GNN[:, rest, block], gain_GIR, alpha=-1)
    return kept_GON[:, :, rest] - kept_GON[:, :, block] @ gain_GIR, inverse_GRR
