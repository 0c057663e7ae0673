"""Bases other than the DCT: their vectors, and networks that are converted, truncated, saved and calibrated in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import harmconvert as hc
from harmconvert.cli import options
from harmconvert.errors import UsageError
from harmconvert.kernels import BASES, Basis, all_frequencies, energy_kept, gaussian_vectors, haar_vectors, klt_vectors
from harmconvert.layers import HarmonicMixin, to_harmonic
from harmconvert.network import convolutions
from harmconvert.pipeline import convert
from harmconvert.plan import Plan, bases_of, network_cost
from harmconvert.storage import read_header
from harmconvert.training import harmonize

from . import oracle
from .networks import Branches, random_input, seeded

X = random_input((2, 3, 16, 16), torch.float64)
SIZES = [2, 3, 4, 5, 7, 8, 11, 64]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vectors", [haar_vectors, gaussian_vectors])
def test_vectors_of_an_axis_are_orthonormal(vectors: Any, size: int) -> None:
    found = vectors(size)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_haar_of_a_power_of_two_equals_the_textbook_definition(size: int) -> None:
    np.testing.assert_allclose(haar_vectors(size).numpy(), oracle.haar_matrix(size), atol=1e-14)


@pytest.mark.parametrize("size", [3, 5, 6, 7, 11])
def test_haar_of_any_other_size_is_a_wavelet_basis(size: int) -> None:
    mean, *wavelets = haar_vectors(size).numpy()
    assert np.ptp(mean) == 0
    for wavelet in wavelets:
        assert wavelet.sum() == pytest.approx(0, abs=1e-13)
        values = wavelet[np.flatnonzero(wavelet)]
        assert len(set(np.round(values, 12))) == 2, "one value to the left, one to the right"
        assert np.all(np.diff(np.flatnonzero(wavelet)) == 1), "in one stretch"


@pytest.mark.parametrize("size", [2, 3, 5, 7, 9])
def test_the_gaussian_basis_spans_the_derivatives_of_a_gaussian(size: int) -> None:
    found = gaussian_vectors(size).numpy()
    for order in range(min(size, 5)):
        derivative = oracle.gaussian_derivative(size, order)
        inside = found[: order + 1].T @ (found[: order + 1] @ derivative)
        np.testing.assert_allclose(inside, derivative, atol=1e-10 * np.abs(derivative).max())
        assert abs(found[order] @ derivative) > 1e-6 * np.linalg.norm(derivative), "and each adds its own"


def test_gaussian_vectors_alternate_between_even_and_odd() -> None:
    for order, vector in enumerate(gaussian_vectors(7)):
        torch.testing.assert_close(vector.flip(0), vector * (-1) ** order, rtol=0, atol=1e-12)


def test_no_orthonormal_basis_keeps_more_energy_than_the_klt_of_a_layer() -> None:
    kernel = seeded(lambda: nn.Conv2d(8, 8, 5)).weight.detach().cumsum(-1)
    size, frequencies = (5, 5), all_frequencies((5, 5))
    values = np.linalg.svd(kernel.double().reshape(-1, 25).numpy(), compute_uv=False) ** 2
    for kept in (1, 3, 10, 24):
        energies = {name: energy_kept(kernel, Basis(name).kernels_for(kernel, frequencies[:kept])) for name in BASES}
        assert energies["klt"] == pytest.approx(values[:kept].sum() / values.sum(), abs=1e-9)
        assert all(energies["klt"] >= energy for energy in energies.values())
        random = torch.linalg.qr(torch.randn(25, kept, dtype=torch.float64))[0].T
        assert energies["klt"] >= energy_kept(kernel, random)
    assert klt_vectors(kernel).shape == (25, 25)
    assert Basis("klt").kernels_for(torch.empty(4, 4, *size, device="meta")).is_meta


def test_the_signs_of_a_klt_are_deterministic() -> None:
    kernel = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    for vector in klt_vectors(kernel):
        assert vector[vector.abs().argmax()] > 0


def test_the_command_line_knows_every_basis() -> None:
    (option,) = options.basis(lambda: None).__click_params__
    assert tuple(option.type.choices) == BASES


def test_invalid_bases_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown basis 'fourier': use one of dct, haar, gaussian, klt"):
        Basis("fourier")
    with pytest.raises(UsageError, match="klt basis is fitted to each layer"):
        Basis("klt").kernels((3, 3))
    with pytest.raises(UsageError, match="klt basis is fitted to kernels, but these are not trained yet"):
        harmonize(nn.Conv2d(3, 4, 3), basis="klt")
    plan = convert(nn.Conv2d(3, 4, 3), basis="haar").plan
    with pytest.raises(UsageError, match=r"the plan uses the basis haar \(ortho\), not klt \(ortho\)"):
        convert(nn.Conv2d(3, 4, 3), plan, basis="klt")
    assert convert(nn.Conv2d(3, 4, 3), plan).plan == plan


@pytest.mark.parametrize("normalization", ["ortho", "l1"])
@pytest.mark.parametrize("name", BASES)
def test_the_whole_basis_reproduces_the_network(name: str, normalization: str) -> None:
    model = seeded(Branches, torch.float64)
    conversion = convert(model, basis=name, normalization=normalization)
    check = hc.verify(model, conversion.model, X)
    assert check.ok, check.verdict
    assert check.max_relative_error < 1e-12
    dense = hc.fuse(conversion.model)
    assert list(dense.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(dense(X), model(X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_a_truncated_network_is_verified_saved_loaded_and_fused(name: str, tmp_path: Path) -> None:
    model = seeded(lambda: timm.create_model("test_resnet", num_classes=10))
    conversion = convert(model, 2, basis=name)
    assert hc.verify(model, conversion).as_planned
    path = tmp_path / "cut.safetensors"
    hc.save(conversion, path)
    assert read_header(path).plan == conversion.plan
    assert {basis.name for basis in bases_of(read_header(path).plan)} == {name}
    loaded = hc.load(path, model=model)
    assert hc.verify(model, loaded).as_planned
    x = torch.randn(2, 3, 64, 64)
    loaded.eval(), conversion.model.eval()
    assert torch.equal(loaded(x), conversion.model(x))
    torch.testing.assert_close(hc.load(path, model=model, form="dense").eval()(x), loaded(x), rtol=1e-4, atol=1e-5)
    stored = sum(p.numel() for p in loaded.parameters())
    stored += sum(b.numel() for key, b in loaded.state_dict().items() if key.endswith("fitted_basis"))
    assert conversion.cost.harmonic_parameters == stored
    assert bases_of(Plan.from_json(conversion.plan.to_json())) == (Basis(name),)


def test_verify_detects_the_klt_of_another_layer() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten()))
    other = convert(model, {"1": 2}, basis="klt").model
    wrong = to_harmonic(nn.Conv2d(8, 8, 3), other[1].frequencies, Basis("klt"))
    with torch.no_grad():
        other[1].fitted_basis.copy_(wrong.fitted_basis)
        other[1].coefficients.copy_(torch.einsum("oik,fk->oif", model[1].weight.flatten(2).double(), wrong.kernels))
    other[1]._set_basis()
    check = hc.verify(model, other, torch.randn(1, 3, 9, 9))
    assert not check.as_planned
    assert "its klt basis is not fitted to the original's kernel" in check.verdict
    with torch.no_grad():
        other[1].fitted_basis[0] *= 1.1
        other[1].fitted_basis[1] += 0.1
    assert "not orthogonal" in hc.verify(model, other, torch.randn(1, 3, 9, 9)).verdict


def test_tied_convolutions_share_a_fitted_basis(tmp_path: Path) -> None:
    model = seeded(Branches)
    conversion = convert(model, basis="klt")
    path = tmp_path / "tied.safetensors"
    hc.save(conversion, path)
    assert hc.verify(model, hc.load(path, model=model), X.float()).ok


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "dct")) for n in BASES])
def test_calibration_improves_a_truncated_network_in_any_basis(name: str) -> None:
    network = hc.open_source("sample:resnet_mnist5k").model
    images = random_digits(96)
    plain = convert(network, 2, basis=name)
    calibrated = convert(network, 2, basis=name, calibration=[images[:64]])
    with torch.no_grad():
        network.eval(), plain.model.eval(), calibrated.model.eval()
        truth, before, after = (m(images[64:]) for m in (network, plain.model, calibrated.model))
    assert (after - truth).norm() < 0.5 * (before - truth).norm()
    assert hc.verify(network, calibrated).as_planned


def random_digits(count: int) -> torch.Tensor:
    from harmconvert.samples import mnist5k_held_back

    return mnist5k_held_back()[0][:count]


def test_weight_standardised_layers_are_calibrated_where_the_basis_can_follow() -> None:
    """A standardised kernel has mean zero. In the Gaussian basis its cut is not refitted, and the record says why."""
    images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = seeded(
        lambda: nn.Sequential(
            timm.layers.StdConv2d(3, 8, 3), nn.ReLU(), timm.layers.StdConv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
        )
    )
    for name, decisions in {"haar": {"refit"}, "gaussian": {"projection"}}.items():
        found = convert(network, {"2": 2}, basis=name, calibration=[images]).calibration
        assert found is not None
        layer = next(layer for layer in found.layers if layer.name == "2")
        assert layer.decision in decisions, (name, layer)
        if name == "gaussian":
            assert "it centres its kernels" in (layer.why or "")


@pytest.mark.parametrize("basis", ["dct", "haar", "gaussian"])
def test_harmonize_accepts_a_basis_by_name(basis: str) -> None:
    network = harmonize(seeded(Branches), "all", 2, basis=basis, example_input=X.float())
    families = {conv.basis_spec for conv in convolutions(network).values() if isinstance(conv, HarmonicMixin)}
    assert families == {Basis(basis)}


def test_a_fitted_basis_counts_as_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False))
    dct, klt = (network_cost(model, convert(model, 2, basis=name).plan) for name in ("dct", "klt"))
    assert klt.harmonic_parameters == dct.harmonic_parameters + 9 * 9 + 3 * 9
    assert klt.harmonic_bytes == dct.harmonic_bytes + 8 * (9 * 9 + 3 * 9)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_the_fitted_basis_does_not_depend_on_the_scale_of_the_kernels(scale: float) -> None:
    kernel = random_input((8, 4, 3, 3), torch.float64)
    torch.testing.assert_close(klt_vectors(kernel * scale), klt_vectors(kernel), rtol=0, atol=1e-9)
    assert torch.equal(klt_vectors(kernel * 0) @ klt_vectors(kernel * 0).T, torch.eye(9, dtype=torch.float64))
