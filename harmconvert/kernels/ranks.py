"""Maps of low rank: the product of two matrices that changes a layer's output least. Tensors only.

The output of a layer is C z. With responses z of second moments G, the best map of rank r is U U^T C, where the columns
of U are the leading r eigenvectors of C G C^T (reduced-rank regression, Izenman 1975). Without inputs, G is the
identity, and this is the singular value decomposition of C.

A kernel larger than 1x1 has two orders: its frequencies belong to the first matrix (a K x K convolution to r channels,
then a 1x1 convolution), or to the second one (a 1x1 convolution to r channels, then a K x K convolution).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Added to the diagonal of moments, relative to their mean: responses that are always zero must not count infinitely.
_DAMPING = 1e-9
# The spectrum of a layer has this number of equal steps from no direction to the full rank.
SPECTRUM_STEPS = 16


@dataclass(frozen=True)
class Pair:
    """Two matrices for each group, whose product is a map of low rank.

    ``first_GRIF``: (groups, rank, channels, frequencies). ``second_GORF``: (groups, rows, rank, frequencies). One of
    the two has a single frequency. ``powers_GQ``: the eigenvalues of the moments from which the map was made, the
    smallest first: the power of the outputs in each direction.
    """

    first_GRIF: Tensor
    second_GORF: Tensor
    powers_GQ: Tensor | None = None

    @property
    def product_GON(self) -> Tensor:
        """Return the map (groups, rows, channels x frequencies)."""
        return product(self.first_GRIF, self.second_GORF)


def product(first_GRIF: Tensor, second_GORF: Tensor) -> Tensor:
    """Return the product of two matrices of which at most one has several frequencies; see `Pair`.

    >>> product(torch.ones(1, 2, 3, 4), torch.ones(1, 5, 2, 1)).shape
    torch.Size([1, 5, 12])
    >>> product(torch.ones(1, 2, 3, 1), torch.ones(1, 5, 2, 4)).shape
    torch.Size([1, 5, 12])
    """
    if second_GORF.shape[3] == 1:
        return second_GORF[..., 0] @ first_GRIF.flatten(2)
    rows_GOFR = second_GORF.transpose(2, 3)
    product_GOFI = (rows_GOFR.flatten(1, 2) @ first_GRIF[..., 0]).unflatten(1, rows_GOFR.shape[1:3])
    return product_GOFI.transpose(2, 3).flatten(2)


def full_rank(rows: int, channels: int, frequencies: int, kernel_second: bool) -> int:
    """Return the largest rank that a map can have; see `Pair` for the two orders.

    >>> full_rank(64, 16, 9, kernel_second=False), full_rank(64, 16, 9, kernel_second=True)
    (64, 16)
    """
    return min(rows * frequencies, channels) if kernel_second else min(rows, channels * frequencies)


def low_rank(
    coefficients_GON: Tensor,
    frequencies: int,
    rank: int,
    outputs_GOO: Tensor | None = None,
    root_GOO: Tensor | None = None,
) -> Pair:
    """Return the map of a rank that is nearest to given coefficients; the first matrix has the frequencies.

    >>> pair = low_rank(torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None].double(), 1, 2)
    >>> pair.product_GON.diagonal(dim1=1, dim2=2).abs().round(decimals=6).tolist()
    [[3.0, 2.0, 0.0]]

    Args:
        coefficients_GON: float64, (groups, rows, channels x frequencies).
        rank: from 1 to the smaller one of rows and columns.
        outputs_GOO: second moments C G C^T of the outputs, the metric; None: those for the identity as G.
        root_GOO: a lower triangular matrix T. An error e of the outputs counts as the square of T^T e; by default of e.
    """
    if root_GOO is not None:
        if outputs_GOO is not None:
            outputs_GOO = root_GOO.mT @ outputs_GOO @ root_GOO
        pair = low_rank(root_GOO.mT @ coefficients_GON, frequencies, rank, outputs_GOO)
        second_GOR = torch.linalg.solve_triangular(root_GOO.mT, pair.second_GORF[..., 0], upper=True)
        return Pair(pair.first_GRIF, second_GOR[..., None], pair.powers_GQ)
    rows, columns = coefficients_GON.shape[1:]
    if columns < rows:  # the outputs span at most `columns` directions: find the eigenvectors among these
        directions_GOQ, triangle_GQN = torch.linalg.qr(coefficients_GON)
        if outputs_GOO is None:
            moments_GQQ = triangle_GQN @ triangle_GQN.mT
        else:
            moments_GQQ = directions_GOQ.mT @ outputs_GOO @ directions_GOQ
        leading_GQR, powers_GQ = _leading(moments_GQQ, rank)
        second_GOR = directions_GOQ @ leading_GQR
    else:
        moments_GOO = coefficients_GON @ coefficients_GON.mT if outputs_GOO is None else outputs_GOO
        second_GOR, powers_GQ = _leading(moments_GOO, rank)
    first_GRIF = (second_GOR.mT @ coefficients_GON).unflatten(2, (-1, frequencies))
    return Pair(first_GRIF, second_GOR[..., None].contiguous(), powers_GQ)


def low_rank_of_channels(
    coefficients_GON: Tensor,
    frequencies: int,
    rank: int,
    gram_GNN: Tensor | None = None,
    root_GOO: Tensor | None = None,
) -> Pair:
    """Return a map of a rank that is near to given coefficients; the second matrix has the frequencies.

    Without moments it is the nearest one. With them, the first matrix is the best one in the metric of the channels,
    averaged over the frequencies, and the second one is the regression on what the first one passes on.

    >>> C = torch.arange(12.0).reshape(1, 2, 6).double()
    >>> bool((low_rank_of_channels(C, 2, 2).product_GON - C).abs().max() < 1e-12)
    True

    Args:
        coefficients_GON: float64, (groups, rows, channels x frequencies).
        rank: from 1 to the number of channels.
        gram_GNN: second moments G of the responses, positive semidefinite.
        root_GOO: as for `low_rank`. It is used for the choice of the first matrix.
    """
    C_GOIF = coefficients_GON.unflatten(2, (-1, frequencies))
    weighted_GON = coefficients_GON if root_GOO is None else root_GOO.mT @ coefficients_GON
    unfolded_GMI = weighted_GON.unflatten(2, (-1, frequencies)).transpose(2, 3).flatten(1, 2)
    if gram_GNN is None:
        leading_GIR, powers_GI = _leading(unfolded_GMI.mT @ unfolded_GMI, rank)
        first_GRI = leading_GIR.mT.contiguous()
        return Pair(first_GRI[..., None], torch.einsum("goif,gri->gorf", C_GOIF, first_GRI), powers_GI)
    gram_GIFJH = gram_GNN.unflatten(2, (-1, frequencies)).unflatten(1, (-1, frequencies))
    channels_GII = _damped(gram_GIFJH.diagonal(dim1=2, dim2=4).sum(-1))
    root_GII = torch.linalg.cholesky(channels_GII, upper=True)
    scaled_GMI = unfolded_GMI @ root_GII.mT
    vectors_GIR, powers_GI = _leading(scaled_GMI.mT @ scaled_GMI, rank)
    first_GRI = torch.linalg.solve_triangular(root_GII, vectors_GIR, upper=True).mT.contiguous()
    # The moments of what the first matrix passes on: one response for each of its rows and each frequency.
    half_GRFN = torch.einsum("gri,gifn->grfn", first_GRI, gram_GNN.unflatten(1, (-1, frequencies)))
    passed_GRFSH = torch.einsum("grfjh,gsj->grfsh", half_GRFN.unflatten(3, (-1, frequencies)), first_GRI)
    cross_GOM = coefficients_GON @ half_GRFN.flatten(1, 2).mT
    factor_GMM = torch.linalg.cholesky(_damped(passed_GRFSH.flatten(3).flatten(1, 2)))
    second_GOM = torch.cholesky_solve(cross_GOM.mT, factor_GMM).mT
    return Pair(first_GRI[..., None], second_GOM.unflatten(2, (-1, frequencies)), powers_GI)


def power_outside(powers_GQ: Tensor, most: int, steps: int = SPECTRUM_STEPS) -> Tensor:
    """Return the share of the power outside the leading k directions of each group, summed over groups.

    k goes from 0 to ``most`` in equal steps. Between two whole numbers, the share is interpolated linearly.

    >>> power_outside(torch.tensor([[1.0, 3.0]]), 2, 4).tolist()
    [1.0, 0.625, 0.25, 0.125, 0.0]

    Args:
        powers_GQ: the power in each direction, the smallest first; see `Pair`.
        most: the full rank of each group.

    Returns:
        ``steps`` + 1 shares; NaN if there is no power.
    """
    powers_Q = powers_GQ[:, -most:].clamp_min(0).sum(0)
    outside_K = torch.cat([powers_Q.new_zeros(1), powers_Q.cumsum(0)]).flip(0)
    ranks = torch.arange(steps + 1, dtype=outside_K.dtype, device=outside_K.device) * most / steps
    lower = ranks.floor().long()
    upper = (lower + 1).clamp_max(most)
    return torch.lerp(outside_K[lower], outside_K[upper], ranks - lower) / outside_K[0]


def _leading(moments_GNN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors of the largest eigenvalues, the largest first, and all values, the smallest first."""
    values_GN, vectors_GNN = torch.linalg.eigh(moments_GNN)
    return vectors_GNN[..., -rank:].flip(-1), values_GN


def _damped(gram_GNN: Tensor) -> Tensor:
    """Return moments with a small number added to their diagonal."""
    powers_GN = gram_GNN.diagonal(dim1=1, dim2=2)
    amount_G1 = _DAMPING * powers_GN.mean(1, keepdim=True).clamp_min(torch.finfo(powers_GN.dtype).tiny)
    return gram_GNN + torch.diag_embed(amount_G1.expand(powers_GN.shape))
