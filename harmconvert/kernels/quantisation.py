"""Quantise coefficients so that a layer's output changes least: successive rounding with feedback. Tensors only.

The output of a layer is C z. Its squared error is the sum over rows of e^T M e with e the error of a row of C and
M = E[z z^T]. With the Cholesky factor R of M (R^T R = M, upper triangular) this is the sum of
(R_ii e_i + sum over j > i of R_ij e_j)^2. So the columns are rounded from the last to the first, and each is first
corrected by the errors that were already made (Babai 1986; GPTQ, Frantar et al. 2022). With steps in proportion to
1 / R_ii and entropy coding this is near the rate-distortion bound (WaterSIC, arXiv:2603.04956).

Two things bring it nearer to the bound:

- At few bits, the bound gives no bits to directions in which the output hardly depends on the coefficients. Adding
  ``level`` / variance to the diagonal of M does the same: it is the penalty that a Gaussian prior puts on the length of
  the code, and the target becomes the ridge solution.
- Rounding each column to the nearest integer is greedy. Several partial roundings of a row are kept (``survivors``),
  as in the M-algorithm (Anderson and Mohan 1984), and the best one is taken at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of one block: the update of all columns before a block is one matrix product.
_BLOCK = 32
# The most bytes that the pending targets of all survivors may need.
_ROOM = 1 << 28


@dataclass(frozen=True)
class Metric:
    """The quadratic form in which the error of a layer's coefficients is measured, and its minimum.

    ``target_GON``: the coefficients with the least error, (groups, rows, columns). ``factor_GNN``: the upper Cholesky
    factor of the form.
    """

    target_GON: Tensor
    factor_GNN: Tensor

    @property
    def lengths_GN(self) -> Tensor:
        """Return the diagonal of the factor: the error of a unit change of each column after feedback."""
        return self.factor_GNN.diagonal(dim1=1, dim2=2)


def metric_at(gram_GNN: Tensor, cross_GON: Tensor, variances_GN: Tensor, level: float) -> Metric:
    """Return the metric for a distortion of ``level`` in each direction.

    It is the form C M C^T - 2 C H^T with M = G + level diag(1 / variances), whose minimum is C = H M^-1.

    >>> metric = metric_at(torch.eye(2)[None].double(), torch.ones(1, 1, 2).double(), torch.ones(1, 2).double(), 0.25)
    >>> [round(value, 6) for value in metric.target_GON.flatten().tolist()]
    [0.8, 0.8]

    Args:
        gram_GNN: second moments G of the responses, float64, (groups, N, N).
        cross_GON: products H of the outputs with the responses, float64, (groups, rows, N).
        variances_GN: mean squares of the coefficients of each column.
        level: squared output error of one direction, in the unit of G times variances.

    Raises:
        torch.linalg.LinAlgError: G is not positive semidefinite, or the level is 0 and G is singular.
    """
    penalty_GN = level / variances_GN.clamp_min(torch.finfo(variances_GN.dtype).tiny)
    form_GNN = gram_GNN.clone()
    form_GNN.diagonal(dim1=1, dim2=2).add_(penalty_GN)
    factor_GNN = torch.linalg.cholesky(form_GNN, upper=True)
    del form_GNN
    target_GON = torch.cholesky_solve(cross_GON.mT, factor_GNN, upper=True).mT
    return Metric(target_GON, factor_GNN)


def shrunk(gram_GNN: Tensor, share: float, even: bool = False) -> Tensor:
    """Return the second moments with a share of all products of different responses set to zero.

    ``even``: instead, replace this share of the moments by the same power in every direction.

    >>> gram = torch.tensor([[[1.0, 1.0], [1.0, 3.0]]])
    >>> shrunk(gram, 0.5).tolist(), shrunk(gram, 0.5, even=True).tolist()
    ([[[1.0, 0.5], [0.5, 3.0]]], [[[1.5, 0.5], [0.5, 2.5]]])
    """
    powers_GN = gram_GNN.diagonal(dim1=1, dim2=2)
    if even:
        powers_GN = powers_GN.mean(1, keepdim=True).expand(powers_GN.shape)
    shrunk_GNN = gram_GNN * (1 - share)
    shrunk_GNN.diagonal(dim1=1, dim2=2).add_(share * powers_GN)
    return shrunk_GNN


def row_bits(gram_GNN: Tensor, variances_GN: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the bits of one row of Gaussian coefficients at each level, (levels, groups).

    This is half the logarithm of det(I + V G / level) with V = diag(variances), the rate of a code that has the squared
    output error ``level`` in each direction that is coded.

    >>> row_bits(torch.eye(3)[None].double(), torch.ones(1, 3).double(), [1 / 3, 1 / 15]).round(decimals=6).tolist()
    [[3.0], [6.0]]
    """
    root_GN = variances_GN.sqrt()
    form_GNN = root_GN[..., None] * gram_GNN * root_GN[:, None]
    bits, spectrum_GN = [], None
    for level in levels:
        factor_GNN, info_G = torch.linalg.cholesky_ex(form_GNN / level + torch.eye(form_GNN.shape[1]).to(form_GNN))
        row_G = factor_GNN.diagonal(dim1=1, dim2=2).log2().sum(1)
        if info_G.any():  # rounding made a singular form indefinite: there were few inputs, and the level is low
            if spectrum_GN is None:
                spectrum_GN = torch.linalg.eigvalsh(form_GNN.double())
                rounding_G1 = torch.finfo(form_GNN.dtype).eps * spectrum_GN.amax(1, keepdim=True)
                spectrum_GN = spectrum_GN.where(spectrum_GN > rounding_G1, 0)
            row_G = ((1 + spectrum_GN / level).log2().sum(1) / 2).to(row_G)
        bits.append(row_G)
    return torch.stack(bits)


def steps_at(metric: Metric, level: float) -> Tensor:
    """Return the step of each column with which the squared output error of each direction is ``level``, (groups, N).

    >>> metric = Metric(torch.zeros(1, 1, 2), torch.diag(torch.tensor([1.0, 2.0]))[None])
    >>> steps_at(metric, 1 / 12).tolist()
    [[1.0, 0.5]]
    """
    return math.sqrt(12 * level) / metric.lengths_GN


def quantise(metric: Metric, steps_GN: Tensor, survivors: int = 1, largest: float = math.inf) -> Tensor:
    """Return integers (groups, rows, columns), float64: integers times steps have a small error in the metric.

    With one survivor, the error of each row is at most the sum over the columns of (R_ii steps_i)^2 / 4. More survivors
    never give a row a larger error than the best of them.

    >>> metric = Metric(torch.tensor([[[0.4, 0.4]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.1]]]))
    >>> quantise(metric, torch.ones(1, 2)).tolist()
    [[[1.0, 0.0]]]

    Args:
        steps_GN: the step of each column, above 0.
        survivors: partial roundings of each row that are kept. The time is proportional to their number.
        largest: the largest magnitude of an integer. Coefficients that have it keep it, whatever the feedback says.
    """
    groups, rows, columns = metric.target_GON.shape
    each = 8 * survivors * max(columns, 1)
    row_count = max(1, min(rows, _ROOM // each))
    group_count = max(1, _ROOM // (each * row_count))
    out_GON = torch.empty_like(metric.target_GON)
    for first in range(0, groups, group_count):
        some = slice(first, first + group_count)
        for start in range(0, rows, row_count):
            part = slice(start, start + row_count)
            target = metric.target_GON[some, part]
            out_GON[some, part] = _quantise(target, metric.factor_GNN[some], steps_GN[some], survivors, largest)
    return out_GON


def _quantise(target_GON: Tensor, factor_GNN: Tensor, steps_GN: Tensor, survivors: int, largest: float) -> Tensor:
    """Quantise all rows at once. Values are in units of the steps, so that they are rounded to integers."""
    groups, rows, columns = target_GON.shape
    weights_GN = (factor_GNN.diagonal(dim1=1, dim2=2) * steps_GN).square()
    target_GON = target_GON / steps_GN[:, None]
    ratios_GNN = factor_GNN * steps_GN[:, None] / (factor_GNN.diagonal(dim1=1, dim2=2) * steps_GN)[..., None]
    pending = target_GON[:, :, None]  # (G, O, survivors, N): targets corrected by the errors so far
    costs = target_GON.new_zeros(groups, rows, 1)
    blocks: list[tuple[Tensor, Tensor]] = []
    for block in _blocks_from_last(columns):
        search = _BlockSearch(pending[..., block], costs, survivors, largest)
        for column in range(block.stop - 1, block.start - 1, -1):
            ratios_GB = ratios_GNN[:, block, column]
            search.round(column - block.start, target_GON[..., column], weights_GN[:, column], ratios_GB)
        costs, (integers, origins) = search.costs, search.result()
        blocks.append((integers, origins))
        if block.start:
            errors = target_GON[:, :, None, block] - integers
            pending = _choose(pending[..., : block.start], origins)
            pending = pending + (errors.flatten(1, 2) @ ratios_GNN[:, : block.start, block].mT).view_as(pending)
    chosen = costs.argmin(-1, keepdim=True)
    parts = []
    for integers, origins in reversed(blocks):
        parts.append(_choose(integers, chosen)[:, :, 0])
        chosen = origins.gather(2, chosen)
    return torch.cat(parts, -1)


def _blocks_from_last(columns: int) -> Iterator[slice]:
    for end in range(columns, 0, -_BLOCK):
        yield slice(max(0, end - _BLOCK), end)


def _choose(values: Tensor, survivors: Tensor) -> Tensor:
    """Return values (G, O, K, N) of the given survivors (G, O, K')."""
    if values.shape[2] == survivors.shape[2] == 1:
        return values
    count = values.shape[2]
    firsts = torch.arange(0, values[..., 0].numel(), count, device=values.device).view(*survivors.shape[:2], 1)
    # Copying whole rows is several times faster than `gather`, which reads an index for each value.
    return values.flatten(0, 2).index_select(0, (firsts + survivors).flatten()).view(*survivors.shape, -1)


class _BlockSearch:
    """The search in one block of columns: rounds one column after the other, and keeps the best survivors of each row.

    ``costs``: the squared errors of the survivors, (groups, rows, survivors).
    """

    def __init__(self, pending: Tensor, costs: Tensor, most: int, largest: float) -> None:
        self._pending, self.costs, self._most, self._largest = pending.clone(), costs, most, largest
        self._steps: list[tuple[Tensor, Tensor | None]] = []

    def round(self, column: int, target_GO: Tensor, weight_G: Tensor, ratios_GB: Tensor) -> None:
        """Round one column of all survivors, and correct the columns before it."""
        x = self._pending[..., column]
        nearest = self._within(x.round(), target_GO)
        parents = None
        if self._most == 1:
            chosen = nearest
            self.costs = self.costs + weight_G[:, None, None] * (x - nearest).square()
        else:
            second = self._within(nearest + torch.where(x >= nearest, 1.0, -1.0).to(x), target_GO)
            integers, count = torch.cat([nearest, second], 2), x.shape[2]
            costs = self.costs.repeat(1, 1, 2) + weight_G[:, None, None] * (x.repeat(1, 1, 2) - integers).square()
            self.costs, best = costs.topk(min(self._most, 2 * count), 2, largest=False, sorted=False)
            parents, chosen = best % count, integers.gather(2, best)
            self._pending = _choose(self._pending, parents)
        self._steps.append((chosen, parents))
        if column:
            errors = target_GO[..., None] - chosen
            self._pending[..., :column] += errors[..., None] * ratios_GB[:, None, None, :column]

    def _within(self, integers_GOK: Tensor, target_GO: Tensor) -> Tensor:
        """Return integers that are not larger than the largest; those whose target is the largest are equal to it."""
        if self._largest == math.inf:
            return integers_GOK
        fixed_GO1 = target_GO.round()[..., None]
        limited_GOK = integers_GOK.clamp(-self._largest, self._largest)
        return torch.where(
            fixed_GO1.abs() >= self._largest, fixed_GO1.clamp(-self._largest, self._largest), limited_GOK
        )

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the integers of the block (G, O, survivors, columns), and the survivor from which each one began."""
        at = torch.arange(self.costs.shape[2], device=self.costs.device).expand(self.costs.shape)
        integers = []
        for chosen, parents in reversed(self._steps):
            integers.append(chosen.gather(2, at))
            at = at if parents is None else parents.gather(2, at)
        return torch.stack(integers, -1), at
