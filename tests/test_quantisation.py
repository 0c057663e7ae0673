"""Quantisation with feedback: parity with a slow reference, bounds, and the distance from the rate-distortion bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harmconvert.codecs import Layout, Quantised, pack
from harmconvert.kernels import Metric, metric_at, quantise, row_bits, steps_at

from . import oracle
from .networks import random_input


def ill_conditioned(groups: int, columns: int, decades: float, seed: int = 0) -> Tensor:
    """Return second moments (groups, columns, columns) whose eigenvalues span some powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -decades, columns, dtype=torch.float64)
    return vectors * values @ vectors.mT


def random_metric(groups: int, rows: int, columns: int, seed: int = 0) -> Metric:
    factor = torch.linalg.cholesky(ill_conditioned(groups, columns, 3, seed), upper=True)
    target = torch.randn(groups, rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return Metric(target, factor)


def errors(metric: Metric, steps_GN: Tensor, integers_GON: Tensor) -> Tensor:
    """Return the squared error of each row in the metric, (groups, rows)."""
    error_GON = metric.target_GON - integers_GON * steps_GN[:, None]
    return (error_GON @ metric.factor_GNN.mT).square().sum(-1)


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 4, 40), (2, 3, 100), (9, 1, 9), (1, 4, 1)])
def test_one_survivor_is_rounding_with_feedback(shape: tuple[int, int, int]) -> None:
    metric = random_metric(*shape)
    steps = steps_at(metric, 0.02)
    expected = oracle.quantise_with_feedback(metric.target_GON, metric.factor_GNN, steps)
    assert torch.equal(quantise(metric, steps), expected)


@pytest.mark.parametrize(("rows", "columns", "survivors"), [(3, 6, 3), (2, 40, 2), (2, 35, 8)])
def test_survivors_are_those_of_a_slow_search(rows: int, columns: int, survivors: int) -> None:
    metric = random_metric(2, rows, columns)
    steps = steps_at(metric, 0.05)
    expected = oracle.quantise_with_survivors(metric.target_GON, metric.factor_GNN, steps, survivors)
    assert torch.equal(quantise(metric, steps, survivors), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 70), st.floats(0.001, 3))
def test_the_error_of_each_row_is_bounded(seed: int, groups: int, rows: int, columns: int, level: float) -> None:
    metric = random_metric(groups, rows, columns, seed)
    steps = steps_at(metric, level) * (0.5 + torch.rand(groups, columns, dtype=torch.float64))
    bound_G = (steps * metric.lengths_GN).square().sum(-1) / 4
    assert (errors(metric, steps, quantise(metric, steps)) <= bound_G[:, None] * (1 + 1e-9)).all()


def test_more_survivors_have_smaller_errors_and_plain_rounding_has_the_largest() -> None:
    metric = random_metric(1, 200, 60)
    steps = steps_at(metric, 0.01)
    plain = (metric.target_GON / steps[:, None]).round()
    means = [errors(metric, steps, plain).mean()]
    means += [errors(metric, steps, quantise(metric, steps, count)).mean() for count in (1, 2, 4, 8)]
    assert means == sorted(means, reverse=True)
    assert means[1] < 0.5 * means[0]


@pytest.mark.parametrize("survivors", [1, 4])
def test_the_largest_integers_keep_their_place(survivors: int) -> None:
    random = random_metric(2, 5, 40)
    target = random.target_GON * 7 / random.target_GON.abs().amax(2, keepdim=True)
    metric = Metric(target, random.factor_GNN)
    free = quantise(metric, torch.ones(2, 40), survivors)
    limited = quantise(metric, torch.ones(2, 40), survivors, largest=7)
    assert limited.abs().max() == 7
    fixed = target.abs() > 6.5
    assert torch.equal(limited[fixed], target[fixed].round())
    assert not torch.equal(free[fixed], target[fixed].round())  # the feedback would move some of them


def test_rows_and_groups_are_divided_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = random_metric(4, 6, 40)
    steps = steps_at(metric, 0.05)
    whole = quantise(metric, steps, 3)
    monkeypatch.setattr("harmconvert.kernels.quantisation._ROOM", 8 * 3 * 40 * 2)
    assert torch.equal(quantise(metric, steps, 3), whole)


def test_the_target_is_the_minimum_of_the_metric() -> None:
    gram, variances = ill_conditioned(2, 8, 2), torch.rand(2, 8, dtype=torch.float64) + 0.5
    cross = torch.randn(2, 3, 8, dtype=torch.float64)
    metric = metric_at(gram, cross, variances, 0.1)
    C = metric.target_GON.clone().requires_grad_()
    value = ((C @ gram * C).sum() - 2 * (C * cross).sum()) + 0.1 * (C.square() / variances[:, None]).sum()
    (gradient,) = torch.autograd.grad(value, C)
    assert gradient.abs().max() < 1e-10
    assert torch.allclose(metric.factor_GNN.mT @ metric.factor_GNN, gram + torch.diag_embed(0.1 / variances))


def distance_from_bound(decades: float, level: float, survivors: int) -> tuple[float, float]:
    """Return the bits per weight of the file, and how many of them are above the rate-distortion bound.

    The weights are Gaussian, and the second moments of the inputs are known.
    """
    rows, columns = 512, 256
    gram = ill_conditioned(1, columns, decades)
    weights = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    metric = metric_at(gram, weights @ gram, torch.ones(1, columns, dtype=torch.float64), level)
    indices = (4 * steps_at(metric, level).log2()).round()
    steps = 2 ** (indices / 4)
    integers = quantise(metric, steps, survivors)
    error = weights - integers * steps[:, None]
    distortion = float((error @ gram * error).sum() / rows)
    stream = pack(
        Quantised(integers.numpy().astype(np.int32), indices.numpy().astype(np.int32)), Layout((rows, columns))
    )
    bits = 8 * len(stream) / integers.numel()
    return bits, bits - oracle.gaussian_rate(torch.linalg.eigvalsh(gram[0]), distortion)


@pytest.mark.parametrize("decades", [0.0, 2.0, pytest.param(4.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("survivors", [1, 4])
def test_the_file_is_near_the_rate_distortion_bound(decades: float, survivors: int) -> None:
    reached = [distance_from_bound(decades, level * 10**-decades, survivors) for level in (3e-4, 3e-3, 1e-2)]
    for bits, distance in reached:
        assert bits >= 1.5
        assert 0 < distance <= (0.27 if survivors > 1 else 0.36), (bits, distance)


def test_equal_steps_are_far_from_the_bound() -> None:
    """Steps in proportion to 1 / R_ii are what this is for: with equal steps (GPTQ) the same error needs more bits."""
    metric = random_metric(1, 256, 64)
    own = steps_at(metric, 0.003)
    equal = torch.full_like(own, math.exp(float(own.log().mean())))

    def bits_at(steps: Tensor) -> tuple[float, float]:
        integers = quantise(metric, steps)
        counts = [np.unique(column, return_counts=True)[1] for column in integers[0].T.numpy()]
        entropy = sum(-(count * np.log2(count / count.sum())).sum() for count in counts) / integers.numel()
        return entropy, float(errors(metric, steps, integers).mean())

    own_bits, own_error = bits_at(own)
    equal_bits, equal_error = bits_at(equal)
    # 6 dB are one bit.
    assert equal_bits + 0.5 * math.log2(equal_error / own_error) > own_bits + 0.2


def test_the_bits_of_a_row_are_known_if_there_were_fewer_inputs_than_coefficients() -> None:
    """The second moments are then singular, and rounding in float32 makes them indefinite."""
    responses = 1e3 * random_input((5, 64), torch.float64)
    gram = (responses.T @ responses)[None]
    variances = torch.ones(1, 64, dtype=torch.float64)
    levels = [1e-4, 1e-2, 1e4]
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(0)
    expected = torch.stack([(1 + spectrum / level).log2().sum(1) / 2 for level in levels])
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram.float() / levels[0] + torch.eye(64))
    torch.testing.assert_close(row_bits(gram.float(), variances.float(), levels).double(), expected, rtol=0.05, atol=0)
