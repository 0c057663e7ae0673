"""The interface to the least-squares problem of one layer; solvers.py implements it in three ways.

Let z be the responses of the layer's input in the converted network, at sampled positions. Let the residual u be the
output of the original layer minus the output of the converted layer. Find the change D of the coefficients and the
change b of the bias that minimise sum |u - D z - b|^2 + d |D|^2, where d is the damping.

With the coefficients C = C0 + D, C0 the projection, this is the same as C = (H + d C0)(G + d I)^-1, with
G = sum z z^T and H = sum (W x) z^T (without a bias). Solving for D loses no digits, and with strong damping the
solution is the projection C0. The bias is not damped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..kernels.projection import from_groups, merge
from ..network.distributed import sum_over_ranks
from .capture import ConvCall
from .responses import outputs, pick_positions

_ROWS = 1024  # positions that are processed at a time: their responses fit into the processor's caches
_CHUNK = 1 << 25  # values of input windows that are processed at a time: 256 MB in float64


@dataclass(frozen=True)
class Change:
    """The change of a layer's effective coefficients (G, O, I F) and bias (G, O), and the damping of the solution."""

    coefficients: Tensor
    bias: Tensor | None
    damping: float | None = None


@dataclass(frozen=True)
class Layer:
    """The facts about one convolution that the equations need.

    ``coefficients`` (G, O per group, I F): those of the effective kernel. ``basis`` (F, K). ``sample_count``: number of
    positions that are sampled of each example. Classes that standardise their kernels restrict the change: it has no
    component along ``direction`` (I F,), the unit vector of the mean, which these classes subtract; and with
    ``fixed_norm`` the norm of each channel does not change.
    """

    coefficients: Tensor
    basis: Tensor
    kernel_size: tuple[int, ...]
    transposed: bool
    fits_bias: bool
    sample_count: int
    seed: int
    direction: Tensor | None = None
    fixed_norm: bool = False

    @property
    def unknowns(self) -> int:
        """Return the number of unknowns of each output channel, without the bias."""
        return self.coefficients.shape[2]

    def restricted(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (..., I F) without their component along ``direction``."""
        if self.direction is None:
            return rows
        return rows - (rows @ self.direction)[..., None] * self.direction

    def reachable(self, change: Change) -> Change:
        """Return the change that is nearest to ``change`` among those that the class of the convolution allows."""
        if not self.fixed_norm:
            return change
        target = self.coefficients + change.coefficients
        norm = target.norm(dim=2, keepdim=True)
        scale = torch.where(norm > 0, self.coefficients.norm(dim=2, keepdim=True) / norm.clamp_min(1e-300), 1.0)
        return replace(change, coefficients=target * scale - self.coefficients)

    def kernel(self, coefficients_GON: Tensor) -> Tensor:
        """Return the kernel, in torch's shape, of coefficients (G, O, I F)."""
        coefficients = from_groups(coefficients_GON, len(self.basis), self.transposed)
        return merge(coefficients, self.basis.to(coefficients)).unflatten(2, self.kernel_size)


class Problem:
    """The least-squares problem of one layer on one part of the calibration inputs.

    ``count``: number of positions; ``inputs``: number of inputs; ``condition``: condition number of the second moments,
    after solving; ``channels`` (6, G, O): sums for each output channel.
    """

    name = ""

    def __init__(self, layer: Layer) -> None:
        groups, out, _ = layer.coefficients.shape
        self.layer = layer
        self.count = 0
        self.inputs = 0
        self.condition: float | None = None
        # Sums of u, a, a a, a u, u u and y y for each channel: residual u, the converted layer's output a without its
        # bias, the original layer's output y.
        self.channels = layer.coefficients.new_zeros(6, groups, out)

    def add(self, call: ConvCall, target_NPO: Tensor, examples: Sequence[int]) -> None:
        """Add one call of the layer to the sums.

        Args:
            call: the call in the converted network, N examples.
            target_NPO: the original layer's output at the positions of `pick_positions`.
            examples: the number of each of the N examples in the whole calibration set.
        """
        rows = min(_ROWS, _CHUNK // (call.input.shape[1] * prod(self.layer.kernel_size)))
        step = max(1, rows // target_NPO.shape[1])
        for start in range(0, len(call.input), step):
            part = slice(start, start + step)
            picks = pick_positions(examples[part], call.output.shape[2:], self.layer.sample_count, self.layer.seed)
            self._add(replace(call, input=call.input[part], output=call.output[part]), target_NPO[part], picks)

    def _add(self, call: ConvCall, target_NPO: Tensor, picks: Tensor | None) -> None:
        shape = (-1, *self.channels.shape[1:])
        target_RGO = target_NPO.to(self.channels.device).to(torch.float64).reshape(shape)
        output_RGO = outputs(call.output, picks).to(self.channels.device).to(torch.float64).reshape(shape)
        residual_RGO = target_RGO - output_RGO
        if call.bias is not None:
            output_RGO = output_RGO - call.bias.to(output_RGO).view(output_RGO.shape[1:])
        products = (output_RGO * output_RGO, output_RGO * residual_RGO, residual_RGO**2, target_RGO**2)
        self.channels += torch.stack([t.sum(0) for t in (residual_RGO, output_RGO, *products)])
        self.count += len(residual_RGO)
        self._accumulate(call, residual_RGO, picks)

    def reduce(self) -> None:
        """Sum over all processes. Call this once, after all inputs are added."""
        counts = self.channels.new_tensor([self.count, self.inputs])
        sum_over_ranks([self.channels, counts, *self._sums()])
        self.count, self.inputs = (round(number) for number in counts.tolist())

    @property
    def finite(self) -> bool:
        """Return whether all activations were finite."""
        return bool(self.channels.isfinite().all())

    def error(self, change: Change | None) -> float:
        """Return the relative output error |u - D z - b| / |y| after a change (None: without a change)."""
        squares, power = self.channels[4].sum().item(), self.channels[5].sum().item()
        if change is not None:
            squares += self.change_of_squares(change)
        return (max(squares, 0.0) / power) ** 0.5 if power > 0 else 0.0

    def rescaling(self) -> Change:
        """Return the change that multiplies each channel by its best factor and corrects its bias.

        This repairs the mean and variance of each channel (bias correction).
        """
        u, a, aa, au = self.channels[:4]
        if self.layer.fits_bias:
            aa, au = aa - a * a / self.count, au - a * u / self.count
        # A channel whose output is (nearly) zero keeps its scale: its factor would be a quotient of rounding errors.
        factor = torch.where(aa > 1e-12 * self.channels[5].clamp_min(1e-300), au / aa.clamp_min(1e-300), 0.0)
        bias = (u - factor * a) / self.count if self.layer.fits_bias else None
        return Change(self.layer.coefficients * factor[..., None], bias)

    def with_best_bias(self, coefficients_GON: Tensor, damping: float | None = None) -> Change:
        """Return a change of the coefficients, with the change of the bias that is best for it."""
        if not self.layer.fits_bias:
            return Change(coefficients_GON, None, damping)
        means_GO = (coefficients_GON @ self.response_sums_GN[..., None])[..., 0]
        return Change(coefficients_GON, (self.channels[0] - means_GO) / self.count, damping)

    @property
    def response_sums_GN(self) -> Tensor:
        """Return the sums of the responses."""
        raise NotImplementedError

    def candidates(self, dampings: Sequence[float]) -> Iterator[Change]:
        """Yield the solutions for the given dampings (relative to the mean square of the responses).

        ``dampings``: sorted from the strongest to the weakest.
        """
        raise NotImplementedError

    def _accumulate(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        raise NotImplementedError

    def _sums(self) -> list[Tensor]:
        """Return the tensors that are summed over the processes."""
        return []

    def change_of_squares(self, change: Change, effects_GOO: Tensor | None = None) -> float:
        """Return by how much a change alters the sum of squared residuals.

        Args:
            effects_GOO: a quadratic form, in which squares of residuals are taken; `Operator` ignores it.
        """
        raise NotImplementedError
