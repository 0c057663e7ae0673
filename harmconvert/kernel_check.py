"""Is one converted kernel what the original's kernel comes to, and its basis the one that it should be of?"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .basis import Basis, all_frequencies
from .conv import HarmonicMixin
from .projection import energy_kept, project, reconstruct
from .surgery import kernel_size

# Kernels and coefficients, in units of the dtype's epsilon: rounding of the coefficients and of the product.
KERNEL_TOLERANCE_EPS = 4.0
COEFFICIENT_TOLERANCE_EPS = 2.0
# What float64 products leave of both for each position of a kernel, relative to the largest (measured: 1.7e-15 of 9
# positions, 1.7e-14 of 64).
FLOAT64_PRODUCTS = 4 * torch.finfo(torch.float64).eps


def check_kernel(conv: nn.Module, other: nn.Module, as_calibrated: bool | None) -> tuple[int, int, float, str | None]:
    """Kept and total frequencies, error against the original's kernel, and what is not as planned; whether coefficients
    that calibration wrote are what it wrote is told."""
    whole = all_frequencies(kernel_size(conv))
    weight = _kernel_of(conv)
    exact = weight.to(torch.float64)
    scale = exact.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    coarsest = max((weight.dtype, cast(Tensor, other.weight).dtype), key=lambda dtype: torch.finfo(dtype).eps)
    rounding = torch.finfo(coarsest)
    # Subnormal numbers have their last bit where the smallest normal one has it.
    limits = (KERNEL_TOLERANCE_EPS * rounding.eps + len(whole) * FLOAT64_PRODUCTS) * scale
    limits += KERNEL_TOLERANCE_EPS * rounding.eps * rounding.smallest_normal

    def error(kernel: Tensor) -> float:
        return (_differences(kernel, exact) / scale).max().item()

    if not isinstance(other, HarmonicMixin):
        found = error(cast(Tensor, other.weight))
        within = (_differences(cast(Tensor, other.weight), exact) <= limits).all()
        problem = None if within else f"kernel differs by {found:.1e} of its filter's maximum"
        return len(whole), len(whole), found, problem
    coefficients = other.coefficients.detach().to(torch.float64)
    kernel = reconstruct(coefficients, other.kernels, kernel_size(conv))
    if problem := _basis_problem(exact, other):
        return len(other.frequencies), len(whole), error(kernel), problem
    if as_calibrated is not None:
        problem = None if as_calibrated else "its coefficients are not what calibration wrote"
        return len(other.frequencies), len(whole), error(kernel), problem
    if isinstance(conv, HarmonicMixin) and _basis_of(conv) == _basis_of(other):
        planned = conv.coefficients.detach().to(torch.float64)  # a merged kernel has no longer all of their digits
    else:
        planned = project(exact, other.kernels)
    # Each coefficient to its own last bit; below that only what float64 products and subnormal numbers cannot hold.
    info = torch.finfo(other.coefficients.dtype)
    floor = (
        planned.abs().flatten(1).amax(1)[:, None, None] * len(whole) * FLOAT64_PRODUCTS
        + info.smallest_normal * info.eps
    )
    limit = COEFFICIENT_TOLERANCE_EPS * info.eps * planned.abs() + floor
    wrong = int(((coefficients - planned).abs() > limit).sum())
    problem = f"{wrong} of {planned.numel()} coefficients are not the projection of the original's kernel"
    return len(other.frequencies), len(whole), error(kernel), problem if wrong else None


def _differences(kernel: Tensor, exact: Tensor) -> Tensor:
    """Largest difference of each filter."""
    return (kernel.detach().to(torch.float64) - exact).abs().flatten(1).amax(1)


def _basis_problem(kernel: Tensor, other: HarmonicMixin) -> str | None:
    """Why the basis that a harmonic convolution carries is not the one fitted to ``kernel``, where it carries one.

    The eigenvectors of the kernel are not unique where eigenvalues coincide, so it is their property that is checked:
    orthonormal rows that hold as much of its energy as any could.
    """
    if other.fitted_basis is None:
        return None
    found_FK = other.kernels.to(kernel.device)
    unit_FK = found_FK / found_FK.norm(dim=1, keepdim=True)
    best_FK = Basis(other.family.name).kernels_for(kernel, other.frequencies)
    gram = unit_FK @ unit_FK.T - torch.eye(len(unit_FK), dtype=torch.float64, device=kernel.device)
    if not gram.abs().max() <= 1e-10:  # so that NaN is none either
        return "the rows of its basis are not orthogonal"
    if not energy_kept(kernel, unit_FK) >= energy_kept(kernel, best_FK) - 1e-6:
        return f"its {other.family.name} basis is not fitted to the original's kernel"
    return None


def _kernel_of(conv: nn.Module) -> Tensor:
    """A convolution's kernel; of a harmonic one that of its dense form, to the last bit."""
    if isinstance(conv, HarmonicMixin):
        return reconstruct(conv.coefficients.detach(), conv.kernels, kernel_size(conv))
    return cast(Tensor, conv.weight).detach()


def _basis_of(conv: HarmonicMixin) -> tuple[Any, ...]:
    fitted = None if conv.fitted_basis is None else tuple(conv.fitted_basis.flatten().tolist())
    return conv.frequencies, conv.family, fitted
