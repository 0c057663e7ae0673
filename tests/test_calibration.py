"""Calibration: the refit is the least-squares solution, is used only if it generalises, and is recorded."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import (
    DAMPINGS,
    Batch,
    CalibrationSettings,
    Change,
    ConvCall,
    Divergence,
    Kernel,
    NormalEquations,
    Operator,
    Problem,
    QuickEquations,
    RefitError,
    Samples,
    blend,
    calibrate,
    calibration_set,
    choose,
    dampings,
    never_worse,
    outputs,
    pick_positions,
    reestimate_batch_norm,
    solver,
    solvers,
    watch_convolutions,
)
from harmconvert.calibration import divergence as divergence_room
from harmconvert.calibration.divergence import divergence
from harmconvert.calibration.responses import responses
from harmconvert.errors import InputError, UsageError
from harmconvert.kernels import Basis, from_groups, project, to_groups
from harmconvert.layers import to_harmonic
from harmconvert.metrics import wilson_interval
from harmconvert.plan import Plan, cut_layer
from harmconvert.report import calibration_lines
from harmconvert.storage import read_checkpoint, read_header

from . import oracle
from .networks import CONVOLUTIONS, Branches, random_input, seeded
from .seams import replace_everywhere

PLAIN = [name for name in CONVOLUTIONS if "Std" not in name]
STANDARDISED = [name for name in CONVOLUTIONS if "Std" in name]
UNDAMPED = CalibrationSettings(damping=0.0)


def smooth(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return images with correlated neighbours, as in photographs: for white noise, the projection is the best cut."""
    x = random_input(shape, torch.float64, seed)
    for axis in range(2, len(shape)):
        x = x + 0.9 * x.roll(1, axis) + 0.6 * x.roll(2, axis)
        # Not stationary: the sum and the difference of two equally distributed pixels would be uncorrelated.
        x = x * (1 + 0.8 * torch.sin(0.7 * torch.arange(shape[axis]))).view(-1, *(1,) * (len(shape) - 1 - axis))
    return (x + 0.2).to(dtype)


def half(kernel_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the lower half of a kernel's frequencies, but at most six."""
    every = oracle.frequencies(kernel_size, sum(kernel_size))
    return every[: min(6, math.ceil(len(every) / 2))]


def one_layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Plan, tuple[int, ...]]:
    """Return a network of one convolution, a plan that cuts it, and its input shape."""
    make, shape = CONVOLUTIONS[name]
    model = seeded(lambda: nn.Sequential(make()), dtype)
    size = tuple(model[0].kernel_size)
    return model, Plan((cut_layer("0", size, tuple(half(size))),)), shape


def fitted_rows(x: Tensor) -> Tensor:
    """Return the examples that are not held back: all except every fourth."""
    return x[[i for i in range(len(x)) if (i + 1) % 4]]


def measured_error(original: nn.Module, converted: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return ((original(x) - converted(x)).norm() / original(x).norm()).item()


# --- the least squares ---


@pytest.mark.parametrize("name", PLAIN)
def test_the_refit_is_the_least_squares_solution(name: str) -> None:
    model, plan, shape = one_layer(name)
    x = smooth((80, *shape[1:]))
    if name == "2x2":  # sum and difference of two equal neighbours are uncorrelated, so the projection is the best
        x = x * torch.tensor([1.0, 0.3]).repeat(4) * torch.tensor([1.0, 0.5]).repeat(4)[:, None]
    conversion = hc.convert(model, plan, calibration=x.split(7), settings=UNDAMPED)
    (record,) = conversion.calibration.layers
    assert record.decision == "refit"
    conv, harmonic = model[0], conversion.model[0]
    start = to_groups(hc.convert(model, plan).model[0].coefficients.detach(), conv.groups, conv.transposed).numpy()
    expected, bias = oracle.refit(conv, half(tuple(conv.kernel_size)), fitted_rows(x), start)
    found = to_groups(harmonic.coefficients.detach(), conv.groups, conv.transposed).numpy()
    assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()
    if bias is not None:
        assert np.abs(harmonic.bias.detach().numpy() - bias).max() <= 1e-8 * np.abs(bias).max()


@pytest.mark.parametrize("name", ["StdConv2d", "ScaledStdConv2d"])
def test_the_refit_of_a_standardised_kernel_is_the_least_squares_solution_without_a_mean(name: str) -> None:
    model, plan, shape = one_layer(name)
    x = smooth((200, *shape[1:]))
    conversion = hc.convert(model, plan, calibration=x.split(7), settings=UNDAMPED)
    (record,) = conversion.calibration.layers
    assert record.decision == "refit"
    plain = oracle.standardised(model[0])
    with torch.no_grad():
        assert torch.allclose(plain(x[:4]), model(x[:4]), rtol=1e-9)
    kept = half((3, 3))
    kernels = np.stack([oracle.dct_kernel((3, 3), f) for f in kept])
    start = np.einsum("oixy,fxy->oif", plain.weight.detach().numpy(), kernels).reshape(1, len(plain.weight), -1)
    expected, bias = oracle.refit(plain, kept, fitted_rows(x), start, centred_kernels=True)
    kernel = np.einsum("oif,fxy->oixy", expected.reshape(*plain.weight.shape[:2], -1), kernels)
    assert np.abs(kernel.sum((1, 2, 3))).max() < 1e-9
    if not hasattr(model[0], "gain"):  # the norm of the kernel is fixed: only its direction is the solution
        norms = [np.linalg.norm(f) / np.linalg.norm(k) for f, k in zip(plain.weight.detach(), kernel, strict=True)]
        kernel *= np.array(norms)[:, None, None, None]
    found = captured(conversion.model[0], x[:1]).weight.numpy()
    # eps stands beside the deviation, which a cut makes smaller.
    assert np.abs(found - kernel).max() <= 1e-3 * np.abs(kernel).max()
    if bias is not None:
        assert conversion.model[0].bias.detach().numpy() == pytest.approx(bias, abs=1e-3 * np.abs(bias).max())


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_reported_errors_are_those_of_the_layer_on_held_back_inputs(name: str) -> None:
    model, plan, shape = one_layer(name)
    x = smooth((80, *shape[1:]))
    conversion = hc.convert(model, plan, calibration=x.split(7))
    (record,) = conversion.calibration.layers
    held = x[3::4]
    before = measured_error(model, hc.convert(model, plan).model, held)
    assert record.error_before == pytest.approx(before, rel=1e-9)
    assert record.error_after == pytest.approx(measured_error(model, conversion.model, held), rel=1e-4)
    assert record.error_after < before


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("size", "dilation"), [((2, 4), 1), ((4, 3), (1, 2)), ((3, 2), 3)])
def test_responses_give_the_output_also_for_asymmetric_same_padding(size: tuple[int, int], dilation: Any) -> None:
    conv = seeded(lambda: nn.Conv2d(3, 4, size, dilation=dilation, padding="same"), torch.float64)
    call = captured(conv, smooth((2, 3, 9, 8)))
    kernels = Basis().kernels(size)
    coefficients_ON = project(conv.weight, kernels).flatten(1)
    found = responses(call, kernels)[:, 0] @ coefficients_ON.T + conv.bias.detach()
    torch.testing.assert_close(found, outputs(call.output).flatten(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_responses_at_chosen_positions_equal_those_of_the_whole_map(name: str, last: bool) -> None:
    """Only the needed values are copied from the map, without its padding or the zeros of a transposed convolution.

    This works in both memory formats and for positions in any order.
    """
    make, shape = CONVOLUTIONS[name]
    conv = seeded(make, torch.float64)
    x = smooth((3, *shape[1:])) + 1
    call = captured(conv, x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x)
    kernels = Basis().kernels(tuple(conv.kernel_size))
    every = responses(call, kernels).unflatten(0, (3, -1))
    picks = torch.stack([torch.randperm(every.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(3)])
    for wanted in (1, every.shape[1] // 2, every.shape[1]):
        found = responses(call, kernels, picks[:, :wanted]).unflatten(0, (3, -1))
        expected = every[torch.arange(3)[:, None], picks[:, :wanted]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", STANDARDISED)
def test_a_refitted_standardised_kernel_can_be_made_by_its_class(name: str) -> None:
    model, plan, shape = one_layer(name, torch.float32)
    conversion = hc.convert(model, plan, calibration=smooth((24, *shape[1:]), dtype=torch.float32).split(8))
    assert conversion.calibration.layers[0].decision == "refit"
    # Negative gains change the sign of the kernel.
    if hasattr(model[0], "gain"):
        with torch.no_grad():
            model[0].gain[::2] *= -1.5
        x = smooth((24, *shape[1:]), dtype=torch.float32)
        turned = hc.convert(model, plan, calibration=x.split(8))
        assert turned.calibration.layers[0].error_after == pytest.approx(
            measured_error(model, turned.model, x[3::4]), rel=1e-3
        )


def captured(conv: nn.Module, x: Tensor) -> ConvCall:
    """Return the only call of torch's convolution in a module's forward pass."""
    calls: list[ConvCall | None] = []
    watch_convolutions(conv, {"": conv}, x, lambda _, call: calls.append(call))
    (call,) = calls
    assert call is not None
    return call


METHODS: list[type[Problem]] = [NormalEquations, Samples, Operator]


def problem(method: type[Problem], name: str, count: int, seed: int = 0) -> tuple[Problem, nn.Module, Tensor]:
    """Return the least-squares problem of one layer, its original convolution, and its ``count`` inputs."""
    make, shape = CONVOLUTIONS[name]
    conv = seeded(make, torch.float64)
    harmonic = to_harmonic(conv, half(tuple(conv.kernel_size)))
    x = smooth((count, *shape[1:]), seed)
    call = captured(harmonic, x)
    layer = Kernel.of(harmonic, call).layer(call, conv.bias is not None, 1 << 30, 0)
    built = method(layer)
    with torch.no_grad():
        built.add(call, outputs(conv(x)), range(count))
    built.reduce()
    return built, conv, x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["plain", "2x2", "grouped", "dilated", "ConvTranspose2d", "Conv3d", "reflect", "Conv2dSame"]
)
def test_all_solvers_have_the_same_solution(method: type[Problem], name: str) -> None:
    built, conv, x = problem(method, name, 4)
    *_, change = built.candidates([0.0])
    expected, bias = oracle.refit(conv, half(tuple(conv.kernel_size)), x, built.layer.coefficients.numpy())
    found = (built.layer.coefficients + change.coefficients).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    if bias is not None:
        assert change.bias is not None
        assert (change.bias.flatten() + conv.bias).detach().numpy() == pytest.approx(bias, abs=1e-5)


@pytest.mark.parametrize("method", METHODS[:2])
def test_with_fewer_positions_than_unknowns_the_change_is_minimal(method: type[Problem]) -> None:
    built, conv, x = problem(method, "16x16 patches", 3)
    assert built.count < built.layer.unknowns
    *_, change = built.candidates([0.0])
    expected, _ = oracle.refit(conv, half((16, 16)), x, built.layer.coefficients.numpy())
    found = (built.layer.coefficients + change.coefficients).numpy()
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise"])
def test_all_solvers_damp_equally(method: type[Problem], name: str) -> None:
    (expected,) = problem(NormalEquations, name, 12)[0].candidates([0.1])
    (found,) = problem(method, name, 12)[0].candidates([0.1])
    assert (found.coefficients - expected.coefficients).norm() <= 1e-3 * expected.coefficients.norm()


@pytest.mark.parametrize("method", METHODS[:2])
def test_damping_solves_the_damped_normal_equations(method: type[Problem]) -> None:
    built, conv, x = problem(method, "strided, padded, no bias", 6)
    (change,) = built.candidates([0.1])
    (matrix,) = oracle.design_matrix(conv, half((3, 3)), x)
    with torch.no_grad():
        target = conv(x).transpose(0, 1).flatten(1).numpy()  # O, positions
    start = built.layer.coefficients[0].numpy()
    gram, cross = matrix.T @ matrix, target @ matrix
    strength = 0.1 * np.trace(gram) / len(gram)
    expected = (cross + strength * start) @ np.linalg.inv(gram + strength * np.eye(len(gram)))
    assert (start + change.coefficients[0].numpy()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_of_a_change_is_the_error_of_the_output(method: type[Problem]) -> None:
    built, conv, x = problem(method, "grouped", 5)
    generator = torch.Generator().manual_seed(1)
    D = torch.randn(built.layer.coefficients.shape, generator=generator, dtype=torch.float64)
    b = torch.randn(built.layer.coefficients.shape[:2], generator=generator, dtype=torch.float64)
    changed = to_harmonic(conv, half((3, 3)))
    with torch.no_grad():
        changed.coefficients += from_groups(D, len(changed.frequencies), False)
        changed.bias += b.flatten()
    assert built.error(Change(D, b)) == pytest.approx(measured_error(conv, changed, x), rel=1e-9)


@pytest.mark.parametrize("name", ["plain", "grouped", "ConvTranspose2d"])
@pytest.mark.parametrize("strip", [1, 5, 100])
@pytest.mark.parametrize(("method", "tolerance"), [(NormalEquations, 1e-9), (QuickEquations, 1e-4)])
def test_second_moments_summed_in_strips_are_those_of_the_responses(
    name: str, strip: int, method: type[NormalEquations], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "_STRIP", strip)
    built, conv, x = problem(method, name, 6)
    for gram, matrix in zip(built.gram_GNN, oracle.design_matrix(conv, half((3, 3)), x), strict=True):
        exact = matrix.T @ matrix
        assert np.abs(gram.numpy() - exact).max() <= tolerance * np.abs(exact).max()


def test_the_rescaling_repairs_each_channels_mean_and_variance() -> None:
    built, conv, x = problem(NormalEquations, "plain", 12)
    harmonic = to_harmonic(conv, half((3, 3)))
    change = built.rescaling()
    with torch.no_grad():
        harmonic.coefficients += from_groups(change.coefficients, len(harmonic.frequencies), False)
        harmonic.bias += change.bias.flatten()
        difference = conv(x) - harmonic(x)
        answer = harmonic(x) - harmonic.bias[:, None, None]
    # The residual of least squares is uncorrelated with the regressors: a constant, and the channel's output.
    assert difference.mean((0, 2, 3)).abs().max() < 1e-12
    assert (difference * answer).mean((0, 2, 3)).abs().max() < 1e-12


def test_memory_and_positions_determine_the_solver() -> None:
    gigabyte = 1 << 30
    assert solver(1, 64, 500, 10_000, 3_000, gigabyte) is NormalEquations
    assert solver(1, 64, 5_000, 200, 60, gigabyte) is Samples
    assert solver(1, 1024, 30_000, 100_000, 30_000, 2 * gigabyte) is Operator
    assert solver(1, 64, 5_000, 200, 60, gigabyte, alone=False) is not Samples


@given(st.integers(2, 200), st.integers(1, 60), st.integers(0, 5))
def test_positions_do_not_depend_on_the_batches_and_cover_the_map(size: int, wanted: int, seed: int) -> None:
    together = pick_positions(range(8), (size,), wanted, seed)
    if wanted >= size:
        assert together is None
        return
    parts = [pick_positions([i], (size,), wanted, seed) for i in range(8)]
    assert torch.equal(together, torch.cat(parts))
    assert all(len(set(row.tolist())) == wanted for row in together)
    counts = torch.bincount(together.flatten(), minlength=size)
    assert counts.max() - counts.min() <= 1


# --- whole networks ---


def stack(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network of three convolutions with batch norm, ReLU and a head; the first convolution stays whole."""

    def make() -> nn.Module:
        blocks = []
        for channels, out in ((3, 8), (8, 12), (12, 12)):
            blocks += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))

    model = seeded(make, dtype)
    reestimate_batch_norm(model, smooth((64, 3, 12, 12), 5, dtype).split(16))
    return model


def test_calibration_keeps_a_whole_basis_bit_for_bit() -> None:
    model = stack(torch.float32)
    plain = hc.convert(model)
    conversion = hc.convert(model, calibration=smooth((16, 3, 12, 12), dtype=torch.float32).split(8))
    for key, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, conversion.model.state_dict()[key]), key
    assert "nothing was cut" in conversion.calibration.notes[0]


def test_the_original_is_never_changed() -> None:
    model = stack()
    before = copy.deepcopy(model.state_dict())
    hc.convert(model, 2, calibration=smooth((16, 3, 12, 12)).split(8))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("lam", [1, 2, 3])
def test_calibration_reduces_the_divergence_on_unseen_inputs(lam: int) -> None:
    model, x, unseen = stack(), smooth((64, 3, 12, 12)), smooth((64, 3, 12, 12), 9)
    cut, conversion = hc.convert(model, lam), hc.convert(model, lam, calibration=x.split(16))
    assert measured_error(model, conversion.model, unseen) < 0.9 * measured_error(model, cut.model, unseen)
    record = conversion.calibration
    assert record.divergence <= record.refit_divergence <= record.plain_divergence


def test_each_layer_is_refitted_on_inputs_from_the_layers_refitted_before_it() -> None:
    model, x = stack(), smooth((32, 3, 12, 12))
    conversion = hc.convert(model, 2, calibration=[x], settings=CalibrationSettings(damping=0.0, batch_norm=False))
    # The third convolution's refit maps its new inputs to the original's outputs with least squared error.
    with torch.no_grad():
        fed, target = conversion.model[:6](fitted_rows(x)), model[:7](fitted_rows(x))
    kept = oracle.frequencies((3, 3), 2)
    (matrix,) = oracle.design_matrix(model[6], kept, fed)
    expected = np.linalg.lstsq(matrix, target.transpose(0, 1).flatten(1).numpy().T, rcond=None)[0].T
    found = to_groups(conversion.model[6].coefficients.detach(), 1, False)[0].numpy()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


class Backwards(nn.Module):
    """A network that runs its convolutions in another order than it registers them; one runs twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Conv2d(4, 4, 3)
        self.last = nn.Conv2d(4, 4, 3)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(self.first(x)).relu()).relu())


def test_layers_are_refitted_in_the_order_in_which_they_run() -> None:
    model = seeded(Backwards, torch.float64)
    x = smooth((24, 3, 12, 12))
    conversion = hc.convert(model, {"*": 2}, calibration=x.split(8))
    layers = conversion.calibration.layers
    assert [layer.name for layer in layers] == ["first", "twice", "last", "never"]
    assert layers[3].decision == "projection"
    assert "is not called" in layers[3].why
    assert measured_error(model, conversion.model, x[3::4]) < measured_error(
        model, hc.convert(model, {"*": 2}).model, x[3::4]
    )


def test_shared_tied_and_grouped_convolutions_are_refitted_together() -> None:
    model = seeded(Branches, torch.float64)
    conversion = hc.convert(model, {"*": 2}, calibration=smooth((24, 3, 20, 20)).split(8))
    names = [layer.name for layer in conversion.calibration.layers]
    assert names == ["stem", "shared", "tied_a, tied_b", "deep.odd name [x]", "unused"]
    assert conversion.model.tied_a.coefficients is conversion.model.tied_b.coefficients
    # Tied layers keep their own biases: one refit cannot fit two of them.
    assert torch.equal(conversion.model.tied_a.bias, model.tied_a.bias)
    assert not torch.equal(conversion.model.stem.bias, model.stem.bias)


class Ear(nn.Module):
    """Classifies twelve notes with long kernels (64x1, 32x1), as pitch trackers do: many unknowns, few positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 12, 64, stride=4, padding=32)
        self.middle = nn.Conv1d(12, 24, 64, stride=2, padding=32)
        self.top = nn.Conv1d(24, 24, 32, stride=2, padding=16)
        self.head = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(self.stem(x).relu(), 2)
        return self.head(self.top(self.middle(x).relu()).relu().mean(2))


def notes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return notes (count, 1, 512) with two random overtones and noise, and their classes, 0 to 11."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 12, (count,), generator=generator)
    pitch = 0.06 * 2 ** (label / 4.0)
    phase = torch.rand(count, 3, 1, generator=generator) * 6.28
    volume = torch.rand(count, 3, 1, generator=generator)
    volume[:, 0] += 0.5
    overtone = torch.arange(1, 4.0)[None, :, None]
    waves = volume / overtone * torch.sin(pitch[:, None, None] * overtone * torch.arange(512.0) + phase)
    return waves.sum(1, keepdim=True) + 0.3 * torch.randn(count, 1, 512, generator=generator), label


@pytest.fixture(scope="module")
def ear() -> nn.Module:
    """Return the network, trained until it classifies every note correctly."""
    model = seeded(Ear).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(300):
        x, label = notes(64, 1000 + step)
        loss = nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def share_right(model: nn.Module, x: Tensor, label: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == label).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("lam", [{"*": 16, "top": 8}, {"*": 8, "top": 4}], ids=["a quarter kept", "an eighth kept"])
def test_few_inputs_are_never_worse_than_the_plain_cut_and_more_inputs_help(
    ear: nn.Module, lam: dict[str, int]
) -> None:
    unseen = notes(500, 1)
    assert share_right(ear, *unseen) > 0.98
    plain = share_right(hc.convert(ear, lam).model, *unseen)
    assert plain < 0.85
    found = []
    for count in (8, 32, 128, 512):
        conversion = hc.convert(ear, lam, calibration=notes(count, 2)[0].split(32))
        found.append(share_right(conversion.model, *unseen))
        assert 32 < conversion.calibration.layers[2].inputs_enough < 512
    assert found[0] >= plain - 0.01
    assert all(more >= fewer - 0.01 for fewer, more in pairwise(found)), (plain, found)
    assert found[-1] - plain > 0.75 * (1 - plain)


def test_a_refit_that_does_not_generalise_is_rejected() -> None:
    fit, _, _ = problem(NormalEquations, "plain", 24)
    held, _, _ = problem(NormalEquations, "plain", 24, seed=1)
    best = choose(fit, held, [1e-3])
    assert best.decision == "refit"
    # With residuals of the opposite sign, a change that helps the fit harms the held-back inputs.
    held.cross_GON *= -1
    held.channels[[0, 3]] *= -1
    assert choose(fit, held, [1e-3]).decision == "projection"


def test_weak_damping_is_not_tried_with_few_positions() -> None:
    model, plan, _ = one_layer("16x16 patches", torch.float32)
    x = smooth((8, 3, 32, 32), dtype=torch.float32)
    (record,) = hc.convert(model, plan, calibration=[x]).calibration.layers
    assert record.positions < 2 * record.unknowns
    assert record.damping is None or record.damping >= 1e-4
    assert record.inputs_enough == math.ceil(10 * record.unknowns / 4 * 8 / 6)


@pytest.mark.parametrize(("positions", "tried"), [(1e-6, 1), (1e-2, 3), (1.0, 5), (10.0, 6), (1e9, 8)])
def test_fewer_positions_for_each_unknown_exclude_weak_dampings(positions: float, tried: int) -> None:
    assert dampings(CalibrationSettings(), positions) == DAMPINGS[:tried], "strongest first"
    assert dampings(UNDAMPED, positions) == (0.0,)


def test_blending_interpolates_between_before_and_after() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = {key: torch.full_like(tensor, 4) for key, tensor in model.state_dict().items()}
    after = {key: torch.full_like(tensor, 8) for key, tensor in model.state_dict().items()}
    for share, value in ((0.0, 4.0), (0.25, 5.0), (0.5, 6.0), (1.0, 8.0)):
        blend(model, before, after, share)
        assert (model[0].running_mean == value).all()
        assert model[0].num_batches_tracked == 4, "integers are not interpolated"


def test_the_candidate_with_the_least_error_on_held_back_inputs_is_chosen() -> None:
    model, _, _ = one_layer("plain")
    harmonic, x = to_harmonic(model[0]), random_input((2, 3, 9, 9), torch.float64)
    call = captured(harmonic, x)
    layer = Kernel.of(harmonic, call).layer(call, True, 1 << 30, 0)
    errors = {0.5: 0.6, 10.0: 0.9, 1.0: 0.4, 0.1: 0.7, 0.01: 0.8, 0.001: 0.75, 0.0001: 0.1}

    class FixedErrors(Problem):
        def error(self, change: Change | None) -> float:
            return 1.0 if change is None else errors[change.damping]

        def rescaling(self) -> Change:
            return Change(layer.coefficients, None, 0.5)

        def candidates(self, dampings: Any) -> Iterator[Change]:
            return (Change(layer.coefficients, None, damping) for damping in dampings)

    choice = choose(FixedErrors(layer), FixedErrors(layer), [damping for damping in errors if damping != 0.5])
    assert (choice.decision, choice.change.damping, choice.error_before, choice.error_after) == ("refit", 1.0, 1.0, 0.4)
    errors[1.0] = 2.0
    assert choose(FixedErrors(layer), FixedErrors(layer), [10.0, 1.0]).decision == "rescaled"
    errors[0.5] = 1.0
    assert choose(FixedErrors(layer), FixedErrors(layer), [1.0]).decision == "projection"


def test_a_calibration_that_makes_outputs_worse_is_reverted() -> None:
    model, x = stack(), smooth((16, 3, 12, 12))
    data = calibration_set([x])
    conversion = hc.convert(model, 3)
    before = {key: tensor.clone() for key, tensor in conversion.model.state_dict().items()}
    plain, _ = divergence(model, conversion.model, data.held)
    with torch.no_grad():
        conversion.model[6].coefficients.neg_()
    worse, _ = divergence(model, conversion.model, data.held)
    kept, final = never_worse(Divergence(model, data.held), conversion.model, before, plain, worse)
    assert (kept, final) == (0.0, plain)
    assert all(torch.equal(before[key], tensor) for key, tensor in conversion.model.state_dict().items())


def test_the_divergence_of_logits_is_the_mean_kl() -> None:
    a, b = seeded(lambda: nn.Linear(3, 4), seed=0), seeded(lambda: nn.Linear(3, 4), seed=1)
    x = random_input((5, 3))
    with torch.no_grad():
        p, q = a(x).double().softmax(1).numpy(), b(x).double().softmax(1).numpy()
    a.num_classes = 4
    expected = sum(p[n, c] * math.log(p[n, c] / q[n, c]) for n in range(5) for c in range(4)) / 5
    batches = [Batch(x[:2], (0, 1)), Batch(x[2:], (2, 3, 4))]
    assert divergence(a, b, batches) == (pytest.approx(expected, rel=1e-6), None)
    # If a network does not declare itself a classifier, its outputs are compared directly.
    del a.num_classes
    with torch.no_grad():
        b.load_state_dict(a.state_dict())
        b.bias += 100
        size = a(x).double().square().sum().item()
    assert divergence(a, b, batches) == (pytest.approx(5 * 4 * 100**2 / size, rel=1e-5), None)


@pytest.mark.parametrize(("most", "runs"), [(1 << 28, 2), (5 * 4 * 4, 3), (0, 4)])
def test_the_outputs_of_the_original_are_cached_within_a_memory_limit(
    most: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence_room, "MOST_BYTES", most)
    a, seen = seeded(lambda: nn.Linear(3, 4)), []
    batches = [Batch(random_input((5, 3), seed=seed), tuple(range(5))) for seed in (0, 1)]
    others = [seeded(lambda: nn.Linear(3, 4), seed=seed) for seed in (1, 2)]
    expected = [divergence(a, other, batches) for other in others]
    a.register_forward_hook(lambda *_: seen.append(1))
    compare = Divergence(a, batches)
    assert [compare(other) for other in others] == expected
    assert len(seen) == runs


def test_masked_classes_are_ignored_and_incomparable_outputs_reported() -> None:
    class Masked(nn.Linear):
        num_classes = 4

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).index_fill(1, torch.tensor([2]), -math.inf)

    class Ragged(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[: 2 if self.bias is None else 1]

    batches = [Batch(random_input((5, 3)), tuple(range(5)))]
    a, b = seeded(lambda: Masked(3, 4)), seeded(lambda: Masked(3, 4), seed=1)
    assert 0 < divergence(a, b, batches)[0] < 10
    other = "the converted network's are 2x4, the original's 1x4"
    assert divergence(Ragged(3, 4), Ragged(3, 4, bias=False), batches) == (None, other)
    nothing = nn.Flatten()
    nothing.forward = lambda x: x.argmax(1)
    assert divergence(nothing, nothing, batches) == (None, "none of them is a tensor of floating point")
    with torch.no_grad():
        plain = nn.Linear(3, 4)
        plain.bias[0] = math.inf
    assert divergence(plain, plain, batches) == (None, "they are not finite")
    assert divergence(a, b, [])[1] == "they are all zero, or there are none"


def test_the_reason_why_outputs_cannot_be_compared_is_recorded() -> None:
    """Running out of memory is not mistaken for outputs of an unusual kind."""

    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.conv(x).relu())
            if hasattr(self.conv, "coefficients"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return x

    x = smooth((8, 3, 9, 9))
    record = hc.convert(seeded(Hungry, torch.float64), {"*": 2}, calibration=x.split(4)).calibration
    assert record.divergence is None
    why = "out of memory (CUDA out of memory. Tried to allocate 2 GiB): lower settings.memory, the size of a batch or "
    assert record.incomparable.startswith(why)
    assert record.to_json()["incomparable"] == record.incomparable
    assert [layer.decision for layer in record.layers] == ["refit", "refit"]
    (line,) = [line for line in calibration_lines(record) if "cannot be compared" in line]
    assert line.startswith(f"the outputs cannot be compared ({why}")


def test_the_share_of_held_back_images_with_the_same_top1_is_recorded_and_printed(tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*parts)

    model, x = seeded(classifier), smooth((64, 3, 12, 12), dtype=torch.float32)
    conversion = hc.convert(model, {"*": 1}, calibration=x.split(16))
    record, held = conversion.calibration, x[3::4]
    plain = hc.convert(model, {"*": 1}).model
    with torch.no_grad():
        top1 = [network(held).argmax(1) for network in (model, plain, conversion.model)]
    shares = [(top1[0] == other).double().mean().item() for other in top1[1:]]
    assert shares[1] > shares[0]
    assert (record.plain_agreement, record.agreement) == (pytest.approx(shares[0]), pytest.approx(shares[1]))
    low, high = wilson_interval(shares[1], 16)
    line = (
        f"same top-1 as the uncut network on {shares[1]:.1%} of 16 held-back inputs (95 %: {low:.1%} to {high:.1%}) "
        f"(plain cut: {shares[0]:.1%})"
    )
    assert line in calibration_lines(record)
    hc.save(conversion, tmp_path / "saved.safetensors")
    header = read_header(tmp_path / "saved.safetensors")
    assert header.history["calibration"]["agreement"] == record.agreement


def test_outputs_that_are_not_logits_have_no_top1() -> None:
    maps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).double().eval()
    record = hc.convert(maps, {"*": 2}, calibration=smooth((16, 3, 12, 12)).split(4)).calibration
    assert (record.plain_agreement, record.agreement) == (None, None)
    assert not any("top-1" in line for line in calibration_lines(record))


@pytest.mark.parametrize("kind", ["tuple", "dataclass", "dataclass with slots", "mapping", "NumPy"])
def test_layers_and_networks_may_return_any_structure_of_tensors(kind: str) -> None:
    @dataclass
    class Plain:
        logits: Any

    @dataclass(slots=True)
    class Slotted:
        logits: Any

    class Masked(nn.Conv2d):
        def forward(self, image: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            mask = torch.ones_like(image[:, :1]) if mask is None else mask
            return super().forward(image * mask), mask[..., 1:-1, 1:-1]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm, self.c = Masked(3, 8, 3), Masked(8, 8, 3), nn.BatchNorm2d(8), Masked(8, 4, 3)

        def forward(self, x: Tensor) -> Any:
            h, mask = self.a(image=x)
            h, mask = self.b(image=h.relu(), mask=mask)
            h, _ = self.c(image=self.norm(input=h).relu(), mask=mask)
            return {
                "tuple": lambda: (h, mask), "dataclass": lambda: Plain(h), "dataclass with slots": lambda: Slotted(h),
                "mapping": lambda: UserDict(logits=h), "NumPy": h.numpy,
            }[kind]()  # fmt: skip

    record = hc.convert(seeded(Net, torch.float64), {"*": 2}, calibration=smooth((32, 3, 12, 12)).split(8)).calibration
    assert [layer.decision for layer in record.layers] == ["refit"] * 3
    assert record.divergence < record.plain_divergence
    assert not any("batch norms were not" in note for note in record.notes)


# --- batch norm ---


def test_batch_norm_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4)).eval()
    x = random_input((12, 3, 5, 5))
    assert reestimate_batch_norm(model, x.split(4)) == 2
    with torch.no_grad():
        parts = [model[0](part).transpose(0, 1).flatten(1).numpy() for part in x.split(4)]
    assert model[1].running_mean.numpy() == pytest.approx(np.mean([p.mean(1) for p in parts], 0), abs=1e-6)
    assert model[1].running_var.numpy() == pytest.approx(np.mean([p.var(1, ddof=1) for p in parts], 0), rel=1e-5)
    # The second batch norm reads the first one's output, normalised by its own batch and without dropout.
    assert model[3].running_mean.abs().max() < 1e-6
    assert (model[3].running_var - 1).abs().max() < 0.02
    assert model[1].num_batches_tracked == 0
    assert not any(module.training for module in model.modules())


def test_a_small_last_batch_is_weighted_by_its_size() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm2d(2)), torch.float64)
    x = random_input((8, 2, 3, 3), torch.float64)
    assert reestimate_batch_norm(model, [x[:7], x[7:] + 5.0]) == 1
    whole = torch.cat([x[:7], x[7:] + 5.0])
    torch.testing.assert_close(model[0].running_mean, whole.mean((0, 2, 3)), rtol=1e-12, atol=0)


def test_batch_norms_that_do_not_run_or_have_one_value_keep_their_statistics() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(3), "unused": nn.BatchNorm1d(3)})
    model.forward = lambda x: model["used"](x)
    assert reestimate_batch_norm(model, [random_input((1, 3))]) == 0
    assert torch.equal(model["used"].running_var, torch.ones(3))
    assert reestimate_batch_norm(model, [random_input((8, 3))]) == 1


def test_batch_norms_are_reestimated_only_where_that_helps() -> None:
    model, x = stack(), smooth((64, 3, 12, 12))
    wrecked = copy.deepcopy(model)
    with torch.no_grad():
        for norm in (wrecked[4], wrecked[7]):
            norm.running_mean.add_(2)  # wrong statistics, as after a cut
    plan = hc.convert(model, 2).plan
    converted = hc.convert(wrecked, 2).model
    record = calibrate(model, converted, plan, x.split(16), CalibrationSettings(refit=False))
    assert record.batch_norms == 3
    assert record.divergence < record.plain_divergence
    off = hc.convert(model, 2, calibration=x.split(16), settings=CalibrationSettings(batch_norm=False))
    assert off.calibration.batch_norms == 0
    assert torch.equal(off.model[1].running_mean, model[1].running_mean)


# --- several processes ---

SCRIPT = """
import sys, torch
import harmconvert as hc
import harmconvert.calibration.limits as limits
from harmconvert.search import SearchSettings
from harmconvert.calibration import Refit
from harmconvert.network import joined, rank
sys.path.insert(0, sys.argv[2])
from tests.test_calibration import smooth, stack
torch.set_num_threads(1)

def unlucky(add_batch):
    def wrapped(self, problem, tied, batch):
        if rank() == 1 and tied.names[0] == "3":
            raise MemoryError("no memory left")
        return add_batch(self, problem, tied, batch)
    return wrapped

with joined():
    if sys.argv[3] == "trouble":
        Refit._add_batch = unlucky(Refit._add_batch)
        limits.free_memory = lambda device: (1 << 33) >> (18 * rank())
    kind = {"lam": 2}
    if sys.argv[3] == "best":
        kind = {"budget": "params=60%", "search": SearchSettings(1, frequencies="best", axes=("space",))}
    if sys.argv[3] == "coded":
        kind = {"lam": 2, "rank": {"6": 4}, "bits": 3}
    conversion = hc.convert(stack(), calibration=smooth((24, 3, 12, 12)).split(4), **kind)
    record = conversion.calibration
    found = {"state": conversion.model.state_dict(), "divergence": record.divergence}
    found["layers"] = [[layer.decision, layer.solver, layer.why and str(layer.why)] for layer in record.layers]
    found["streams"] = [entry.stream for entry in conversion.coded.values()]
    found["kept"] = [list(kept.frequencies) for kept in conversion.plan.on("space").values()]
    torch.save(found, f"{sys.argv[1]}{rank()}")
"""


def launched(folder: Path, processes: int, what: str) -> list[dict[str, object]]:
    """Run the script in several processes with torchrun; return the result of each."""
    root = str(Path(__file__).resolve().parents[1])
    script, out = folder / "script.py", folder / f"{what}-{processes}-"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launch, str(script), str(out), root, what], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(f"{out}{number}", weights_only=True) for number in range(processes)]


@pytest.mark.slow
def test_two_processes_give_the_same_result_as_one(tmp_path: Path) -> None:
    (one,) = launched(tmp_path, 1, "parity")
    for two in launched(tmp_path, 2, "parity"):
        assert two["layers"] == one["layers"]
        assert two["divergence"] == pytest.approx(one["divergence"], rel=1e-9)
        for key, tensor in one["state"].items():
            assert torch.allclose(tensor.double(), two["state"][key].double(), rtol=1e-8, atol=1e-10), key


@pytest.mark.slow
def test_if_one_process_cannot_refit_a_layer_no_process_does(tmp_path: Path) -> None:
    first, second = launched(tmp_path, 2, "trouble")
    assert [layer[0] for layer in first["layers"]] == [layer[0] for layer in second["layers"]] == ["failed", "refit"]
    assert "another process" in first["layers"][0][2]
    assert "no memory left" in second["layers"][0][2]
    assert first["layers"][1] == second["layers"][1]
    assert all(torch.equal(tensor, second["state"][key]) for key, tensor in first["state"].items())


@pytest.mark.slow
def test_two_processes_code_the_same_streams(tmp_path: Path) -> None:
    """The effect of errors is measured in random directions, of which two processes use others than one."""
    (one,) = launched(tmp_path, 1, "coded")
    first, second = launched(tmp_path, 2, "coded")
    assert len(first["streams"]) == len(one["streams"]) > 3
    assert all(torch.equal(a, b) for a, b in zip(first["streams"], second["streams"], strict=True))
    assert all(torch.equal(tensor, second["state"][key]) for key, tensor in first["state"].items())
    sizes = [sum(len(stream) for stream in found["streams"]) for found in (one, first)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert first["divergence"] < 1.5 * one["divergence"]


# --- what is fed to it ---


def test_batches_may_be_pairs_dicts_or_generators_of_any_size() -> None:
    model, x = stack(), smooth((21, 3, 12, 12))
    first = hc.convert(model, 2, calibration=[x[:9], x[9:10], x[10:]])
    pairs = hc.convert(model, 2, calibration=((part, torch.zeros(len(part))) for part in (x[:9], x[9:10], x[10:])))
    lists = hc.convert(model, 2, calibration=[[x[:9], None], [x[9:10], None], [x[10:], None]])
    keywords = hc.convert(model, 2, calibration=[{"input": part} for part in (x[:9], x[9:10], x[10:])])
    assert first.calibration.inputs == 21
    assert first.calibration.held_back == 5
    for other in (pairs, lists, keywords):
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))


def test_an_endless_loader_is_read_up_to_the_limit() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield smooth((8, 3, 12, 12))

    conversion = hc.convert(stack(), 2, calibration=endless(), settings=CalibrationSettings(inputs=20))
    assert conversion.calibration.inputs == 24
    assert "only the first 24 inputs" in conversion.calibration.notes[0]


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(InputError, match=r"calibration= holds no input: give some images"):
        hc.convert(stack(), 2, calibration=[])


def test_a_single_tensor_is_refused_as_calibration_inputs() -> None:
    with pytest.raises(UsageError, match=r"calibration= is a Tensor: give a list or a loader of batches"):
        hc.convert(stack(), 2, calibration=torch.zeros(4, 3, 12, 12))


def test_inputs_with_nan_are_named() -> None:
    x = smooth((8, 3, 12, 12))
    x[5, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="calibration batch 1 holds NaN"):
        hc.convert(stack(), 2, calibration=x.split(4))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.c = nn.Conv2d(4, 4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.c(self.a(left) + self.b(right))


def test_the_message_for_a_network_with_two_inputs_says_how_to_pass_them() -> None:
    model, x, y = seeded(TwoInputs, torch.float64), smooth((8, 3, 9, 9)), smooth((8, 3, 9, 9), 1)
    with pytest.raises(UsageError, match=r"does not run on calibration= inputs .*dicts of keywords or"):
        hc.convert(model, {"*": 2}, calibration=[(x, y)])
    pairs = hc.convert(model, {"*": 2}, calibration=[((x, y), None)])
    keywords = hc.convert(model, {"*": 2}, calibration=[{"left": x, "right": y}])
    assert torch.equal(pairs.model.c.coefficients, keywords.model.c.coefficients)
    assert {layer.decision for layer in pairs.calibration.layers} == {"refit"}


def test_with_one_input_nothing_is_refitted_and_the_record_says_so() -> None:
    model = stack()
    conversion = hc.convert(model, 2, calibration=[smooth((1, 3, 12, 12))])
    assert {layer.decision for layer in conversion.calibration.layers} == {"projection"}
    assert "none can be held back" in conversion.calibration.notes[0]
    assert conversion.calibration.batch_norms == 0


def test_with_constant_activations_the_projection_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)  # after the ReLU, the next layer's input is zero
    conversion = hc.convert(model, {"2": 2}, calibration=smooth((8, 3, 9, 9)).split(4))
    assert conversion.calibration.layers[0].decision == "projection"
    assert torch.equal(conversion.model[2].coefficients, hc.convert(model, {"2": 2}).model[2].coefficients)


class Overflowing(nn.Module):
    """A network whose second convolution has infinite inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) / 0)


def test_a_layer_that_cannot_be_refitted_keeps_its_projection_and_is_named() -> None:
    model = seeded(Overflowing)
    conversion = hc.convert(model, {"*": 2}, calibration=smooth((8, 3, 9, 9), dtype=torch.float32).split(4))
    a, b = conversion.calibration.layers
    assert a.decision == "refit"
    assert b.decision == "failed"
    assert "NaN or infinite" in b.why
    assert conversion.calibration.failed == (b,)
    assert torch.equal(conversion.model.b.coefficients, hc.convert(model, {"*": 2}).model.b.coefficients)


class Doubling(nn.Conv2d):
    """A convolution whose kernel is not a linear function of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight**2, self.bias)


class Unfolding(nn.Conv2d):
    """A convolution that does not call torch's convolution."""

    def forward(self, input: Tensor) -> Tensor:
        columns = nn.functional.unfold(input, 3)
        return (self.weight.flatten(1) @ columns).unflatten(2, (input.shape[2] - 2, -1))


def test_a_layer_whose_convolution_is_not_observed_is_skipped_and_the_others_are_refitted() -> None:
    model = nn.Sequential(Unfolding(3, 4, 3), nn.Conv2d(4, 4, 3)).double().eval()
    layers = hc.convert(model, {"*": 2}, calibration=smooth((16, 3, 9, 9)).split(4)).calibration.layers
    found = {layer.name: (layer.decision, layer.why) for layer in layers}
    assert found["0"] == ("projection", "its forward is not exactly one convolution")
    assert found["1"] == ("refit", None)


@pytest.mark.parametrize("inplace", [True, False])
def test_tensors_changed_in_place_later_are_recorded_with_their_earlier_values(inplace: bool) -> None:
    def make() -> nn.Module:
        parts = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.Conv2d(8, 4, 3)]
        return nn.Sequential(*parts)

    x = smooth((24, 3, 12, 12))
    found = hc.convert(seeded(make, torch.float64), {"*": 2}, calibration=x.split(8))
    plain = seeded(make, torch.float64)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    expected = hc.convert(plain, {"*": 2}, calibration=x.split(8))
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True))


def test_every_solver_refits_half_precision() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 5)), torch.bfloat16)
    x = smooth((32, 3, 14, 14), dtype=torch.bfloat16)
    for memory in (1 << 30, 1 << 20):
        conversion = hc.convert(model, {"2": 4}, calibration=x.split(8), settings=CalibrationSettings(memory=memory))
        (record,) = conversion.calibration.layers
        assert record.decision == "refit"
        assert record.error_after < 0.97 * record.error_before


def test_inputs_of_different_sizes_are_accepted() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 5)), torch.float64)
    batches = [smooth((8, 3, 14, 14)), smooth((8, 3, 20, 17), 1)]
    for memory in (1 << 30, 1 << 20):
        conversion = hc.convert(model, {"2": 4}, calibration=batches, settings=CalibrationSettings(memory=memory))
        assert conversion.calibration.layers[0].decision == "refit"


def test_a_layer_that_runs_only_on_some_batches_is_refitted() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x) if x.shape[-1] == 12 else x

    batches = [smooth((8, 3, 12, 12)), smooth((8, 3, 9, 9), 1), smooth((8, 3, 12, 12), 2)]
    layers = hc.convert(seeded(Sometimes, torch.float64), {"*": 2}, calibration=batches).calibration.layers
    assert [layer.decision for layer in layers] == ["refit", "refit"]


def test_a_list_of_single_images_is_one_batch() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": self.b(self.a(torch.stack(images)).relu()).flatten()}]

    model = seeded(Detector, torch.float64)
    lists = [list(part) for part in smooth((12, 3, 12, 12)).split(4)]
    first = hc.convert(model, {"b": 2}, calibration=lists)
    pairs = hc.convert(model, {"b": 2}, calibration=[(part, None) for part in lists])
    assert first.calibration.inputs == 12
    assert torch.equal(first.model.b.coefficients, pairs.model.b.coefficients)


def test_the_failure_of_one_layer_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def failing(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError("no memory left")
        return choose(*arguments)

    replace_everywhere(monkeypatch, choose, failing)
    layers = hc.convert(stack(), {"*": 2}, calibration=smooth((24, 3, 12, 12)).split(8)).calibration.layers
    assert [layer.decision for layer in layers] == ["failed", "refit", "refit"]
    assert "out of memory (no memory left): lower settings.memory, " in layers[0].why


def test_a_fused_network_has_no_record_of_calibration() -> None:
    model = stack(torch.float32)
    conversion = hc.convert(model, 2, calibration=smooth((16, 3, 12, 12), dtype=torch.float32).split(8))
    dense = hc.fuse(conversion.model)
    assert hc.verify(dense, hc.convert(dense).model, smooth((2, 3, 12, 12), dtype=torch.float32)).ok


def test_a_kernel_made_by_unknown_code_keeps_its_projection_and_the_record_says_so() -> None:
    model = nn.Sequential(Doubling(3, 4, 3), nn.Conv2d(4, 4, 3)).double().eval()
    conversion = hc.convert(model, {"*": 2}, calibration=smooth((8, 3, 9, 9)).split(4))
    first, second = conversion.calibration.layers
    assert first.decision == "projection"
    assert "in a way that cannot be undone" in first.why
    assert second.decision == "refit"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"damping": -1.0}, "damping .* must be zero or more"), ({"memory": 5}, "must be at least a megabyte")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CalibrationSettings(**settings)


def test_a_memory_limit_changes_the_solver_but_not_the_result() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 8, 5)), torch.float64)
    x = smooth((32, 3, 14, 14))
    plenty, little = (
        hc.convert(model, {"2": 4}, calibration=x.split(8), settings=CalibrationSettings(memory=memory))
        for memory in (1 << 30, 1 << 20)
    )
    assert plenty.calibration.layers[0].solver == "normal equations"
    assert little.calibration.layers[0].solver == "conjugate gradients"
    assert little.calibration.layers[0].error_after < 1.1 * plenty.calibration.layers[0].error_after


def test_the_calibration_record_is_saved_and_verified(tmp_path: Path) -> None:
    model, x = stack(torch.float32), smooth((32, 3, 12, 12), dtype=torch.float32)
    conversion = hc.convert(model, 2, calibration=x.split(8))
    assert hc.verify(model, conversion, x[:2]).as_planned
    assert not hc.verify(model, conversion.model, x[:2]).as_planned, "a bare network does not say what was calibrated"
    hc.save(conversion, tmp_path / "a.safetensors")
    network = read_checkpoint(tmp_path / "a.safetensors", model=model)
    loaded = network.model
    check = hc.verify(model, network, x[:2])
    assert check.as_planned
    assert not check.ok
    history = network.header.history["calibration"]
    assert [layer["decision"] for layer in history["layers"]] == ["refit", "refit"]
    with torch.no_grad():
        loaded[6].coefficients[1, 2, 0] *= 1.001
        loaded[4].running_mean[0] += 1e-3
    problems = hc.verify(model, network, x[:2]).problems
    assert any(p.startswith("6: its coefficients are not what calibration wrote") for p in problems)
    assert any(p.startswith("4.running_mean") for p in problems)


def test_nan_logits_of_the_original_are_not_treated_as_masked_classes() -> None:
    model = seeded(lambda: nn.Linear(3, 4))
    model.num_classes = 4
    with torch.no_grad():
        model.bias[1] = math.nan
    batches = [Batch(random_input((5, 3)), tuple(range(5)))]
    assert divergence(model, seeded(lambda: nn.Linear(3, 4)), batches) == (None, "they are not finite")


def test_a_refit_out_of_range_is_not_written() -> None:
    conv: Any = to_harmonic(nn.Conv2d(2, 2, 3).half())
    kernel = Kernel(conv, conv.weight.detach().double())
    before = conv.coefficients.clone()
    for value in (30000.0, 1e6):  # out of range: only the refitted coefficients, or also the projected ones
        with pytest.raises(RefitError, match="its refit is out of float16's range"):
            kernel.write(torch.full((2, 2, 3, 3), value, dtype=torch.float64))
        assert torch.equal(conv.coefficients, before)
    kernel.write(torch.full((2, 2, 3, 3), 20000.0, dtype=torch.float64))
    assert conv.coefficients.isfinite().all()


def test_calibrated_coefficients_moved_to_other_frequencies_fail_verification() -> None:
    """Their values have not changed, but they belong to other frequencies than those for which they were fitted."""
    model, x = stack(torch.float32), smooth((32, 3, 12, 12), dtype=torch.float32)
    conversion = hc.convert(model, 2, calibration=x.split(8))
    converted = conversion.model
    assert hc.verify(model, conversion, x[:2]).as_planned
    converted[6].frequencies = ((0, 0), (1, 0), (2, 0))
    converted[6]._set_basis()
    problems = hc.verify(model, conversion, x[:2]).problems
    assert [p for p in problems if p.startswith("6: its coefficients are not what calibration wrote")]


class FloatHead(nn.Module):
    """A network with a backbone in 16 bits and a head in float32: on a CPU it runs only in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        convs = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.body = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_16_bit_network_that_only_runs_in_float32_is_calibrated_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = FloatHead(dtype).eval()
    batches = list(smooth((64, 3, 12, 12), dtype=torch.float32).split(16))
    with pytest.raises(RuntimeError, match=r"should be the same|same dtype"):
        network(batches[0])
    calibrated = hc.convert(network, 2, calibration=batches)
    assert [layer.decision for layer in calibrated.calibration.layers] == ["refit"]
    precise = hc.convert(copy.deepcopy(network).float(), 2, calibration=batches)
    assert calibrated.model.body[2].coefficients.dtype == dtype
    rounded = precise.model.body[2].coefficients.to(dtype)
    torch.testing.assert_close(calibrated.model.body[2].coefficients, rounded, rtol=1e-2, atol=1e-3)
    assert {p.dtype for p in network.parameters()} == {dtype, torch.float32}
    searched = hc.convert(network, budget="params=70%", example_input=batches[0][:1], calibration=batches)
    assert searched.calibration.layers


# --- plain layers ---

PLAIN_LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear over tokens": (lambda: nn.Linear(5, 4), (6, 3, 2, 5)),
    "linear over one example": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (6, 5)),
    "1x1": (lambda: nn.Conv2d(5, 4, 1), (6, 5, 3, 2)),
    "1x1, grouped, strided": (lambda: nn.Conv2d(6, 4, 1, 2, groups=2), (6, 6, 5, 4)),
    "3x3": (lambda: nn.Conv2d(5, 4, 3, padding=1), (6, 5, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (6, 4, 4, 4)),
    "1-d": (lambda: nn.Conv1d(5, 4, 3), (6, 5, 9)),
}


@pytest.mark.parametrize("name", PLAIN_LAYERS)
def test_a_plain_layer_is_observed_and_written_as_a_convolution(name: str) -> None:
    make, shape = PLAIN_LAYERS[name]
    layer = seeded(make, torch.float64)
    calls: list[ConvCall] = []
    x = random_input(shape).double()
    watch_convolutions(layer, {"": layer}, x, lambda _, call: calls.append(call))  # type: ignore[arg-type]
    (call,) = calls
    kernel = Kernel.of(layer, call)
    facts = kernel.layer(call, layer.bias is not None, 1 << 30, 0)
    z_RGN = responses(call, facts.basis)
    output_RGO = torch.einsum("rgn,gon->rgo", z_RGN, facts.coefficients)
    bias = 0 if call.bias is None else call.bias
    assert torch.allclose(output_RGO.flatten(1) + bias, outputs(call.output).flatten(0, 1))
    kernel.write(facts.kernel(2 * facts.coefficients))
    with torch.no_grad():
        assert torch.allclose(layer(x) - bias_map(layer), 2 * (outputs_of(call, x) - bias_map(layer)))


def bias_map(layer: nn.Module) -> Tensor:
    """Return the bias in a shape that broadcasts to the output."""
    if layer.bias is None:
        return torch.zeros(1)
    axes = 0 if isinstance(layer, nn.Linear) else layer.weight.dim() - 2  # type: ignore[operator]
    return layer.bias.reshape(-1, *[1] * axes)  # type: ignore[operator]


def outputs_of(call: ConvCall, x: Tensor) -> Tensor:
    """Return the recorded output in the shape that the layer returned."""
    return (
        call.output
        if x.dim() == call.input.dim() and call.input.shape == x.shape
        else call.output.transpose(1, 2).reshape(*x.shape[:-1], -1)
    )
