"""Find the order in which to remove a layer's frequencies, by the output error that each removal adds. Tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elimination:
    """The result of `eliminate`.

    ``order``: indices of all frequencies; the first one is removed first, the last one is never removed.
    ``errors``: the squared output error after each removal, with the remaining frequencies refitted.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]


def eliminate(gram_GNN: Tensor, coefficients_GON: Tensor, frequencies: int) -> Elimination:
    """Remove one frequency after the other: in each step the one whose removal adds the least output error.

    The output of the whole layer is C z. If only the frequencies in S are kept, the smallest error that a refit D can
    reach is min_D E |C z - D z_S|^2. Removing the coefficients C_f of one frequency and refitting all others adds
    tr(C_f (P_ff)^-1 C_f^T) to this error, with P = G^-1. The other coefficients become C - C_f (P_ff)^-1 P_f, and
    their P becomes the Schur complement P - P_f^T (P_ff)^-1 P_f, which is the inverse of the remaining block of G
    (Hassibi and Stork 1993, for blocks). So one matrix inversion serves all steps.

    Args:
        gram_GNN: second moments G of the responses, (G, I F, I F): I input channels by F frequencies in each group;
            positive definite.
        coefficients_GON: coefficients C of the whole layer, (G, O, I F).
        frequencies: the number of frequencies F.

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
    remaining = list(range(frequencies))
    order: list[int] = []
    errors: list[float] = []
    while len(remaining) > 1:
        blocks = [slice(i * channels, (i + 1) * channels) for i in range(len(remaining))]
        added = torch.stack([_added_error(inverse_GNN[:, b, b], kept_GON[:, :, b]) for b in blocks])
        cheapest = int(added.argmin())
        order.append(remaining.pop(cheapest))
        errors.append((errors[-1] if errors else 0.0) + float(added[cheapest]))
        kept_GON, inverse_GNN = _remove_block(blocks[cheapest], kept_GON, inverse_GNN)
    return Elimination((*order, *remaining), tuple(errors))


def _added_error(inverse_GII: Tensor, coefficients_GOI: Tensor) -> Tensor:
    """Return tr(C_f (P_ff)^-1 C_f^T), summed over the groups."""
    factor_GII = torch.linalg.cholesky(inverse_GII)
    return torch.linalg.solve_triangular(factor_GII, coefficients_GOI.mT, upper=False).square().sum()


def _remove_block(block: slice, kept_GON: Tensor, inverse_GNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients and inverse after the unknowns of ``block`` are removed and the others refitted."""
    factor_GII = torch.linalg.cholesky(inverse_GNN[:, block, block])
    gain_GIN = torch.cholesky_solve(inverse_GNN[:, block], factor_GII)
    rest = [*range(block.start), *range(block.stop, inverse_GNN.shape[1])]
    gain_GIR = gain_GIN[:, :, rest]
    inverse_GRR = inverse_GNN[:, rest][:, :, rest]
    inverse_GRR.baddbmm_(inverse_GNN[:, rest, block], gain_GIR, alpha=-1)
    return kept_GON[:, :, rest] - kept_GON[:, :, block] @ gain_GIR, inverse_GRR
