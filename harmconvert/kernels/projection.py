"""Kernel -> coefficients -> kernel, and the error of a cut in weight space. Tensors only.

A kernel has shape (O, I, *kernel_size), its coefficients (O, I, F). Both directions are computed in float64, and the
result has the dtype of the argument. With an orthonormal basis, projection is the least-squares fit (sec. 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .basis import largest_of

_FILTERS_AT_ONCE = 8192  # filters of one channel that are converted to float64 at a time


def project(kernel: Tensor, basis_FK: Tensor) -> Tensor:
    """Return coefficients (O, I, F) of the combination of basis kernels that is nearest to ``kernel`` (sec. 5.2).

    Args:
        kernel: (O, I, *kernel_size), any floating dtype; the result has the same dtype.
        basis_FK: (F, K), float64, orthogonal rows of any norm, as `Basis` returns them.

    >>> from harmconvert.kernels.basis import dct_basis
    >>> kernel = torch.ones(1, 1, 3, 3)
    >>> project(kernel, dct_basis((3, 3), [(0, 0), (0, 1)])).round(decimals=6)
    tensor([[[3., 0.]]])
    """
    analysis_KF = (basis_FK / basis_FK.square().sum(1, keepdim=True)).T.to(kernel.device)
    return _product_in_float64(kernel, analysis_KF)


def reconstruct(coefficients: Tensor, basis_FK: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Return the kernel (O, I, *kernel_size) of coefficients (O, I, F): sum over f of w_f psi_f (sec. 5.2).

    This is the inverse of `project`.

    >>> from harmconvert.kernels.basis import dct_basis
    >>> basis_FK = dct_basis((2, 2))
    >>> reconstruct(project(torch.ones(1, 1, 2, 2), basis_FK), basis_FK, (2, 2)).squeeze()
    tensor([[1., 1.],
            [1., 1.]])
    """
    synthesis_FK = basis_FK.to(coefficients.device, torch.float64)
    return _product_in_float64(coefficients, synthesis_FK).unflatten(2, tuple(kernel_size))


def merge(coefficients_OIF: Tensor, basis_FK: Tensor) -> Tensor:
    """Return the merged kernels (sec. 5.2): (O, I, F) x (F, K) -> (O, I, K)."""
    # One flat product: a batched (O, I, F) @ (F, K) was measured ten times slower on some shapes.
    return (coefficients_OIF.flatten(0, 1) @ basis_FK).unflatten(0, coefficients_OIF.shape[:2])


def merge_channels_last(coefficients_OFI: Tensor, basis_FK: Tensor) -> Tensor:
    """Return the merged kernels in channels_last order: (O, F, I) x (F, K) -> (O, K, I), the same values as `merge`."""
    basis_OKF = basis_FK.T.expand(len(coefficients_OFI), -1, -1)
    return torch.bmm(basis_OKF, coefficients_OFI)


def to_groups(coefficients_OIF: Tensor, groups: int, transposed: bool) -> Tensor:
    """Reshape coefficients (O, I per group, F), or (I, O per group, F) if transposed, to (G, O per group, I F)."""
    blocks = coefficients_OIF.unflatten(0, (groups, -1))
    return (blocks.transpose(1, 2) if transposed else blocks).flatten(2)


def from_groups(coefficients_GON: Tensor, kernels: int, transposed: bool) -> Tensor:
    """Reshape coefficients (G, O per group, I F) back; inverse of `to_groups`."""
    blocks = coefficients_GON.unflatten(2, (-1, kernels))
    return (blocks.transpose(1, 2) if transposed else blocks).flatten(0, 1)


def energy_kept(kernel: Tensor, basis_FK: Tensor) -> float:
    """Return the share (0 to 1) of the kernel's squared norm that orthonormal basis kernels hold; 1 if it is zero."""
    total = kept = 0.0
    largest = largest_of(kernel)  # squares of 1e200 are infinite
    for part in kernel.detach().split(max(1, _FILTERS_AT_ONCE // kernel.shape[1])):
        precise = part.to(torch.float64) / largest
        total += precise.square().sum().item()
        kept += project(precise, basis_FK).square().sum().item()
    return kept / total if total > 0 else 1.0


def relative_error(approximation: Tensor, kernel: Tensor) -> float:
    """Return the Frobenius norm of the difference, divided by that of ``kernel`` (0 if both are zero)."""
    difference, norm = _frobenius_norm(approximation - kernel), _frobenius_norm(kernel)
    if not math.isfinite(difference):  # the difference of two very large numbers can overflow: scale both first
        largest = largest_of(kernel)
        near, exact = (tensor.to(torch.float64) / largest for tensor in (approximation, kernel))
        difference, norm = _frobenius_norm(near - exact), _frobenius_norm(exact)
    return difference / norm if norm > 0 else difference


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite; True for tensors without values (empty, or on the meta device)."""
    if tensor.is_meta or not tensor.numel():
        return True
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.itemsize < 2:
        tensor = tensor.float()  # 8-bit floats have no arithmetic
    # A sum is the fastest test of all values. It may also overflow although all values are finite: then test again.
    if tensor.sum().isfinite():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def check_range(tensor: Tensor, layer: str, what: str) -> None:
    """Raise InputError if a tensor that was made from finite weights has a value out of its dtype's range."""
    if all_finite(tensor):
        return
    name = str(tensor.dtype).removeprefix("torch.")
    remedies = {torch.float16: "convert a float32 copy (model.float())", torch.float64: "scale its weights down"}
    remedy = remedies.get(tensor.dtype, "convert a float64 copy (model.double())")
    raise InputError(f"layer {layer or '(root)'}: its {what} are out of {name}'s range: {remedy}")


def _product_in_float64(tensor: Tensor, matrix_AB: Tensor) -> Tensor:
    """Return (O, I, *A) x (A, B) -> (O, I, B), computed in float64, in the tensor's dtype."""
    rows_NA = tensor.detach().flatten(2).flatten(0, 1)
    product_NB = tensor.new_empty(len(rows_NA), matrix_AB.shape[1], requires_grad=False)
    # In parts that fit into the processor's cache: float64 copies of whole kernels took three times as long.
    for rows, product in zip(rows_NA.split(_FILTERS_AT_ONCE), product_NB.split(_FILTERS_AT_ONCE), strict=True):
        product.copy_(rows.to(torch.float64) @ matrix_AB)
    return product_NB.unflatten(0, tensor.shape[:2])


def _frobenius_norm(tensor: Tensor) -> float:
    """Return the norm, from float32 sums if the values allow it: exact enough for a report, and four times faster."""
    quick = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
    if 1e-15 < quick < 1e15:
        return quick
    exact = tensor.to(torch.float64)
    largest = largest_of(exact)
    return torch.linalg.vector_norm(exact / largest).item() * largest if math.isfinite(largest) else largest
