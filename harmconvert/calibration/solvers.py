"""Three ways to store and solve a layer's equations, and the choice among them.

- `NormalEquations` stores sum z z^T. Its size is the square of the unknowns, for any number of positions.
- `Samples` stores every z. This is less if there are fewer positions than unknowns (the dual form).
- `Operator` stores the layer's inputs and solves by conjugate gradients. Nothing grows with a square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.projection import to_groups
from ..network.distributed import sum_over_ranks
from .capture import ConvCall
from .equations import Change, Layer, Problem
from .responses import responses

_LARGEST_EIGENPROBLEM = 12288  # about five minutes on two cores; conjugate gradients are faster for larger problems
_STRIP = 512  # second moments are summed in strips of rows up to the diagonal: half the work from 2,000 unknowns on
# Above this, a Cholesky factorisation for each damping is faster than one eigendecomposition.
_LARGEST_QUICK_EIGENPROBLEM = 2048
_STEPS = 60  # steps of conjugate gradients for a single damping; with several dampings, each has a quarter of them


class NormalEquations(Problem):
    """Stores sums of products of responses and residuals, per group, float64; solves by one eigendecomposition."""

    name = "normal equations"

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        groups, out, unknowns = layer.coefficients.shape
        self.gram_GNN = layer.coefficients.new_zeros(groups, unknowns, unknowns)
        self.cross_GON = layer.coefficients.new_zeros(groups, out, unknowns)
        self.sum_GN = layer.coefficients.new_zeros(groups, unknowns)

    def _accumulate(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        self.accumulate(responses(call, self.layer.basis, picks).to(self.gram_GNN.device), residual_RGO)

    def accumulate(self, z_RGN: Tensor, residual_RGO: Tensor) -> None:
        """Add responses and residuals to the sums."""
        self._add_moments(z_RGN)
        self.cross_GON += residual_RGO.permute(1, 2, 0) @ z_RGN.transpose(0, 1)

    def _add_moments(self, z_RGN: Tensor) -> None:
        """Add the second moments on and below the diagonal, in the dtype of their sums; `reduce` copies the others."""
        z_GRN = z_RGN.transpose(0, 1).to(self.gram_GNN.dtype)
        for start in range(0, self.layer.unknowns, _STRIP):
            rows, left = slice(start, start + _STRIP), slice(start + _STRIP)
            if len(z_GRN) == 1:
                self.gram_GNN[0, rows, left].addmm_(z_GRN[0, :, rows].T, z_GRN[0, :, left])
            else:
                self.gram_GNN[:, rows, left].baddbmm_(z_GRN[:, :, rows].mT, z_GRN[:, :, left])
        self.sum_GN += z_RGN.sum(0)

    def _sums(self) -> list[Tensor]:
        return [self.gram_GNN, self.cross_GON, self.sum_GN]

    def reduce(self) -> None:
        """Sum over all processes, then copy the part below the diagonal to the part above it."""
        super().reduce()
        for start in range(_STRIP, self.gram_GNN.shape[1], _STRIP):
            rows, left = slice(start, start + _STRIP), slice(start)
            self.gram_GNN[:, left, rows] = self.gram_GNN[:, rows, left].mT

    @property
    def centred_gram(self) -> Tensor:
        """Return the sums of products of responses, centred if a bias is fitted: this eliminates the undamped bias."""
        if not self.layer.fits_bias:
            return self.gram_GNN
        return self.gram_GNN - self.sum_GN[:, :, None] * self.sum_GN[:, None] / self.count

    @property
    def response_sums_GN(self) -> Tensor:
        return self.sum_GN

    def candidates(self, dampings: Sequence[float]) -> Iterator[Change]:
        gram, cross, residual_GO = self.centred_gram, self.cross_GON, self.channels[0]
        if self.layer.fits_bias:
            cross = cross - residual_GO[..., None] * self.sum_GN[:, None] / self.count
        gram = self.layer.restricted(self.layer.restricted(gram).mT)
        if self.layer.unknowns > _LARGEST_QUICK_EIGENPROBLEM and self.layer.direction is None and len(dampings) > 1:
            yield from self._by_cholesky(gram, cross, dampings)
            return
        values_GN, vectors_GNN = torch.linalg.eigh(gram)
        usable = _usable(values_GN)
        self.condition = _condition(values_GN, usable)
        scale_G1 = values_GN.clamp_min(0).mean(1, keepdim=True)
        rotated_GON = self.layer.restricted(cross) @ vectors_GNN
        for damping in dampings:
            inverse = torch.where(usable, 1 / (values_GN + damping * scale_G1), 0.0)
            change_GON = (rotated_GON * inverse[:, None]) @ vectors_GNN.mT
            bias = None
            if self.layer.fits_bias:
                bias = (residual_GO - (change_GON @ self.sum_GN[..., None])[..., 0]) / self.count
            yield Change(change_GON, bias, damping)

    def _by_cholesky(self, gram_GNN: Tensor, cross_GON: Tensor, dampings: Sequence[float]) -> Iterator[Change]:
        """Yield the same as `candidates`, with one factorisation for each damping: faster for many unknowns.

        It ends at a damping with which the moments are singular. The condition number stays unknown.
        """
        scale_G1 = gram_GNN.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        for damping in dampings:
            form_GNN = gram_GNN.clone()
            form_GNN.diagonal(dim1=1, dim2=2).add_(damping * scale_G1)
            factor_GNN, info = torch.linalg.cholesky_ex(form_GNN)
            if bool(info.any()):
                return
            change_GON = torch.cholesky_solve(cross_GON.mT, factor_GNN).mT
            yield self.with_best_bias(change_GON, damping)

    def change_of_squares(self, change: Change, effects_GOO: Tensor | None = None) -> float:
        D = change.coefficients
        weighted = D if effects_GOO is None else effects_GOO @ D
        squares = (D @ self.gram_GNN * weighted).sum() - 2 * (weighted * self.cross_GON).sum()
        if change.bias is not None:
            b = change.bias
            weighted = b if effects_GOO is None else (effects_GOO @ b[..., None])[..., 0]
            squares += self.count * (b * weighted).sum() - 2 * (weighted * self.channels[0]).sum()
            squares += 2 * (weighted * (D @ self.sum_GN[..., None])[..., 0]).sum()
        return float(squares)


class ChannelEquations(NormalEquations):
    """Second moments within each input channel only: their size is linear in the number of channels, not quadratic."""

    name = "channels apart"

    def __init__(self, layer: Layer) -> None:
        # Always centred: the means are what channels have in common, and a bias or a later batch norm corrects these.
        Problem.__init__(self, replace(layer, fits_bias=True))
        count = len(layer.basis)
        groups = layer.coefficients.shape[0] * layer.unknowns // count
        self.gram_GNN = layer.coefficients.new_zeros(groups, count, count)
        self.sum_GN = layer.coefficients.new_zeros(groups, count)
        self.cross_GON = layer.coefficients.new_zeros(0)  # not needed, because no equations are solved

    def _accumulate(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        z_RGN = responses(call, self.layer.basis, picks).to(self.gram_GNN.device)
        z_GRN = z_RGN.reshape(len(z_RGN), *self.sum_GN.shape).transpose(0, 1)
        self.gram_GNN.baddbmm_(z_GRN.mT, z_GRN)
        self.sum_GN += z_GRN.sum(1)


class Samples(Problem):
    """Stores every response and residual, float64; solves the dual problem, whose size is the number of positions."""

    name = "dual"

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._z: list[Tensor] = []
        self._u: list[Tensor] = []

    def _accumulate(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        self.accumulate(responses(call, self.layer.basis, picks).to(self.channels.device), residual_RGO)

    def accumulate(self, z_RGN: Tensor, residual_RGO: Tensor) -> None:
        """Add responses and residuals to those that are stored."""
        self._z.append(z_RGN)
        self._u.append(residual_RGO)

    def all_samples(self) -> tuple[Tensor, Tensor]:
        """Return all responses (G, R, I F) and residuals (G, R, O)."""
        self._z, self._u = [torch.cat(self._z)], [torch.cat(self._u)]
        return self._z[0].transpose(0, 1), self._u[0].transpose(0, 1)

    @property
    def centred_samples(self) -> Tensor:
        """Return the responses (G, R, I F), centred if a bias is fitted."""
        z_GRN, _ = self.all_samples()
        return z_GRN - z_GRN.mean(1, keepdim=True) if self.layer.fits_bias else z_GRN

    @property
    def centred_gram(self) -> Tensor:
        """Return the sums of products of responses; see `NormalEquations.centred_gram`."""
        z_GRN = self.centred_samples
        return z_GRN.mT @ z_GRN

    @property
    def response_sums_GN(self) -> Tensor:
        return self.all_samples()[0].sum(1)

    def candidates(self, dampings: Sequence[float]) -> Iterator[Change]:
        z_GRN, u_GRO = self.all_samples()
        mean_G1N, mean_G1O = z_GRN.mean(1, keepdim=True), u_GRO.mean(1, keepdim=True)
        if self.layer.fits_bias:
            z_GRN, u_GRO = z_GRN - mean_G1N, u_GRO - mean_G1O
        z_GRN = self.layer.restricted(z_GRN)
        values_GR, vectors_GRR = torch.linalg.eigh(z_GRN @ z_GRN.mT)
        usable = _usable(values_GR)
        self.condition = _condition(values_GR, usable)
        scale_G1 = values_GR.clamp_min(0).sum(1, keepdim=True) / self.layer.unknowns
        rotated_GOR = u_GRO.mT @ vectors_GRR
        for damping in dampings:
            inverse = torch.where(usable, 1 / (values_GR + damping * scale_G1), 0.0)
            change_GON = (rotated_GOR * inverse[:, None]) @ vectors_GRR.mT @ z_GRN
            bias = (mean_G1O - mean_G1N @ change_GON.mT)[:, 0] if self.layer.fits_bias else None
            yield Change(change_GON, bias, damping)

    def change_of_squares(self, change: Change, effects_GOO: Tensor | None = None) -> float:
        z_GRN, u_GRO = self.all_samples()
        added_GRO = z_GRN @ change.coefficients.mT
        if change.bias is not None:
            added_GRO = added_GRO + change.bias[:, None]
        weighted_GRO = added_GRO if effects_GOO is None else added_GRO @ effects_GOO
        return float((weighted_GRO * (added_GRO - 2 * u_GRO)).sum())


@dataclass(frozen=True)
class _Unknowns:
    """Coefficients (G, O, I F) and bias (G, O), treated as one vector for each output channel."""

    kernel: Tensor
    bias: Tensor

    def __add__(self, other: _Unknowns) -> _Unknowns:
        return _Unknowns(self.kernel + other.kernel, self.bias + other.bias)

    def __sub__(self, other: _Unknowns) -> _Unknowns:
        return _Unknowns(self.kernel - other.kernel, self.bias - other.bias)

    def scaled(self, factors_GO: Tensor) -> _Unknowns:
        return _Unknowns(self.kernel * factors_GO[..., None], self.bias * factors_GO)

    def dot(self, other: _Unknowns) -> Tensor:
        return (self.kernel * other.kernel).sum(-1) + self.bias * other.bias


class Operator(Problem):
    """Stores the layer's inputs and residual maps; solves all output channels at the same time by conjugate gradients.

    This needs only the convolution and its transpose. The iteration starts from the projection and goes from strong to
    weak damping. Each step fits the strongest remaining directions, so stopping early also regularises (Hanke,
    Conjugate Gradient Type Methods, ch. 3).
    """

    name = "conjugate gradients"

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._calls: list[tuple[ConvCall, Tensor]] = []
        self._power = self.channels.new_zeros(len(self.channels[0]))  # trace of G, per group
        self._sum = layer.coefficients.new_zeros(len(self.channels[0]), layer.unknowns)

    def _accumulate(self, call: ConvCall, residual_RGO: Tensor, picks: Tensor | None) -> None:
        assert picks is None  # the convolution computes all positions
        z_RGN = responses(call, self.layer.basis)
        self._power += z_RGN.square().sum((0, 2))
        self._sum += z_RGN.sum(0)
        # Steps and gradients can be out of the range of half precision.
        input = call.input.to(torch.promote_types(call.input.dtype, torch.float32), copy=True)
        residual_NOP = residual_RGO.reshape(len(call.output), -1, call.output.shape[1]).transpose(1, 2)
        residual = residual_NOP.reshape(call.output.shape).to(input.device, input.dtype)
        self._calls.append((replace(call, input=input, output=residual), residual))

    def _sums(self) -> list[Tensor]:
        return [self._power, self._sum]

    @property
    def bytes(self) -> int:
        """Return the memory of the stored maps."""
        tensors = (t for call, residual in self._calls for t in (call.input, residual))
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def response_sums_GN(self) -> Tensor:
        return self._sum

    def output_moments(self, coefficients_GON: Tensor) -> tuple[Tensor, Tensor]:
        """Return second moments of the outputs of given coefficients (G, O, O), and the mean power of a response (G,).

        Both are sums over all positions, centred if a bias is fitted.
        """
        groups, out, _ = coefficients_GON.shape
        moments_GOO = coefficients_GON.new_zeros(groups, out, out)
        for one_map in self._outputs(coefficients_GON, None):
            y_GRO = one_map.flatten(2).transpose(0, 1).flatten(1).to(moments_GOO).unflatten(0, (groups, out)).mT
            moments_GOO += y_GRO.mT @ y_GRO
        power_G = self._power.clone()
        sum_over_ranks([moments_GOO])
        if self.layer.fits_bias:
            mean_GO1 = coefficients_GON @ self._sum[..., None]
            moments_GOO -= mean_GO1 @ mean_GO1.mT / self.count
            power_G -= self._sum.square().sum(1) / self.count
        return moments_GOO, power_G / self.layer.unknowns

    def candidates(self, dampings: Sequence[float]) -> Iterator[Change]:
        power = self._power - (self._sum.square().sum(1) / self.count if self.layer.fits_bias else 0)
        scale_G11 = (power / self.layer.unknowns).view(-1, 1, 1)
        right_side = self._transpose(residual for _, residual in self._calls)
        state = _Unknowns(torch.zeros_like(right_side.kernel), torch.zeros_like(right_side.bias))
        # Each damping starts from the solution of the stronger one before it; strong dampings need two or three steps.
        limit = _STEPS if len(dampings) == 1 else _STEPS // 4
        for damping in dampings:
            state = self._conjugate_gradients(state, right_side, damping * scale_G11, limit)
            yield Change(state.kernel, state.bias if self.layer.fits_bias else None, damping)

    def _conjugate_gradients(self, x: _Unknowns, right_side: _Unknowns, damping: Tensor, limit: int) -> _Unknowns:
        """Solve (G + damping) x = right_side from a start value x; each output channel has its own step lengths."""
        residual = right_side - self._normal(x, damping)
        step, squares = residual, residual.dot(residual)
        small = (1e-8 if bool((damping > 0).all()) else 1e-24) * right_side.dot(right_side).max()
        for _ in range(limit):
            if squares.max() <= small:
                break
            image = self._normal(step, damping)
            curvature = step.dot(image)
            length = torch.where(curvature > 0, squares / curvature.clamp_min(1e-300), 0.0)
            x, residual = x + step.scaled(length), residual - image.scaled(length)
            squares_before, squares = squares, residual.dot(residual)
            ratio = torch.where(squares_before > 0, squares / squares_before.clamp_min(1e-300), 0.0)
            step = residual + step.scaled(ratio)
        return x

    def _normal(self, x: _Unknowns, damping: Tensor) -> _Unknowns:
        """Return (G + damping) x; the bias is not damped."""
        image = self._transpose(self._outputs(x.kernel, x.bias))
        return replace(image, kernel=image.kernel + damping * x.kernel)

    def _outputs(self, coefficients: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        return (
            call.apply(
                call.input,
                self.layer.kernel(coefficients).to(call.input),
                None if bias is None else bias.flatten().to(call.input),
            )
            for call, _ in self._calls
        )

    def _transpose(self, maps: Iterable[Tensor]) -> _Unknowns:
        """Return the sums over positions of map x responses, and of the map (zero if no bias is fitted)."""
        groups, out, _ = self.layer.coefficients.shape
        total = torch.zeros_like(self.layer.kernel(self.layer.coefficients))
        bias = torch.zeros_like(self.channels[0])
        for (call, _), one_map in zip(self._calls, maps, strict=True):
            with torch.enable_grad():
                kernel = total.to(call.input, copy=True).requires_grad_()
                (gradient,) = torch.autograd.grad(call.apply(call.input, kernel), kernel, one_map.to(call.input))
            total += gradient
            bias += one_map.to(torch.float64).transpose(0, 1).flatten(1).sum(1).view(groups, out).to(bias)
        sum_over_ranks([total, bias])
        coefficients_OIF = total.flatten(2) @ self.layer.basis.T.to(total)
        coefficients = to_groups(coefficients_OIF, groups, self.layer.transposed)
        return _Unknowns(self.layer.restricted(coefficients), bias if self.layer.fits_bias else torch.zeros_like(bias))

    def change_of_squares(self, change: Change, effects_GOO: Tensor | None = None) -> float:
        total = self.channels.new_zeros(1)
        added = self._outputs(change.coefficients, change.bias)
        for (_, residual), one_map in zip(self._calls, added, strict=True):
            exact = one_map.to(torch.float64)
            total += (exact * (exact - 2 * residual.to(torch.float64))).sum().to(total)
        sum_over_ranks([total])
        return float(total)


def solver(groups: int, out: int, unknowns: int, fit: int, held: int, memory: int, alone: bool = True) -> type[Problem]:
    """Return the fastest way to solve a layer's equations that fits into ``memory`` bytes.

    Args:
        fit: number of positions for the fit.
        held: number of positions that are held back.
        alone: there is only one process; the dual needs all responses in one process.
    """
    size = groups, out, unknowns, fit, held
    dual_fits = alone and bytes_of(Samples, *size) <= memory and fit <= _LARGEST_EIGENPROBLEM
    if dual_fits and fit < unknowns:
        return Samples
    if bytes_of(NormalEquations, *size) <= memory and unknowns <= _LARGEST_EIGENPROBLEM:
        return NormalEquations
    return Samples if dual_fits else Operator


def bytes_of(method: type[Problem], groups: int, out: int, unknowns: int, fit: int, held: int) -> int:
    """Return the memory for storing and solving equations over ``fit`` and ``held`` positions."""
    right_hand_sides = 6 * out * unknowns
    if method is Samples:
        return 8 * groups * (2 * (fit + held) * unknowns + 3 * fit**2 + right_hand_sides)
    return 8 * groups * (5 * unknowns**2 + right_hand_sides)


def _usable(values: Tensor) -> Tensor:
    """Return which eigenvalues are larger than the rounding error of the largest one."""
    return values > values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)


def _condition(values: Tensor, usable: Tensor) -> float | None:
    smallest = torch.where(usable, values, torch.inf).amin(-1)
    ratios = (values.amax(-1) / smallest)[usable.any(-1)]
    return float(ratios.max()) if len(ratios) else None
