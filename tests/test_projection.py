from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harmconvert.kernels import (
    BASES,
    Basis,
    all_finite,
    all_frequencies,
    dct_basis,
    energy_kept,
    project,
    reconstruct,
    relative_error,
)

from . import oracle
from .networks import random_input

kernel_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple).filter(lambda k: np.prod(k) > 1)


@st.composite
def kernels_and_frequencies(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[tuple[int, ...], ...]]:
    size = draw(kernel_sizes)
    frequencies = all_frequencies(size)
    kept = draw(st.sets(st.sampled_from(frequencies), min_size=1))
    kernel = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(3, 2, *size))
    scale = 10.0 ** draw(st.integers(-20, 20))
    return torch.from_numpy(kernel * scale), tuple(f for f in frequencies if f in kept)


def basis_of(kernel: torch.Tensor, kept: tuple) -> torch.Tensor:
    return dct_basis(kernel.shape[2:], kept)


@given(kernels_and_frequencies())
def test_coefficients_equal_the_inner_products_of_the_oracle(case: tuple[torch.Tensor, tuple]) -> None:
    kernel, kept = case
    coefficients = project(kernel, basis_of(kernel, kept)).numpy()
    for index, frequency in enumerate(kept[:4]):
        expected = oracle.coefficient(kernel[1, 0].numpy(), frequency)
        assert coefficients[1, 0, index] == pytest.approx(expected, rel=1e-12, abs=1e-12 * kernel.abs().max().item())


@given(kernels_and_frequencies(), st.integers(0, 2**32 - 1))
def test_no_other_coefficients_of_the_kept_frequencies_are_closer(case: tuple[torch.Tensor, tuple], seed: int) -> None:
    kernel, kept = case
    basis_FK = basis_of(kernel, kept)
    best = project(kernel, basis_FK)
    error = relative_error(reconstruct(best, basis_FK, kernel.shape[2:]), kernel)
    noise = np.random.default_rng(seed).normal(size=best.shape)
    for step in (1.0, 1e-2, 1e-4):
        other = best + step * best.abs().max() * torch.from_numpy(noise)
        assert relative_error(reconstruct(other, basis_FK, kernel.shape[2:]), kernel) >= error * (1 - 1e-9)


@given(kernels_and_frequencies())
def test_projection_is_the_least_squares_solution(case: tuple[torch.Tensor, tuple]) -> None:
    kernel, kept = case
    basis_FK = basis_of(kernel, kept)
    expected = torch.linalg.lstsq(basis_FK.T, kernel.flatten(2).flatten(0, 1).T).solution.T
    torch.testing.assert_close(
        project(kernel, basis_FK).flatten(0, 1), expected, rtol=1e-9, atol=1e-11 * kernel.abs().max().item()
    )


@given(kernels_and_frequencies())
def test_the_energies_of_kept_and_cut_frequencies_sum_to_that_of_the_kernel(case: tuple[torch.Tensor, tuple]) -> None:
    kernel, kept = case
    cut = tuple(f for f in all_frequencies(kernel.shape[2:]) if f not in kept)
    basis_FK = basis_of(kernel, kept)
    energy = energy_kept(kernel, basis_FK)
    assert 0 <= energy <= 1 + 1e-12
    if cut:
        assert energy + energy_kept(kernel, basis_of(kernel, cut)) == pytest.approx(1, rel=1e-12)
    error = relative_error(reconstruct(project(kernel, basis_FK), basis_FK, kernel.shape[2:]), kernel)
    assert error**2 == pytest.approx(1 - energy, abs=1e-12)


@given(kernels_and_frequencies())
def test_projection_is_idempotent(case: tuple[torch.Tensor, tuple]) -> None:
    kernel, kept = case
    basis_FK = basis_of(kernel, kept)
    once = project(kernel, basis_FK)
    twice = project(reconstruct(once, basis_FK, kernel.shape[2:]), basis_FK)
    torch.testing.assert_close(twice, once, rtol=1e-10, atol=1e-12 * kernel.abs().max().item())


@settings(deadline=None)
@given(kernel_sizes, st.integers(0, 2**32 - 1), st.sampled_from(BASES), st.sampled_from(["ortho", "l1"]))
def test_whole_basis_round_trip_is_within_two_ulp_of_the_filters_maximum(
    size: tuple, seed: int, name: str, norm: str
) -> None:
    kernel = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 3, *size))).float()
    basis_FK = Basis(name, norm).kernels_for(kernel)
    again = reconstruct(project(kernel, basis_FK), basis_FK, size)
    ulp = torch.finfo(torch.float32).eps * kernel.abs().flatten(1).amax(1)
    assert ((again - kernel).abs().flatten(1).amax(1) <= 2 * ulp).all()


@pytest.mark.parametrize("size", [(3, 3), (7, 7), (16, 16), (64, 1)])
def test_round_trip_of_large_kernels_is_within_two_ulp(size: tuple[int, ...]) -> None:
    kernel = torch.randn(64, 16, *size)
    again = reconstruct(project(kernel, dct_basis(size)), dct_basis(size), size)
    ulp = torch.finfo(torch.float32).eps * kernel.abs().flatten(1).amax(1)
    assert ((again - kernel).abs().flatten(1).amax(1) <= 2 * ulp).all()


def test_l1_normalisation_only_rescales_coefficients() -> None:
    kernel, kept = torch.randn(4, 3, 5, 5, dtype=torch.float64), all_frequencies((5, 5))[:7]
    ortho_FK, l1_FK = (dct_basis((5, 5), kept, norm) for norm in ("ortho", "l1"))
    ortho, l1 = project(kernel, ortho_FK), project(kernel, l1_FK)
    torch.testing.assert_close(reconstruct(l1, l1_FK, (5, 5)), reconstruct(ortho, ortho_FK, (5, 5)))
    ratio = l1 / ortho
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


def test_the_energy_share_of_a_zero_kernel_is_one() -> None:
    kernel = torch.zeros(2, 2, 3, 3)
    assert energy_kept(kernel, dct_basis((3, 3), [(0, 0)])) == 1.0
    assert relative_error(kernel, kernel) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_coefficients_have_the_kernels_dtype(dtype: torch.dtype) -> None:
    kernel = torch.randn(2, 2, 3, 3).to(dtype)
    coefficients = project(kernel, dct_basis((3, 3)))
    assert coefficients.dtype == dtype
    assert reconstruct(coefficients, dct_basis((3, 3)), (3, 3)).dtype == dtype


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e-310])
def test_energy_and_error_of_a_cut_do_not_depend_on_the_scale(scale: float) -> None:
    kernel = random_input((3, 2, 3, 3), torch.float64)
    basis_FK = dct_basis((3, 3), [(0, 0), (0, 1)])
    near = reconstruct(project(kernel, basis_FK), basis_FK, (3, 3))
    # Subnormal numbers have low precision.
    rel = 1e-12 if scale > 1e-300 else 1e-9
    assert energy_kept(kernel * scale, basis_FK) == pytest.approx(energy_kept(kernel, basis_FK), rel=rel)
    found = relative_error(near * scale, kernel * scale)
    assert found == pytest.approx(relative_error(near, kernel), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.float8_e5m2])
def test_values_that_are_not_finite_are_detected_in_every_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 2.0, 40000.0, 40000.0])
    assert all_finite(values.to(dtype)), "though their sum is not, in float16"
    for value in (torch.inf, -torch.inf, torch.nan):
        values[1] = value
        assert not all_finite(values.to(dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.empty(2, dtype=dtype, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_between_the_largest_numbers_is_finite(dtype: torch.dtype) -> None:
    kernel = torch.full((1, 1, 1, 2), torch.finfo(dtype).max, dtype=dtype)
    assert relative_error(-kernel, kernel) == pytest.approx(2.0)
    assert relative_error(kernel * torch.inf, kernel) == np.inf
