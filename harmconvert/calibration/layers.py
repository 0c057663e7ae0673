"""One layer's refit: how its kernel is made, which solution is taken, and how that is written into the module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.projection import all_finite, project
from ..layers.harmonic import HarmonicMixin
from ..network.layers import is_harmonic_layer, kernel_size
from .capture import ConvCall
from .equations import Change, Layer, Problem
from .responses import to_groups

# An improvement smaller than this is rounding.
_LEAST_GAIN = 1e-9
# Held-back errors rise for good after the best damping, or the best step: so many worse ones in a row end the search.
_PATIENCE = 3


class RefitError(Exception):
    """This layer cannot be refitted: the message says why."""


@dataclass(frozen=True)
class Choice:
    """What the held-back inputs chose: ``decision`` is refit, rescaled or projection; errors are relative output errors
    on those inputs."""

    decision: str
    change: Change | None
    error_before: float
    error_after: float


def choose(fit: Problem, held: Problem, dampings: Sequence[float]) -> Choice:
    """The candidate of least error on the held-back inputs; the projection where none lowers it."""
    before = held.error(None)
    best = Choice("projection", None, before, before)

    def better(change: Change, decision: str) -> bool:
        nonlocal best
        change = fit.layer.reachable(change)
        error = held.error(change)
        if not error < best.error_after - _LEAST_GAIN * (before + 1):
            return False
        best = Choice(decision, change, before, error)
        return True

    better(fit.rescaling(), "rescaled")
    worse = 0
    for change in fit.candidates(dampings):
        worse = 0 if better(change, "refit") else worse + 1
        if worse == _PATIENCE:
            break
    return best


@dataclass(frozen=True)
class Kernel:
    """How a module makes its effective kernel from the merged one: as it is, or centred and brought to a fixed norm per
    channel (weight standardisation), which a ``gain`` of the class may then scale."""

    module: HarmonicMixin
    effective: Tensor
    factor: Tensor | None = None
    gain: nn.Parameter | None = None

    @classmethod
    def of(cls, module: nn.Module, call: ConvCall) -> Kernel:
        """Told from what the module handed to torch.

        Raises:
            RefitError: the effective kernel is some other function of the merged one.
        """
        assert is_harmonic_layer(module)
        merged, effective = module.weight.detach().to(torch.float64), call.weight.to(torch.float64)
        if merged.shape == effective.shape and _same(merged, effective):
            return cls(module, effective)
        if merged.shape == effective.shape and not call.transposed:
            centred = merged - merged.mean(_filter_dims(merged), keepdim=True)
            factor = _dot(centred, effective) / _dot(centred, centred).clamp_min(1e-300)
            if _same(factor * centred, effective):
                gain = module._parameters.get("gain")
                fits = gain is not None and gain.numel() == len(merged) and bool((gain != 0).all())
                return cls(module, effective, factor, gain if fits else None)
        raise RefitError(f"{type(module).__name__} changes its kernel in a way that cannot be undone")

    def layer(self, call: ConvCall, fits_bias: bool, wanted: int, seed: int) -> Layer:
        """The layer that the equations are about; its unknowns are the coefficients of the effective kernel."""
        basis_FK = self.module.kernels.to(self.effective.device)
        basis_FK = basis_FK / basis_FK.norm(dim=1, keepdim=True)
        coefficients = to_groups(project(self.effective, basis_FK), call.groups, call.transposed)
        direction = None if self.factor is None else _mean_direction(basis_FK, coefficients.shape[2])
        fixed_norm = self.factor is not None and self.gain is None
        size = kernel_size(self.module)
        return Layer(coefficients, basis_FK, size, call.transposed, fits_bias, wanted, seed, direction, fixed_norm)

    @torch.no_grad()
    def write(self, target: Tensor) -> None:
        """Make the effective kernel ``target`` (torch's shape), which the class can make (`Layer.reachable`).

        Raises:
            RefitError: its coefficients would be out of their dtype's range; nothing is changed.
        """
        scale = None
        if self.factor is not None:
            norm, present = _dot(target, target).sqrt(), _dot(self.effective, self.effective).sqrt()
            scale = torch.where((norm > 0) & (present > 0), present / norm.clamp_min(1e-300), 1.0)
            # At its present norm the merged kernel meets the present factor again, eps in it included.
            target = target * scale / torch.where(self.factor == 0, 1.0, self.factor)
        coefficients = in_range(project(target, self.module.kernels), self.module.coefficients)
        in_range(target, coefficients)
        if scale is not None and self.gain is not None:
            self.gain.div_(scale.view_as(self.gain).to(self.gain))
        self.module.coefficients.copy_(coefficients)


def _mean_direction(basis_FK: Tensor, unknowns: int) -> Tensor | None:
    """The unit vector of coefficients whose kernel is constant, which a centred kernel has no part in; None where the
    basis holds no mean at all.

    Raises:
        RefitError: it holds part of one, so that centring a kernel would leave the basis.
    """
    sums_F = basis_FK.sum(1)
    energy = sums_F.square().sum().item() / basis_FK.shape[1]  # 1 where the constant kernel is in the span
    if energy < 1e-12:
        return None
    if energy < 1 - 1e-9:
        raise RefitError("it centres its kernels, which this cut of this basis cannot follow")
    direction = sums_F.repeat(unknowns // len(sums_F))
    return direction / direction.norm()


def refittable_bias(model: nn.Module, modules: Sequence[nn.Module]) -> nn.Parameter | None:
    """The bias that a refit may change: one, of all the modules that share the coefficients and of no other."""
    biases = {id(m._parameters.get("bias")): m._parameters.get("bias") for m in modules}
    bias = next(iter(biases.values())) if len(biases) == 1 else None
    if bias is None:
        return None
    ours = {id(module) for module in modules}
    users = [m for m in model.modules() if id(m) not in ours and any(p is bias for p in m._parameters.values())]
    return None if users else bias


def in_range(values: Tensor, like: Tensor) -> Tensor:
    """Values in the dtype of the parameter ``like``.

    Raises:
        RefitError: it cannot hold them.
    """
    held = values.to(like)
    if not all_finite(held):
        raise RefitError(f"its refit is out of {str(like.dtype).removeprefix('torch.')}'s range")
    return held


def _same(left: Tensor, right: Tensor) -> bool:
    """Equal to what half precision can tell."""
    return bool((left - right).norm() <= 2e-3 * right.norm())


def _filter_dims(kernel: Tensor) -> tuple[int, ...]:
    return tuple(range(1, kernel.dim()))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product per output channel, in a shape that broadcasts."""
    return (left * right).sum(_filter_dims(left), keepdim=True)
