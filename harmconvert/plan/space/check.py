"""Check that a converted kernel is the projection of the original kernel, and that its basis is the right one."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan, prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.basis import Basis, all_frequencies
from ...kernels.projection import energy_kept, project, reconstruct
from ...layers.harmonic import HarmonicMixin, is_harmonic_layer
from ...network.layers import kernel_size, matrix_names, weights_of
from ..axes import Check

# Tolerances of kernels and coefficients in units of the dtype's epsilon: rounding of the coefficients and the product.
KERNEL_TOLERANCE_EPS = 4.0
COEFFICIENT_TOLERANCE_EPS = 2.0
# Rounding error of float64 products for each kernel position, relative to the largest value (measured: 1.7e-15 for 9
# positions, 1.7e-14 for 64).
FLOAT64_PRODUCTS = 4 * torch.finfo(torch.float64).eps
_WEIGHTS_AT_ONCE = 2**20  # float64 copies of the largest kernels would be most of a large network


def check_kernel(conv: nn.Module, other: nn.Module, as_calibrated: bool | None) -> Check:
    """Compare the kernel of a converted convolution, harmonic or plain, with the original kernel.

    ``as_calibrated``: whether the coefficients are those that calibration wrote; None if calibration wrote none.
    """
    total = len(all_frequencies(kernel_size(conv)))
    kept = len(other.frequencies) if is_harmonic_layer(other) else total
    rounding = max((torch.finfo(_values(one).dtype) for one in (conv, other)), key=lambda info: info.eps)
    tolerance = KERNEL_TOLERANCE_EPS * rounding.eps + total * FLOAT64_PRODUCTS
    # The last bit of a subnormal number is that of the smallest normal number.
    subnormal = KERNEL_TOLERANCE_EPS * rounding.eps * rounding.smallest_normal
    largest_error, wrong, within_tolerance = 0.0, 0, True
    for part in _parts(_values(conv)):
        exact = _kernel_of(conv, part)
        scale = exact.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float64).tiny)
        differences = (_kernel_of(other, part, merged=False) - exact).abs().flatten(1).amax(1)
        # Written so that NaN is not within the tolerance.
        within_tolerance = within_tolerance and bool((differences <= tolerance * scale + subnormal).all())
        error = (differences / scale).max().item()
        largest_error = error if isnan(error) else max(largest_error, error)
        if is_harmonic_layer(other):
            wrong += _wrong_coefficients(conv, other, exact, part)
    problem = None
    if not is_harmonic_layer(other):
        problem = None if within_tolerance else f"kernel differs by {largest_error:.1e} of its filter's maximum"
    elif as_calibrated is not None:
        problem = None if as_calibrated else "its coefficients are not what calibration wrote"
    elif wrong:
        problem = (
            f"{wrong} of {other.coefficients.numel()} coefficients are not the projection of the original's kernel"
        )
    if is_harmonic_layer(other) and other.fitted_basis is not None:
        problem = _basis_problem(_kernel_of(conv, slice(None)), other) or problem
    return Check(kept, total, largest_error, problem)


def kernel_difference(layer: nn.Module, other: nn.Module) -> tuple[int, int, float]:
    """Return how many frequencies ``other`` keeps, of how many, and the largest difference of its kernel.

    The difference is relative to the largest weight of each filter. Both may be layers of any class.
    """
    total = prod(kernel_size(layer))
    kept = len(other.frequencies) if is_harmonic_layer(other) else total
    largest = 0.0
    for exact, converted in _filters(layer, other):
        scale = exact.abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
        error = ((converted - exact).abs().amax(1) / scale).max().item()
        largest = error if isnan(error) else max(largest, error)
    return kept, total, largest


def _filters(layer: nn.Module, other: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some filters of both layers at a time (filters, weights), float64: the rows of each matrix of a layer."""
    if matrix_names(layer):
        for pair in zip(weights_of(layer), weights_of(other), strict=True):
            exact, converted = (matrix.detach().reshape(len(matrix), -1) for matrix in pair)
            for part in _parts(exact):
                yield exact[part].to(torch.float64), converted[part].to(torch.float64)
        return
    for part in _parts(_values(layer)):
        yield _kernel_of(layer, part).flatten(1), _kernel_of(other, part).flatten(1)


def _parts(weight: Tensor) -> Iterator[slice]:
    """Yield slices that divide the filters of a weight."""
    at_once = max(1, _WEIGHTS_AT_ONCE // prod(weight.shape[1:]))
    yield from (slice(start, start + at_once) for start in range(0, len(weight), at_once))


def _wrong_coefficients(conv: nn.Module, other: HarmonicMixin, exact: Tensor, part: slice) -> int:
    """Return how many coefficients of some filters are not the projection of the original kernel ``exact``."""
    coefficients = other.coefficients.detach()[part].to(torch.float64)
    allowed = [project(exact, other.kernels)]
    if is_harmonic_layer(conv) and _basis_of(conv) == _basis_of(other):
        # The coefficients of a harmonic original may be copied; the merged kernel no longer has all of their digits.
        allowed.append(conv.coefficients.detach()[part].to(torch.float64))
    # Each coefficient must agree to its last bit, except for errors of float64 products and of subnormal numbers.
    info = torch.finfo(other.coefficients.dtype)
    wrong = torch.ones_like(coefficients, dtype=torch.bool)
    for expected in allowed:
        largest = expected.abs().flatten(1).amax(1)[:, None, None]
        floor = largest * exact[0, 0].numel() * FLOAT64_PRODUCTS + info.smallest_normal * info.eps
        limit = COEFFICIENT_TOLERANCE_EPS * info.eps * expected.abs() + floor
        wrong &= ~((coefficients - expected).abs() <= limit)  # written so that NaN is wrong
    return int(wrong.sum())


def _basis_problem(kernel: Tensor, other: HarmonicMixin) -> str | None:
    """Return why the fitted basis of a harmonic convolution is not the one fitted to ``kernel``, or None if it is.

    Eigenvectors are not unique if eigenvalues coincide. So this checks their properties: the rows are orthogonal and
    hold as much of the kernel's energy as possible.
    """
    if other.fitted_basis is None:
        return None
    kernels_FK = other.kernels.to(kernel.device)
    unit_FK = kernels_FK / kernels_FK.norm(dim=1, keepdim=True)
    best_FK = Basis(other.basis_spec.name).kernels_for(kernel, other.frequencies)
    gram = unit_FK @ unit_FK.T - torch.eye(len(unit_FK), dtype=torch.float64, device=kernel.device)
    if not gram.abs().max() <= 1e-10:  # written so that NaN is a problem
        return "the rows of its basis are not orthogonal"
    if not energy_kept(kernel, unit_FK) >= energy_kept(kernel, best_FK) - 1e-6:
        return f"its {other.basis_spec.name} basis is not fitted to the original's kernel"
    return None


def _values(conv: nn.Module) -> Tensor:
    """Return the parameter that holds a convolution's filters: its coefficients or its weight."""
    return (conv.coefficients if is_harmonic_layer(conv) else cast(Tensor, conv.weight)).detach()


def _kernel_of(conv: nn.Module, part: slice, merged: bool = True) -> Tensor:
    """Return some filters of a convolution's kernel in float64.

    ``merged``: the kernel of a harmonic convolution is that of its dense form, to the last bit; else it is computed in
    float64 from the coefficients.
    """
    values = _values(conv)[part]
    if is_harmonic_layer(conv):
        values = reconstruct(values if merged else values.to(torch.float64), conv.kernels, kernel_size(conv))
    return values.to(torch.float64)


def _basis_of(conv: HarmonicMixin) -> tuple[Any, ...]:
    fitted = None if conv.fitted_basis is None else tuple(conv.fitted_basis.flatten().tolist())
    return conv.frequencies, conv.basis_spec, fitted
