"""The least-squares problem of one layer: one interface, behind which solvers.py holds it in one of three ways.

Over positions p, with the responses z of what the converted network feeds the layer and the residual u = what the
original layer answered - what the converted one does, find the change D of the coefficients (and b of the bias) with
least sum |u - D z - b|^2 + d |D|^2. That is DESIGN 4's C = (H + d C0)(G + d I)^-1 with C = C0 + D: written in D it
loses no digits, and at large d its solution is the projection C0 itself. The bias has a row of its own, undamped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..kernels.projection import merge
from ..network.distributed import sum_over_ranks
from .capture import ConvCall
from .responses import from_groups, outputs, pick_positions

_ROWS = 1024  # positions at a time: what is made of so many stays in caches and on the heap
_CHUNK = 1 << 25  # values of windows at a time: 256 MB in float64


@dataclass(frozen=True)
class Change:
    """What to add to a layer's effective coefficients (G, O, I F) and bias (G, O); how it was found."""

    coefficients: Tensor
    bias: Tensor | None
    damping: float | None = None


@dataclass(frozen=True)
class Layer:
    """One convolution as the equations see it: ``coefficients`` (G, O per group, I F) of its effective kernel.

    Classes that standardise their kernel bound the change: no part along ``direction`` (I F,), a unit vector (the mean,
    which they take away), and with ``fixed_norm`` each channel at the norm it has. ``wanted`` positions of each example
    are sampled.
    """

    coefficients: Tensor
    basis: Tensor
    kernel_size: tuple[int, ...]
    transposed: bool
    fits_bias: bool
    wanted: int
    seed: int
    direction: Tensor | None = None
    fixed_norm: bool = False

    @property
    def unknowns(self) -> int:
        """Unknowns of each output channel, its bias aside."""
        return self.coefficients.shape[2]

    def restricted(self, rows: Tensor) -> Tensor:
        """``rows`` (..., I F) without their part along ``direction``."""
        if self.direction is None:
            return rows
        return rows - (rows @ self.direction)[..., None] * self.direction

    def reachable(self, change: Change) -> Change:
        """The change nearest to ``change`` that the class of convolution can make."""
        if not self.fixed_norm:
            return change
        target = self.coefficients + change.coefficients
        norm = target.norm(dim=2, keepdim=True)
        scale = torch.where(norm > 0, self.coefficients.norm(dim=2, keepdim=True) / norm.clamp_min(1e-300), 1.0)
        return replace(change, coefficients=target * scale - self.coefficients)

    def kernel(self, coefficients_GON: Tensor) -> Tensor:
        """The kernel, in torch's shape, of coefficients in groups."""
        coefficients = from_groups(coefficients_GON, len(self.basis), self.transposed)
        return merge(coefficients, self.basis.to(coefficients)).unflatten(2, self.kernel_size)


class Problem:
    """One layer over one part of the calibration inputs."""

    name = ""

    def __init__(self, layer: Layer) -> None:
        groups, out, _ = layer.coefficients.shape
        self.layer = layer
        self.count = 0
        self.inputs = 0
        self.condition: float | None = None
        # Rows: sum of u, of the layer's own answer a (bias aside), of a a, of a u, of u u, of y y, for each channel.
        self.channels = layer.coefficients.new_zeros(6, groups, out)

    def add(self, call: ConvCall, target_NPO: Tensor, examples: Sequence[int]) -> None:
        """Take in one call: what the converted network fed the layer, and what the original layer answered at the
        positions that `pick_positions` gives.

        ``examples``: the number of each of the N examples in the whole calibration set.
        """
        rows = min(_ROWS, _CHUNK // (call.input.shape[1] * prod(self.layer.kernel_size)))
        step = max(1, rows // target_NPO.shape[1])
        for start in range(0, len(call.input), step):
            part = slice(start, start + step)
            picks = pick_positions(examples[part], call.output.shape[2:], self.layer.wanted, self.layer.seed)
            self._add(replace(call, input=call.input[part], output=call.output[part]), target_NPO[part], picks)

    def _add(self, call: ConvCall, target_NPO: Tensor, picks: Tensor | None) -> None:
        shape = (-1, *self.channels.shape[1:])
        target_RGO = target_NPO.to(self.channels.device).to(torch.float64).reshape(shape)
        answer_RGO = outputs(call.output, picks).to(self.channels.device).to(torch.float64).reshape(shape)
        residual_RGO = target_RGO - answer_RGO
        if call.bias is not None:
            answer_RGO = answer_RGO - call.bias.to(answer_RGO).view(answer_RGO.shape[1:])
        products = (answer_RGO * answer_RGO, answer_RGO * residual_RGO, residual_RGO**2, target_RGO**2)
        self.channels += torch.stack([t.sum(0) for t in (residual_RGO, answer_RGO, *products)])
        self.count += len(residual_RGO)
        self._keep(call, residual_RGO, picks)

    def reduce(self) -> None:
        """Sum over the processes; called once, when all inputs are taken in."""
        counts = self.channels.new_tensor([self.count, self.inputs])
        sum_over_ranks([self.channels, counts, *self._sums()])
        self.count, self.inputs = (round(number) for number in counts.tolist())

    @property
    def finite(self) -> bool:
        """Whether all activations were."""
        return bool(self.channels.isfinite().all())

    def error(self, change: Change | None) -> float:
        """Relative output error, |u - D z - b| / |y|, after a change (None: as the layer is)."""
        squares, power = self.channels[4].sum().item(), self.channels[5].sum().item()
        if change is not None:
            squares += self._squares_added(change)
        return (max(squares, 0.0) / power) ** 0.5 if power > 0 else 0.0

    def rescaling(self) -> Change:
        """Each channel's mean and variance repaired (bias correction): its best single factor, and its best bias."""
        u, a, aa, au = self.channels[:4]
        if self.layer.fits_bias:
            aa, au = aa - a * a / self.count, au - a * u / self.count
        # A factor of noise over noise is none: a silent channel keeps its scale.
        factor = torch.where(aa > 1e-12 * self.channels[5].clamp_min(1e-300), au / aa.clamp_min(1e-300), 0.0)
        bias = (u - factor * a) / self.count if self.layer.fits_bias else None
        return Change(self.layer.coefficients * factor[..., None], bias)

    def candidates(self, dampings: Sequence[float]) -> Iterator[Change]:
        """Solutions from the strongest damping (relative to the mean square of the responses) to the weakest."""
        raise NotImplementedError

    def _keep(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        raise NotImplementedError

    def _sums(self) -> list[Tensor]:
        return []

    def _squares_added(self, change: Change) -> float:
        raise NotImplementedError
