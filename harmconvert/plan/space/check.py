"""Is one converted kernel what the original's kernel comes to, and its basis the one that it should be of?"""

from __future__ import annotations

from math import isnan, prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.basis import Basis, all_frequencies
from ...kernels.projection import energy_kept, project, reconstruct
from ...layers.harmonic import HarmonicMixin
from ...network.layers import is_harmonic_layer, kernel_size
from ..axes import Check

# Kernels and coefficients, in units of the dtype's epsilon: rounding of the coefficients and of the product.
KERNEL_TOLERANCE_EPS = 4.0
COEFFICIENT_TOLERANCE_EPS = 2.0
# What float64 products leave of both for each position of a kernel, relative to the largest (measured: 1.7e-15 of 9
# positions, 1.7e-14 of 64).
FLOAT64_PRODUCTS = 4 * torch.finfo(torch.float64).eps
_PART = 2**20  # weights at a time


def check_kernel(conv: nn.Module, other: nn.Module, as_calibrated: bool | None) -> Check:
    """Compare the kernel of a converted convolution, harmonic or plain, with the original's.

    ``as_calibrated``: whether coefficients that calibration wrote are what it wrote; None where it wrote none.
    """
    total = len(all_frequencies(kernel_size(conv)))
    kept = len(other.frequencies) if is_harmonic_layer(other) else total
    rounding = max((torch.finfo(_values(one).dtype) for one in (conv, other)), key=lambda info: info.eps)
    tolerance = KERNEL_TOLERANCE_EPS * rounding.eps + total * FLOAT64_PRODUCTS
    # Subnormal numbers have their last bit where the smallest normal one has it.
    least = KERNEL_TOLERANCE_EPS * rounding.eps * rounding.smallest_normal
    # In parts of some filters: float64 copies of the largest kernels would be most of a large network.
    found, wrong, fine = 0.0, 0, True
    for rows in torch.arange(len(_values(conv))).split(max(1, _PART // prod(_values(conv).shape[1:]))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        exact = _kernel_of(conv, part)
        scale = exact.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float64).tiny)
        differences = (_kernel_of(other, part, merged=False) - exact).abs().flatten(1).amax(1)
        fine = fine and bool((differences <= tolerance * scale + least).all())  # so that NaN is not, either
        error = (differences / scale).max().item()
        found = error if isnan(error) else max(found, error)
        if is_harmonic_layer(other):
            wrong += _wrong_coefficients(conv, other, exact, part)
    problem = None
    if not is_harmonic_layer(other):
        problem = None if fine else f"kernel differs by {found:.1e} of its filter's maximum"
    elif as_calibrated is not None:
        problem = None if as_calibrated else "its coefficients are not what calibration wrote"
    elif wrong:
        problem = (
            f"{wrong} of {other.coefficients.numel()} coefficients are not the projection of the original's kernel"
        )
    if is_harmonic_layer(other) and other.fitted_basis is not None:
        problem = _basis_problem(_kernel_of(conv, slice(None)), other) or problem
    return Check(kept, total, found, problem)


def _wrong_coefficients(conv: nn.Module, other: HarmonicMixin, exact: Tensor, part: slice) -> int:
    """How many coefficients of some filters are not those of the projection of the original's kernel ``exact``."""
    coefficients = other.coefficients.detach()[part].to(torch.float64)
    plans = [project(exact, other.kernels)]
    if is_harmonic_layer(conv) and _basis_of(conv) == _basis_of(other):
        # Copied as they are, or projected from the merged kernel, which no longer has all of their digits.
        plans.append(conv.coefficients.detach()[part].to(torch.float64))
    # Each coefficient to its own last bit; below that only what float64 products and subnormal numbers cannot hold.
    info = torch.finfo(other.coefficients.dtype)
    wrong = torch.ones_like(coefficients, dtype=torch.bool)
    for planned in plans:
        largest = planned.abs().flatten(1).amax(1)[:, None, None]
        floor = largest * exact[0, 0].numel() * FLOAT64_PRODUCTS + info.smallest_normal * info.eps
        limit = COEFFICIENT_TOLERANCE_EPS * info.eps * planned.abs() + floor
        wrong &= ~((coefficients - planned).abs() <= limit)  # so that NaN is wrong, too
    return int(wrong.sum())


def _basis_problem(kernel: Tensor, other: HarmonicMixin) -> str | None:
    """Why the basis that a harmonic convolution carries is not the one fitted to ``kernel``, where it carries one.

    The eigenvectors of the kernel are not unique where eigenvalues coincide, so it is their property that is checked:
    orthonormal rows that hold as much of its energy as any could.
    """
    if other.fitted_basis is None:
        return None
    found_FK = other.kernels.to(kernel.device)
    unit_FK = found_FK / found_FK.norm(dim=1, keepdim=True)
    best_FK = Basis(other.basis_spec.name).kernels_for(kernel, other.frequencies)
    gram = unit_FK @ unit_FK.T - torch.eye(len(unit_FK), dtype=torch.float64, device=kernel.device)
    if not gram.abs().max() <= 1e-10:  # so that NaN is none either
        return "the rows of its basis are not orthogonal"
    if not energy_kept(kernel, unit_FK) >= energy_kept(kernel, best_FK) - 1e-6:
        return f"its {other.basis_spec.name} basis is not fitted to the original's kernel"
    return None


def _values(conv: nn.Module) -> Tensor:
    """The tensor that holds a convolution's filters, whatever it holds of them."""
    return (conv.coefficients if is_harmonic_layer(conv) else cast(Tensor, conv.weight)).detach()


def _kernel_of(conv: nn.Module, part: slice, merged: bool = True) -> Tensor:
    """Some of a convolution's kernel in float64; of a harmonic one that of its dense form to the last bit (``merged``),
    or with all digits that its coefficients give."""
    values = _values(conv)[part]
    if is_harmonic_layer(conv):
        values = reconstruct(values if merged else values.to(torch.float64), conv.kernels, kernel_size(conv))
    return values.to(torch.float64)


def _basis_of(conv: HarmonicMixin) -> tuple[Any, ...]:
    fitted = None if conv.fitted_basis is None else tuple(conv.fitted_basis.flatten().tolist())
    return conv.frequencies, conv.basis_spec, fitted
