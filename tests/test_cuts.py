"""The equations of every cut of a layer from one run of the whole network equal those of a separate run for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import (
    CalibrationContext,
    CalibrationSettings,
    Kernel,
    NormalEquations,
    Samples,
    WholeLayer,
    calibrate,
    calibration_set,
    outputs,
    whole_layers,
)
from harmconvert.kernels import Basis, frequencies_below, to_groups
from harmconvert.layers import to_harmonic
from harmconvert.network import find_layers
from harmconvert.plan import Plan, cut_layer, plannable
from harmconvert.search import SearchSettings, whole_plan

from . import oracle
from .networks import CONVOLUTIONS, Branches, seeded
from .seams import replace_everywhere
from .test_calibration import Backwards, captured, fitted_rows, half, smooth, stack

LAYERS = [(name, Basis()) for name in CONVOLUTIONS if name not in ("16x16 patches", "Conv1d")]  # with few unknowns
LAYERS += [(name, basis) for name in ("plain", "ConvTranspose2d") for basis in (Basis("haar", "l1"), Basis("klt"))]


def whole_layer(model: nn.Module, name: str, batches: Sequence[Tensor], family: Basis) -> WholeLayer:
    """Return the moments of one layer's inputs in the uncut network."""
    uncut = hc.convert(model, whole_plan(plannable(find_layers(model)), ["*"], (), family)).model
    layers = {name: uncut.get_submodule(name)}
    ((found, layer),) = whole_layers(uncut, layers, calibration_set(batches), 0, 1 << 30)
    assert found == name
    return layer


@pytest.mark.parametrize(("name", "family"), LAYERS, ids=str)
def test_equations_from_shared_moments_equal_those_of_a_separate_run(name: str, family: Basis) -> None:
    make, shape = CONVOLUTIONS[name]
    conv, x = seeded(make, torch.float64), smooth((24, *shape[1:]))
    kept = half(tuple(conv.kernel_size))
    harmonic = to_harmonic(conv, kept, family)
    call = captured(harmonic, fitted_rows(x))
    layer = Kernel.of(harmonic, call).layer(call, conv.bias is not None, 1 << 30, 0)
    expected = NormalEquations(layer)
    with torch.no_grad():
        expected.add(call, outputs(conv(fitted_rows(x))), range(18))
    expected.reduce()
    found, held = whole_layer(nn.Sequential(conv), "0", x.split(7), family).cut(layer, harmonic)
    assert (found.count, held.count) == (expected.count, expected.count // 3)
    scale = expected.channels[5].sum()  # rounding errors scale with this also if a cut loses nothing
    assert isinstance(found, NormalEquations)
    for ours, theirs in zip((*found._sums(), *found.channels), (*expected._sums(), *expected.channels), strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-12 * scale


@pytest.mark.parametrize("name", ["plain", "strided, padded, no bias", "grouped", "3x5", "ConvTranspose2d"])
def test_the_refit_from_shared_moments_is_the_least_squares_solution(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    model, x = seeded(lambda: nn.Sequential(make()), torch.float64), smooth((80, *shape[1:]))
    conv, settings = model[0], CalibrationSettings(damping=0.0)
    kept = half(tuple(conv.kernel_size))
    known = CalibrationContext.of(model, x.split(7), settings)
    known = replace(known, whole={"0": whole_layer(model, "0", x.split(7), Basis())})
    plan = Plan((cut_layer("0", tuple(conv.kernel_size), tuple(kept)),))
    converted = hc.convert(model, plan).model
    start = to_groups(converted[0].coefficients.detach(), conv.groups, conv.transposed).numpy()
    (record,) = calibrate(model, converted, plan, known, settings).layers
    assert record.decision == "refit"
    expected, bias = oracle.refit(conv, kept, fitted_rows(x), start)
    found = to_groups(converted[0].coefficients.detach(), conv.groups, conv.transposed).numpy()
    assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()
    if bias is not None:
        assert np.abs(converted[0].bias.detach().numpy() - bias).max() <= 1e-8 * np.abs(bias).max()


class Silent(Branches):
    """Two layers share one weight, and the first of them never runs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied_b(self.shared(self.stem(x).relu()).relu())
        return self.point(self.norm(self.deep["odd name [x]"](x))).mean((2, 3))


def probed(
    model: nn.Module, images: Sequence[Tensor], file: Path, shared: bool, axes: tuple[str, ...] = ("space", "channels")
) -> dict[str, float]:
    """Return the scores of all single cuts, from moments that the cuts of a layer share, or with a refit for each."""
    with pytest.MonkeyPatch.context() as patch:
        if not shared:
            replace_everywhere(patch, whole_layers, lambda *arguments: iter(()))
        search = SearchSettings(trials=0, probes=str(file), axes=axes)
        hc.convert(model, budget="params=90%", calibration=images, search=search, include=["*"])
    scores: dict[str, float] = json.loads(file.read_text())["single"]
    return scores


@pytest.mark.parametrize(
    "network",
    [pytest.param(None, marks=pytest.mark.slow), pytest.param(Branches, marks=pytest.mark.slow), Backwards, Silent],
)
def test_probes_from_shared_moments_equal_those_of_separate_refits(
    network: type[nn.Module] | None, tmp_path: Path
) -> None:
    """Layers that run twice, share their coefficients or never run have a refit of their own in both cases."""
    model, images = seeded(network, torch.float64) if network else stack(), smooth((16, 3, 20, 20)).split(8)
    axes = ("space",) if network else ("space", "channels")
    shared, separate = (probed(model, images, tmp_path / f"{way}.json", way, axes) for way in (True, False))
    assert shared.keys() == separate.keys()
    for name, score in separate.items():
        assert shared[name] == pytest.approx(score, rel=1e-6, abs=1e-15), name


def test_in_float32_the_probes_agree_within_rounding(tmp_path: Path) -> None:
    model, images = stack(torch.float32), smooth((16, 3, 12, 12), dtype=torch.float32).split(8)
    shared, separate = (probed(model, images, tmp_path / f"{way}.json", way, ("space",)) for way in (True, False))
    for name, score in separate.items():
        assert shared[name] == pytest.approx(score, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize(("name", "few"), [("16x16 patches", 12), ("Conv1d", 2)])
def test_with_fewer_positions_than_unknowns_the_responses_are_shared_instead_of_moments(name: str, few: int) -> None:
    """A small cut may still have fewer unknowns than positions."""
    make, shape = CONVOLUTIONS[name]
    model, x = seeded(lambda: nn.Sequential(make()), torch.float64), smooth((few, *shape[1:]))
    size = tuple(model[0].kernel_size)
    settings = CalibrationSettings(damping=1e-2)
    known = CalibrationContext.of(model, [x], settings)
    believing = replace(known, whole={"0": whole_layer(model, "0", [x], Basis())})
    assert isinstance(believing.whole["0"].fit, Samples)
    for kept in (frequencies_below(size, 1), frequencies_below(size, 12)):
        plan = Plan((cut_layer("0", size, kept),))
        found = []
        for knowing in (known, believing):
            converted = hc.convert(model, plan).model
            (record,) = calibrate(model, converted, plan, knowing, settings).layers
            found.append((record, converted[0].coefficients.detach()))
        (separate, expected), (shared, coefficients) = found
        assert (shared.decision, shared.solver, shared.positions) == (
            separate.decision, separate.solver, separate.positions,
        )  # fmt: skip
        assert (coefficients - expected).norm() <= 1e-8 * expected.norm()
        assert shared.error_after == pytest.approx(separate.error_after, rel=1e-8)


def test_layers_whose_inputs_a_cut_changes_are_left_out() -> None:
    model, x = seeded(Branches, torch.float64), smooth((16, 3, 20, 20))
    uncut = hc.convert(model).model
    layers = {name: uncut.get_submodule(name) for name in ("stem", "shared", "tied_a", "tied_b", "unused")}
    data = calibration_set(x.split(8))
    assert [name for name, _ in whole_layers(uncut, layers, data, 0, 1 << 30)] == ["stem"]
    assert not list(whole_layers(uncut, layers, data, 0, 1 << 10)), "nor those that there is no memory for"
    assert not list(whole_layers(uncut, layers, calibration_set([x[:1]]), 0, 1 << 30)), "nor where none is held back"


def test_moments_of_one_layer_are_not_used_for_two() -> None:
    model, x = stack(), smooth((32, 3, 12, 12))
    settings = CalibrationSettings(batch_norm=False)
    known = CalibrationContext.of(model, x.split(8), settings)
    believing = replace(known, whole={name: whole_layer(model, name, x.split(8), Basis()) for name in ("3", "6")})
    states = []
    for knowing in (known, believing):
        conversion = hc.convert(model, 2)
        calibrate(model, conversion.model, conversion.plan, knowing, settings)
        states.append(conversion.model.state_dict())
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())


@pytest.mark.slow
def test_the_network_runs_only_once_for_all_cuts_of_its_layers(tmp_path: Path) -> None:
    model, runs = stack(), []
    model[3].register_forward_hook(lambda *_: runs.append(1))
    images = smooth((16, 3, 12, 12)).split(4)
    probed(model, images, tmp_path / "probes.json", True)
    probes = len(json.loads((tmp_path / "probes.json").read_text())["single"])
    once = 4 + 4  # batches for the fit and held-back batches
    # Each probe runs one example, and the held-back batches before and after its refit; the original runs once.
    assert len(runs) <= once + 4 + probes * (2 + 2 * 4 + 2 * 4)
