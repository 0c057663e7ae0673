"""The refit of one layer: how its class computes the kernel, which solution is chosen, and writing the solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.projection import all_finite, project, to_groups
from ..layers.harmonic import is_harmonic_layer
from ..network.layers import kernel_size, parameter_of
from .capture import ConvCall
from .equations import Change, Layer, Problem

# Smaller improvements are rounding errors.
_LEAST_GAIN = 1e-9
# Beyond the best damping the held-back error keeps rising: the search ends after this many worse solutions in a row.
_PATIENCE = 3


class RefitError(Exception):
    """A layer cannot be refitted; the message says why."""


@dataclass(frozen=True)
class Choice:
    """The solution that is best on the held-back inputs.

    ``decision``: "refit", "rescaled" or "projection"; "rank" for a rank without a refit. Errors are relative output
    errors on the held-back inputs. ``spectrum``: see `LayerCalibration`.
    """

    decision: str
    change: Change | None
    error_before: float
    error_after: float
    spectrum: tuple[float, ...] | None = None


def choose(fit: Problem, held: Problem, dampings: Sequence[float]) -> Choice:
    """Return the solution with the smallest error on the held-back inputs; the projection if no solution is better."""
    before = held.error(None)
    best = Choice("projection", None, before, before)

    def take_if_better(change: Change, decision: str) -> bool:
        nonlocal best
        change = fit.layer.reachable(change)
        error = held.error(change)
        if not error < best.error_after - _LEAST_GAIN * (before + 1):
            return False
        best = Choice(decision, change, before, error)
        return True

    take_if_better(fit.rescaling(), "rescaled")
    worse_in_a_row = 0
    for change in fit.candidates(dampings):
        worse_in_a_row = 0 if take_if_better(change, "refit") else worse_in_a_row + 1
        if worse_in_a_row == _PATIENCE:
            break
    return best


def coefficients_of(module: nn.Module) -> Tensor:
    """Return the coefficients (O, I, F) of a layer in the basis `basis_of`."""
    parameter = parameter_of(module).detach()
    return parameter.flatten(2) if parameter.dim() > 2 else parameter[..., None]


def basis_of(module: nn.Module) -> Tensor:
    """Return the basis kernels (F, K) of a layer, float64; those of a plain layer are single positions."""
    if is_harmonic_layer(module):
        return module.kernels
    return torch.eye(prod(kernel_size(module)), dtype=torch.float64)


@dataclass(frozen=True)
class Kernel:
    """How a module computes its effective kernel from the merged kernel.

    Either both are the same (``factor`` is None), or the class standardises the kernel: it subtracts the mean of each
    channel and multiplies the channel by ``factor``, to a fixed norm. A parameter ``gain`` may scale this norm.
    """

    module: nn.Module
    effective: Tensor
    factor: Tensor | None = None
    gain: nn.Parameter | None = None

    @classmethod
    def of(cls, module: nn.Module, call: ConvCall) -> Kernel:
        """Derive it from the kernel that the module passed to torch in a call.

        Raises:
            RefitError: the effective kernel is another function of the merged kernel.
        """
        merged, effective = cast(Tensor, module.weight).detach().to(torch.float64), call.weight.to(torch.float64)
        if isinstance(module, nn.Linear):
            merged = merged[..., None]
        if merged.shape == effective.shape and _equal_in_half_precision(merged, effective):
            return cls(module, effective)
        if merged.shape == effective.shape and not call.transposed:
            centred = merged - merged.mean(_filter_dims(merged), keepdim=True)
            factor = _dot(centred, effective) / _dot(centred, centred).clamp_min(1e-300)
            if _equal_in_half_precision(factor * centred, effective):
                gain = module._parameters.get("gain")
                fits = gain is not None and gain.numel() == len(merged) and bool((gain != 0).all())
                return cls(module, effective, factor, gain if fits else None)
        raise RefitError(f"{type(module).__name__} changes its kernel in a way that cannot be undone")

    def layer(self, call: ConvCall, fits_bias: bool, sample_count: int, seed: int) -> Layer:
        """Return the facts for the equations; the unknowns are the coefficients of the effective kernel."""
        basis_FK = basis_of(self.module).to(self.effective.device)
        basis_FK = basis_FK / basis_FK.norm(dim=1, keepdim=True)
        coefficients = to_groups(project(self.effective, basis_FK), call.groups, call.transposed)
        direction = None if self.factor is None else _mean_direction(basis_FK, coefficients.shape[2])
        fixed_norm = self.factor is not None and self.gain is None
        size = tuple(self.effective.shape[2:])
        return Layer(
            coefficients, basis_FK, size, call.transposed, fits_bias, sample_count, seed, direction, fixed_norm
        )

    def layer_coefficients(self, layer: Layer) -> Tensor:
        """Return the coefficients of the effective kernel, as in ``layer`` (G, O, I F)."""
        return to_groups(project(self.effective, layer.basis), len(layer.coefficients), layer.transposed)

    @torch.no_grad()
    def write(self, target: Tensor) -> None:
        """Set the coefficients so that the effective kernel becomes ``target`` (torch's shape).

        ``target`` must be one that the class can compute (`Layer.reachable`).

        Raises:
            RefitError: the coefficients are out of their dtype's range; nothing is changed.
        """
        scale = None
        if self.factor is not None:
            norm, present = _dot(target, target).sqrt(), _dot(self.effective, self.effective).sqrt()
            scale = torch.where((norm > 0) & (present > 0), present / norm.clamp_min(1e-300), 1.0)
            # Keep the norm of the merged kernel: then the class computes the same factor again, including its eps.
            target = target * scale / torch.where(self.factor == 0, 1.0, self.factor)
        parameter = parameter_of(self.module)
        coefficients = in_range(project(target, basis_of(self.module)), parameter)
        in_range(target, coefficients)
        if scale is not None and self.gain is not None:
            self.gain.div_(scale.view_as(self.gain).to(self.gain))
        parameter.copy_(coefficients.reshape(parameter.shape))


def _mean_direction(basis_FK: Tensor, unknowns: int) -> Tensor | None:
    """Return the unit vector of the coefficients of a constant kernel; None if all basis kernels have mean zero.

    A kernel with mean zero has no component along this vector.

    Raises:
        RefitError: the constant kernel is only partly in the span of the basis, so centring a kernel leaves the span.
    """
    sums_F = basis_FK.sum(1)
    energy = sums_F.square().sum().item() / basis_FK.shape[1]  # 1 if the constant kernel is in the span
    if energy < 1e-12:
        return None
    if energy < 1 - 1e-9:
        raise RefitError("it centres its kernels, and the kept basis kernels cannot represent the mean")
    direction = sums_F.repeat(unknowns // len(sums_F))
    return direction / direction.norm()


def refittable_bias(model: nn.Module, modules: Sequence[nn.Module]) -> nn.Parameter | None:
    """Return the bias that a refit may change; None if there is none.

    All modules that share the coefficients must have this bias, and no other module may use it.
    """
    biases = {id(m._parameters.get("bias")): m._parameters.get("bias") for m in modules}
    bias = next(iter(biases.values())) if len(biases) == 1 else None
    if bias is None:
        return None
    ours = {id(module) for module in modules}
    users = [m for m in model.modules() if id(m) not in ours and any(p is bias for p in m._parameters.values())]
    return None if users else bias


def in_range(values: Tensor, like: Tensor) -> Tensor:
    """Return the values in the dtype of the parameter ``like``.

    Raises:
        RefitError: a value is out of the range of this dtype.
    """
    converted = values.to(like)
    if not all_finite(converted):
        raise RefitError(f"its refit is out of {str(like.dtype).removeprefix('torch.')}'s range")
    return converted


def _equal_in_half_precision(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).norm() <= 2e-3 * right.norm())


def _filter_dims(kernel: Tensor) -> tuple[int, ...]:
    return tuple(range(1, kernel.dim()))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each output channel, in a shape that broadcasts."""
    return (left * right).sum(_filter_dims(left), keepdim=True)
