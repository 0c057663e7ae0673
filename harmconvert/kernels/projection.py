"""Kernel -> coefficients -> kernel, and what a cut costs in weight space. Tensors only.

A kernel has shape (O, I, *kernel_size), its coefficients (O, I, F). Both directions are computed in float64 and
returned in the dtype given: with an orthonormal basis, projection is the least-squares fit (sec. 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .basis import largest_of

_SLICE = 8192  # filters of one channel at a time


def project(kernel: Tensor, basis_FK: Tensor) -> Tensor:
    """Coefficients (O, I, F) of the combination of the basis kernels nearest to ``kernel`` (O, I, *kernel_size).

    ``basis_FK`` (F, K): orthogonal rows in float64, of any norm, as `Basis` gives them.

    >>> from harmconvert.kernels.basis import dct_basis
    >>> kernel = torch.ones(1, 1, 3, 3)
    >>> project(kernel, dct_basis((3, 3), [(0, 0), (0, 1)])).round(decimals=6)
    tensor([[[3., 0.]]])
    """
    analysis_KF = (basis_FK / basis_FK.square().sum(1, keepdim=True)).T.to(kernel.device)
    return _times(kernel, analysis_KF)


def reconstruct(coefficients: Tensor, basis_FK: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Kernel (O, I, *kernel_size) of coefficients (O, I, F): sum over f of w_f psi_f (sec. 5.2); inverse of `project`.

    >>> from harmconvert.kernels.basis import dct_basis
    >>> basis_FK = dct_basis((2, 2))
    >>> reconstruct(project(torch.ones(1, 1, 2, 2), basis_FK), basis_FK, (2, 2)).squeeze()
    tensor([[1., 1.],
            [1., 1.]])
    """
    synthesis_FK = basis_FK.to(coefficients.device, torch.float64)
    return _times(coefficients, synthesis_FK).unflatten(2, tuple(kernel_size))


def merge(coefficients_OIF: Tensor, basis_FK: Tensor) -> Tensor:
    """The one product behind the merged form: (O, I, F) x (F, K) -> (O, I, K)."""
    # One flat product: a batched (O, I, F) @ (F, K) was measured ten times slower on some shapes.
    return (coefficients_OIF.flatten(0, 1) @ basis_FK).unflatten(0, coefficients_OIF.shape[:2])


def merge_channels_last(coefficients_OFI: Tensor, basis_FK: Tensor) -> Tensor:
    """The same product as `merge`, (O, F, I) x (F, K) -> (O, K, I): what channels_last kernels are in memory."""
    basis_OKF = basis_FK.T.expand(len(coefficients_OFI), -1, -1)
    return torch.bmm(basis_OKF, coefficients_OFI)


def energy_kept(kernel: Tensor, basis_FK: Tensor) -> float:
    """Share of the kernel's squared norm that orthonormal basis kernels hold, 0 to 1 (1 for an all-zero kernel)."""
    total = kept = 0.0
    largest = largest_of(kernel)  # squares of 1e200 are infinite
    for part in kernel.detach().split(max(1, _SLICE // kernel.shape[1])):
        precise = part.to(torch.float64) / largest
        total += precise.square().sum().item()
        kept += project(precise, basis_FK).square().sum().item()
    return kept / total if total > 0 else 1.0


def relative_error(approximation: Tensor, kernel: Tensor) -> float:
    """Frobenius norm of the difference over that of ``kernel`` (0 where both are zero)."""
    difference, norm = _norm(approximation - kernel), _norm(kernel)
    if not math.isfinite(difference):  # two of the largest numbers may be further apart than any number is large
        largest = largest_of(kernel)
        near, exact = (tensor.to(torch.float64) / largest for tensor in (approximation, kernel))
        difference, norm = _norm(near - exact), _norm(exact)
    return difference / norm if norm > 0 else difference


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; without values (meta device) none is."""
    if tensor.is_meta or not tensor.numel():
        return True
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype.itemsize < 2:
        tensor = tensor.float()  # 8-bit floats know no arithmetic
    # A sum is the quickest look at every value; only one that is too large needs a second.
    if tensor.sum().isfinite():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def check_range(tensor: Tensor, layer: str, what: str) -> None:
    """Raise InputError where a tensor made from finite weights holds a value out of its dtype's range."""
    if all_finite(tensor):
        return
    name = str(tensor.dtype).removeprefix("torch.")
    wider = {torch.float16: "convert a float32 copy (model.float())", torch.float64: "scale its weights down"}
    remedy = wider.get(tensor.dtype, "convert a float64 copy (model.double())")
    raise InputError(f"layer {layer or '(root)'}: its {what} go out of {name}'s range: {remedy}")


def _times(tensor: Tensor, matrix_AB: Tensor) -> Tensor:
    """(O, I, *A) x (A, B) -> (O, I, B), in float64, and returned in the tensor's dtype."""
    rows_NA = tensor.detach().flatten(2).flatten(0, 1)
    found_NB = tensor.new_empty(len(rows_NA), matrix_AB.shape[1], requires_grad=False)
    # In slices that stay in the cache: float64 copies of whole kernels took three times as long.
    for rows, found in zip(rows_NA.split(_SLICE), found_NB.split(_SLICE), strict=True):
        found.copy_(rows.to(torch.float64) @ matrix_AB)
    return found_NB.unflatten(0, tensor.shape[:2])


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, in float32 where its range allows: enough for a report, and four times quicker."""
    quick = torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
    if 1e-15 < quick < 1e15:
        return quick
    exact = tensor.to(torch.float64)
    largest = largest_of(exact)
    return torch.linalg.vector_norm(exact / largest).item() * largest if math.isfinite(largest) else largest
