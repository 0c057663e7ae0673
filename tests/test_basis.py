from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch

from harmconvert.errors import UsageError
from harmconvert.kernels import all_frequencies, dct_basis, dct_vectors, frequencies_below, level_count, scaled_levels

from . import oracle

KERNELS = [(2,), (64,), (2, 2), (3, 3), (1, 7), (5, 3), (7, 7), (16, 16), (3, 3, 3), (1, 3, 5)]


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_basis_is_orthonormal(kernel_size: tuple[int, ...]) -> None:
    basis_FK = dct_basis(kernel_size)
    assert torch.allclose(basis_FK @ basis_FK.T, torch.eye(len(basis_FK), dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("kernel_size", [k for k in KERNELS if np.prod(k) <= 64])
def test_basis_equals_the_papers_equation_in_loops(kernel_size: tuple[int, ...]) -> None:
    expected = [oracle.dct_kernel(kernel_size, f).ravel() for f in all_frequencies(kernel_size)]
    np.testing.assert_allclose(dct_basis(kernel_size).numpy(), expected, atol=1e-14)


def test_projection_onto_the_basis_equals_scipys_dctn() -> None:
    kernel = np.random.default_rng(0).normal(size=(5, 4, 3))
    expected = scipy.fft.dctn(kernel, norm="ortho")
    found = dct_basis(kernel.shape).numpy() @ kernel.ravel()
    for value, frequency in zip(found, all_frequencies(kernel.shape), strict=True):
        assert value == pytest.approx(expected[frequency], abs=1e-13)


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_frequencies_are_ordered_by_level_then_lexicographically(kernel_size: tuple[int, ...]) -> None:
    assert list(all_frequencies(kernel_size)) == oracle.frequencies(kernel_size, sum(kernel_size))
    assert level_count(kernel_size) == max(map(sum, all_frequencies(kernel_size))) + 1


def test_lambda_1_to_5_of_a_3x3_kernel_keep_1_3_6_8_9_frequencies() -> None:
    assert [len(frequencies_below((3, 3), lam)) for lam in range(1, 6)] == [1, 3, 6, 8, 9]
    assert frequencies_below((3, 3), 2) == ((0, 0), (0, 1), (1, 0))


@pytest.mark.parametrize(
    ("kernel_size", "lam", "levels"),
    [((3, 3), 2, 2), ((5, 5), 2, 4), ((7, 7), 2, 5), ((7, 7), 3, 7), ((2, 2), 1, 1), ((2, 2), 5, 3), ((1, 7), 3, 7)],
)
def test_a_bare_lambda_scales_with_the_kernel_size(kernel_size: tuple[int, ...], lam: int, levels: int) -> None:
    assert scaled_levels(kernel_size, lam) == levels


def test_l1_rows_sum_to_one_in_absolute_value() -> None:
    basis_FK = dct_basis((7, 7), normalization="l1")
    assert torch.allclose(basis_FK.abs().sum(1), torch.ones(49, dtype=torch.float64))


@pytest.mark.parametrize("levels", [0, 6, -1])
def test_a_lambda_beyond_the_levels_of_a_kernel_is_refused(levels: int) -> None:
    with pytest.raises(UsageError, match=f"lambda {levels} does not fit a 3x3 kernel: it has 5 levels"):
        frequencies_below((3, 3), levels)


@pytest.mark.parametrize("frequencies", [[(0, 3)], [(0, 0), (0, 0)], [(1, 0), (0, 1)], [(0,)], []])
def test_invalid_frequencies_are_refused(frequencies: list[tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="3x3 kernel"):
        dct_basis((3, 3), frequencies)


def test_an_unknown_normalization_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown normalization 'l2': use one of ortho, l1"):
        dct_basis((3, 3), normalization="l2")


def test_the_basis_of_one_position_is_the_number_one() -> None:
    assert dct_vectors(1).item() == 1.0


def test_the_default_device_does_not_affect_the_constants() -> None:
    with torch.device("meta"):
        assert dct_basis((2, 5)).device.type == "cpu"
    assert dct_basis((2, 5)).device.type == "cpu"


def test_changing_one_basis_tensor_changes_no_other() -> None:
    dct_basis((3, 4)).zero_()
    assert dct_basis((3, 4)).abs().sum() > 0
