"""The channel axis: weights of low rank, their layers and forms, their fit to data, files and searches."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harmconvert as hc
from harmconvert.errors import InputError, UsageError
from harmconvert.kernels import full_rank, low_rank, low_rank_of_channels, product
from harmconvert.layers import (
    LowRank,
    RankedMixin,
    from_low_rank,
    reason_not_splittable,
    to_full_rank,
    to_harmonic,
    to_low_rank,
    to_ranked,
)
from harmconvert.network import tensors_of, trace
from harmconvert.plan import AXES, Plan, Rank, RankSetting, projections
from harmconvert.search import SearchSettings

from . import oracle
from .commands import SAMPLE, fails, ok
from .networks import CONVOLUTIONS, Branches, random_input, seeded
from .pictures import digit_folders

POINTWISE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
    "1x1, strided, grouped": (lambda: nn.Conv2d(8, 12, 1, stride=2, groups=2), (2, 8, 5, 5)),
    "1x1, transposed": (lambda: nn.ConvTranspose2d(8, 6, 1, stride=2, groups=2), (2, 8, 5, 5)),
    "linear": (lambda: nn.Linear(7, 9), (4, 7)),
}
LAYERS = {name: case for name, case in CONVOLUTIONS.items() if name != "depthwise"} | POINTWISE


class Mixed(nn.Module):
    """A classifier with convolutions over 1x1, of 1x1, depthwise, transposed, and linear layers."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.up = nn.ConvTranspose2d(24, 16, 3, stride=2)
        self.wide = nn.Conv2d(16, 24, 3, groups=2)
        self.hidden = nn.Linear(24, 20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.point(self.depthwise(x).relu()).relu()
        x = self.wide(self.up(x).relu()).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


IMAGES = random_input((96, 3, 8, 8), seed=5).split(32)
RANKED = {"point", "up", "wide", "hidden"}


def error_in(metric: Tensor, difference: Tensor) -> float:
    return float((difference @ metric * difference).sum())


def moments(seed: int, groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(groups, 3 * columns, columns, generator=generator, dtype=torch.float64)
    z = z * torch.logspace(0, -1.5, columns, dtype=torch.float64)
    return torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64), z.mT @ z


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_map_of_a_rank_is_the_best_one_in_the_metric(
    seed: int, groups: int, rows: int, channels: int, frequencies: int, data: st.DataObject
) -> None:
    C, G = moments(seed, groups, rows, channels * frequencies)
    rank = data.draw(st.integers(1, full_rank(rows, channels, frequencies, False)))
    pair = low_rank(C, frequencies, rank, C @ G @ C.mT)
    assert pair.first_GRIF.shape == (groups, rank, channels, frequencies)
    assert pair.second_GORF.shape == (groups, rows, rank, 1)
    found = error_in(G, C - pair.product_GON)
    expected = torch.stack(
        [torch.from_numpy(oracle.best_low_rank(c.numpy(), g.numpy(), rank)) for c, g in zip(C, G, strict=True)]
    )
    scale = error_in(G, C)
    assert found == pytest.approx(error_in(G, C - expected), abs=1e-9 * scale)
    generator = torch.Generator().manual_seed(seed + 1)
    other = torch.randn(groups, rows, rank, generator=generator, dtype=torch.float64)
    rest = torch.linalg.lstsq(other, C).solution
    assert found <= error_in(G, C - other @ rest) + 1e-9 * scale


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_map_of_a_rank_is_the_best_one_for_what_follows(
    seed: int, rows: int, channels: int, frequencies: int, data: st.DataObject
) -> None:
    """Errors of the outputs count as what a following matrix makes of them."""
    C, G = moments(seed, 2, rows, channels * frequencies)
    follows = torch.randn(2, rows + 1, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root = torch.linalg.cholesky(follows.mT @ follows)
    rank = data.draw(st.integers(1, full_rank(rows, channels, frequencies, False)))
    pair = low_rank(C, frequencies, rank, C @ G @ C.mT, root)
    seen = follows @ C
    expected = [
        torch.from_numpy(oracle.best_low_rank(c.numpy(), g.numpy(), rank)) for c, g in zip(seen, G, strict=True)
    ]
    found = error_in(G, seen - follows @ pair.product_GON)
    assert found == pytest.approx(error_in(G, seen - torch.stack(expected)), rel=1e-6, abs=1e-9 * error_in(G, seen))
    second = low_rank_of_channels(C, frequencies, full_rank(rows, channels, frequencies, True), G, root)
    torch.testing.assert_close(second.product_GON, C, rtol=1e-4, atol=1e-4)


def test_a_rank_keeps_the_outputs_that_the_network_uses() -> None:
    """The first layer has its largest outputs where the second one hardly uses them."""
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    used = torch.cat([torch.ones(3), torch.full((5,), 1e-3)])
    with torch.no_grad():
        first.weight.copy_(torch.linalg.qr(torch.randn(8, 8))[0] / used.sqrt()[:, None])
        second.weight.copy_(torch.diag(used))
    model, x = nn.Sequential(first, second), torch.randn(256, 8)
    ranked = hc.convert(model, rank={"0": 3}, calibration=x.split(64)).model
    with torch.no_grad():
        error = float((ranked(x) - model(x)).square().mean() / model(x).square().mean())
        plain = hc.convert(model, rank={"0": 3}).model
        assert float((plain(x) - model(x)).square().mean() / model(x).square().mean()) > 0.9
    assert error < 0.05


class Recomputed(nn.Module):
    """A part of the forward runs again for the gradients; or nothing has gradients."""

    def __init__(self, gradients: bool = True) -> None:
        super().__init__()
        self.gradients = gradients
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return checkpoint(lambda y: self.second(self.first(y).relu()), x, use_reentrant=False).flatten(2)


def test_effects_are_measured_on_networks_that_recompute() -> None:
    known = hc.convert(seeded(Recomputed), rank={"second": 4}, calibration=IMAGES).calibration
    assert known.notes == ()
    without = hc.convert(seeded(lambda: Recomputed(False)), rank={"second": 4}, calibration=IMAGES).calibration
    assert any(
        "effect of errors on the outputs is not known for second: the outputs have no gr" in n for n in without.notes
    )
    assert [layer.decision for layer in without.layers] == ["rank"]


def test_measuring_effects_does_not_change_the_network() -> None:
    normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), normed, nn.Conv2d(8, 12, 1), nn.Flatten(2)).train()
    before = copy.deepcopy(model.state_dict())
    hc.convert(model, rank={"2": 3}, calibration=IMAGES)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_projections_equal_those_of_each_axis_in_turn() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(8, 12, 3)), torch.float64)
    weight = model[0].weight.detach()
    choices = [
        layer.keeps
        for lam in (1, 2)
        for rank in (2, 5)
        for layer in hc.convert(model, {"0": lam}, rank={"0": rank}).plan.layers
    ]
    found = list(projections(weight, [*choices, choices[0]]))
    for keeps, one in zip([*choices, choices[0]], found, strict=True):
        expected = weight
        for kept in keeps:
            expected = AXES[kept.axis].project(expected, kept)
        torch.testing.assert_close(one, expected)
    assert len({float(one.norm()) for one in found}) == 4


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.integers(2, 4), st.booleans(), st.data())
def test_the_product_equals_loops_and_a_full_rank_is_exact(
    seed: int, rows: int, channels: int, frequencies: int, second: bool, data: st.DataObject
) -> None:
    C, G = moments(seed, 2, rows, channels * frequencies)
    most = full_rank(rows, channels, frequencies, second)
    rank = data.draw(st.integers(1, most))
    nearest: Any = low_rank_of_channels if second else low_rank
    pair = nearest(C, frequencies, rank)
    loops = [
        oracle.product_of_pair(a.numpy(), b.numpy()) for a, b in zip(pair.first_GRIF, pair.second_GORF, strict=True)
    ]
    torch.testing.assert_close(pair.product_GON, torch.from_numpy(np.stack(loops)).flatten(2))
    torch.testing.assert_close(nearest(C, frequencies, most).product_GON, C)
    torch.testing.assert_close(product(pair.first_GRIF, pair.second_GORF), pair.product_GON)
    in_metric = nearest(C, frequencies, rank, G if second else C @ G @ C.mT)
    assert error_in(G, C - in_metric.product_GON) <= error_in(G, C - pair.product_GON) * (1 + 1e-6) + 1e-9
    if rank == most:
        torch.testing.assert_close(in_metric.product_GON, C, rtol=1e-4, atol=1e-4)


def ranked_case(name: str, rank: int = 1, second: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = LAYERS[name]
    layer = seeded(make, torch.float64)
    base = layer if name in POINTWISE else to_harmonic(layer)
    return base, to_ranked(base, rank, second), random_input(shape, torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_low_rank_computes_the_same_in_every_form(name: str) -> None:
    for second in (False, True) if name not in POINTWISE else (False,):
        base, ranked, x = ranked_case(name, 2 if "linear" in name else 1, second)
        assert isinstance(ranked, RankedMixin)
        assert isinstance(ranked, type(base).__mro__[1 if name in POINTWISE else 2]), "the class keeps its forward"
        expected = ranked(x)
        full = to_full_rank(ranked)
        torch.testing.assert_close(full(x), expected, rtol=1e-9, atol=1e-11)
        assert type(full) is type(base)
        assert {key: value.shape for key, value in full.state_dict().items()} == {
            key: value.shape for key, value in base.state_dict().items()
        }
        torch.testing.assert_close(pickle.loads(pickle.dumps(ranked))(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(ranked)(x), expected, rtol=0, atol=0)
        if reason_not_splittable(ranked):
            assert "Std" in name
            continue
        for harmonic in (False, True):
            low = to_low_rank(ranked, harmonic=harmonic)
            torch.testing.assert_close(low(x), expected, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(low.weight, ranked.weight, rtol=1e-9, atol=1e-11)
            again = from_low_rank(low)
            torch.testing.assert_close(again(x), expected, rtol=1e-9, atol=1e-11)
            assert type(again) is type(ranked)


def test_the_full_rank_changes_nothing() -> None:
    for name in ("grouped", "ConvTranspose2d", "StdConv2d", "linear"):
        make, shape = LAYERS[name]
        layer = seeded(make, torch.float64)
        base = layer if name in POINTWISE else to_harmonic(layer)
        groups = getattr(layer, "groups", 1)
        if isinstance(layer, nn.Linear):
            rank = full_rank(layer.out_features, layer.in_features, 1, False)
        else:
            rank = full_rank(layer.out_channels // groups, layer.in_channels // groups, 9, False)  # type: ignore[arg-type,operator]
        x = random_input(shape, torch.float64)
        torch.testing.assert_close(to_ranked(base, rank)(x), base(x), rtol=1e-7, atol=1e-9)


def test_gradients_of_the_pair_are_those_of_the_merged_layer() -> None:
    _, ranked, x = ranked_case("grouped", 2)
    full = to_full_rank(ranked)
    for layer in (ranked, full):
        layer(x).square().sum().backward()
    pair = ranked.pair
    gradient = full.coefficients.grad.unflatten(0, (3, -1)).flatten(2)
    first, second = pair.first_GRIF.detach().flatten(2), pair.second_GORF.detach()[..., 0]
    torch.testing.assert_close(ranked.coefficients_out.grad, (gradient @ first.mT).flatten(0, 1))
    torch.testing.assert_close(ranked.coefficients_in.grad.flatten(1), (second.mT @ gradient).flatten(0, 1))
    torch.testing.assert_close(ranked.bias.grad, full.bias.grad)


def test_half_precision_and_autocast_compute_the_product_in_float32() -> None:
    ranked = to_ranked(seeded(lambda: nn.Linear(64, 64)), 48)
    exact = ranked.coefficients_out @ ranked.coefficients_in[..., 0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ranked.weight, exact)
    half = copy.deepcopy(ranked).bfloat16()
    both = half.coefficients_out.float() @ half.coefficients_in[..., 0].float()
    torch.testing.assert_close(half.weight, both.bfloat16())


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank=0 must be a share of the full rank above 0 and at most 1.0, or a whole number from 1"),
        (-2, "must be a share"),
        (1.5, "must be a share"),
        (0.0, "must be a share"),
        (float("nan"), "must be a share"),
        (True, "must be a share"),
        ("half", "must be a share"),
        ({}, "rank names no pattern"),
        ({"point": 0}, "of 'point' must be a share"),
        ({"nothing": 0.5}, "'nothing' matches no convolution or linear layer"),
        ({"point": 17}, "rank=17 of layer point is out of range: its full rank is 16"),
    ],
)
def test_invalid_ranks_are_refused(rank: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        hc.convert(seeded(Mixed), rank=rank)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def ranks_of(plan: Plan) -> dict[str, int]:
    return {name: kept.rank for name, kept in plan.on("channels").items()}


def test_a_share_leaves_the_input_layer_depthwise_layers_and_the_classifier_whole() -> None:
    plan = hc.convert(seeded(Mixed), rank=0.5, example_input=IMAGES[0]).plan
    # `hidden` has a full rank of 20, and 10 x (24 + 20) is not below 20 x 24 by much: 440 of 480 values.
    assert ranks_of(plan) == {"point": 8, "up": 12, "wide": 6, "hidden": 10}
    assert plan.notes["stem"] == "full rank: it reads the network's input"
    assert plan.notes["depthwise"] == "full rank: depthwise, unless a pattern names it"
    assert plan.notes["fc"] == "full rank: the classifier, unless a pattern names it"
    named = hc.convert(seeded(Mixed), rank={"stem": 4, "fc": 2, "p*": 0.25}).plan
    assert ranks_of(named) == {"stem": 4, "point": 4, "fc": 2}


def test_a_rank_that_saves_nothing_is_not_kept() -> None:
    conversion = hc.convert(seeded(Mixed), rank={"point": 15, "hidden": 10})
    assert ranks_of(conversion.plan) == {"hidden": 10}
    assert "rank 15 would not be smaller" in conversion.plan.notes["point"]
    assert ranks_of(hc.convert(seeded(Mixed), rank=1.0).plan) == {}


def test_a_transposed_convolution_with_fewer_outputs_has_its_kernel_second() -> None:
    conversion = hc.convert(seeded(Mixed), rank={"up": 6})
    assert conversion.plan.on("channels")["up"] == Rank(6, kernel_second=True, transposed=True)
    layer = conversion.model.up
    assert layer.coefficients_in.shape == (6, 24, 1)
    assert layer.coefficients_out.shape == (16, 6, 9)


def test_plans_with_ranks_survive_json_and_bad_ones_are_refused() -> None:
    plan = hc.convert(seeded(Mixed), lam={"wide": 2}, rank=0.5).plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for bad in (0, -1, 1.5, True, "x", 2**40):
        data = plan.to_json()
        next(layer for layer in data["layers"] if layer["name"] == "wide")["channels"]["rank"] = bad
        with pytest.raises(InputError, match="is out of range"):
            Plan.from_json(data)


@pytest.mark.parametrize("name", ["Mixed", "Branches"])
def test_conversion_verification_files_and_forms(name: str, tmp_path: Path) -> None:
    model = seeded(Mixed if name == "Mixed" else Branches)
    x = random_input((8, 3, 8, 8) if name == "Mixed" else (8, 3, 24, 24))
    conversion = hc.convert(model, lam=2, rank=0.4, example_input=x)
    verification = hc.verify(model, conversion, inputs=x)
    assert verification.as_planned, verification.problems
    bare = hc.verify(model, conversion.model, inputs=x)
    assert bare.as_planned, bare.problems
    expected = conversion.model(x)
    path = tmp_path / "ranked.safetensors"
    hc.save(conversion, path)
    with safetensors.safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    if name == "Mixed":
        assert shapes["wide.coefficients_in"] == (2 * 5, 8, 3)
        assert shapes["wide.coefficients_out"] == (24, 5)
        assert shapes["hidden.coefficients_in"] == (8, 24, 1)
        assert "wide.coefficients" not in shapes
        assert "hidden.weight" not in shapes
    for form in ("harmonic", "dense"):
        loaded = hc.load(path, form=form, model=model)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    dense = hc.load(path, form="dense", model=model)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    fast = hc.factor(conversion.model, x, layers="factored")
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, LowRank) for module in fast.modules())
    again = tmp_path / "again.safetensors"
    hc.save(fast, again)
    torch.testing.assert_close(hc.load(again, model=model)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hc.fuse(fast)(x), expected, rtol=1e-4, atol=1e-5)


def test_the_cost_counts_the_two_matrices() -> None:
    model = seeded(Mixed)
    conversion = hc.convert(model, rank=0.5, example_input=IMAGES[0])
    stored = sum(parameter.numel() for parameter in conversion.model.parameters())
    assert conversion.cost.harmonic_parameters == stored
    fast = hc.factor(conversion.model, IMAGES[0], layers="factored")
    run = trace(fast, IMAGES[0])
    assert conversion.cost.factored_macs == run.macs // run.batch


def test_verify_names_a_matrix_that_was_changed() -> None:
    model = seeded(Mixed)
    conversion = hc.convert(model, rank=0.5)
    with torch.no_grad():
        conversion.model.point.coefficients_out[0, 0] += 0.1
    verification = hc.verify(model, conversion, inputs=IMAGES[0])
    assert not verification.as_planned
    assert any("not the nearest one of rank 8" in problem for problem in verification.problems), verification.problems


def divergence(original: nn.Module, converted: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        a, b = original(inputs).log_softmax(1), converted(inputs).log_softmax(1)
    return float((a.exp() * (a - b)).sum(1).mean())


def correlated(count: int, seed: int) -> Tensor:
    """Return images whose neighbouring pixels and channels are correlated, as those of photographs are."""
    images = random_input((count, 3, 8, 8), seed=seed)
    images = nn.functional.avg_pool2d(images, 3, 1, 1) * 3
    return images + images.mean(1, keepdim=True)


def test_calibration_brings_ranks_nearer_to_the_original() -> None:
    model, images = seeded(Mixed), correlated(128, 1)
    plain = hc.convert(model, rank=0.25)
    fitted = hc.convert(model, rank=0.25, calibration=images.split(32))
    assert fitted.plan == plain.plan
    record = {layer.name: layer for layer in fitted.calibration.layers}
    assert set(record) == RANKED
    assert all(layer.error_after <= layer.error_before for layer in record.values())
    test = correlated(64, 2)
    assert divergence(model, fitted.model, test) < 0.7 * divergence(model, plain.model, test)
    verification = hc.verify(model, fitted, inputs=test)
    assert verification.as_planned, verification.problems
    for name in RANKED:
        layer = fitted.model.get_submodule(name)
        assert isinstance(layer, RankedMixin)
        assert layer.rank == fitted.plan.on("channels")[name].rank


def test_calibrated_ranks_are_the_best_in_the_metric_of_the_inputs() -> None:
    """One linear layer whose inputs and outputs are the network's: it is as good as the slow reference's.

    The effects of its outputs are all the same, but they are estimated from random directions.
    """
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 10, bias=False), nn.Unflatten(1, (2, 5))), torch.float64)
    x = random_input((256, 12), torch.float64) * torch.logspace(0, -1, 12, dtype=torch.float64)
    conversion = hc.convert(model, rank={"0": 3}, calibration=[x])
    # Inputs 3, 7, 11 and so on are held back.
    fit = torch.stack([row for number, row in enumerate(x) if number % 4 != 3])
    expected = oracle.best_low_rank(model[0].weight.detach().numpy(), (fit.T @ fit).numpy() / len(fit), 3)
    weight = conversion.model[0].weight.detach()
    found, best = ((fit @ (one - model[0].weight).T).norm() for one in (weight, torch.from_numpy(expected)))
    assert best * (1 - 1e-9) <= found < 1.05 * best


@pytest.mark.parametrize("case", ["many unknowns", "little memory", "grouped", "transposed", "standardised"])
def test_every_way_to_solve_fits_ranks(case: str) -> None:
    make: Any = {
        "many unknowns": lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 24)),
        "little memory": lambda: nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 24, 3)),
        "grouped": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2)),
        "transposed": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 12, 3, stride=2)),
        "standardised": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), StdConv2d(16, 24, 3)),
    }[case]
    model = seeded(make)
    last = list(dict(model.named_children()))[-1]
    images = correlated(64, 3)
    settings = hc.CalibrationSettings(memory=1 << 20 if case == "little memory" else None)
    plain = hc.convert(model, rank={last: 0.3})
    fitted = hc.convert(model, rank={last: 0.3}, calibration=images.split(16), settings=settings)
    (record,) = fitted.calibration.layers
    assert record.why is None, record
    if case == "little memory":
        assert record.solver == "conjugate gradients"
    test = correlated(32, 4)
    with torch.no_grad():
        errors = [float((one.model(test) - model(test)).norm() / model(test).norm()) for one in (plain, fitted)]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_ranks_and_coding_together(tmp_path: Path) -> None:
    model, images = seeded(Mixed), correlated(96, 1)
    for calibration in (None, images.split(32)):
        conversion = hc.convert(model, rank=0.4, bits=4, calibration=calibration)
        coded = set(conversion.coded)
        assert {"point.coefficients_in", "point.coefficients_out", "fc.weight"} <= coded
        path = tmp_path / f"{calibration is None}.safetensors"
        hc.save(conversion, path)
        loaded = hc.load(path, model=model)
        for key, tensor in tensors_of(conversion.model).items():
            assert torch.equal(tensor, tensors_of(loaded)[key]), key
        verification = hc.verify(model, conversion, inputs=images[:8])
        assert verification.as_planned, verification.problems
        bits = 8 * sum(int(entry.parameters["bytes"]) for entry in conversion.coded.values())
        assert bits / sum(np.prod(entry.shape) for entry in conversion.coded.values()) == pytest.approx(4, rel=0.15)


def test_a_budget_chooses_ranks_where_there_are_no_frequencies() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.ReLU(),
                                         nn.Conv2d(32, 24, 1), nn.Flatten(), nn.Linear(24 * 36, 8)))  # fmt: skip
    images = correlated(64, 3)
    for calibration in (None, images.split(32)):
        conversion = hc.convert(
            model,
            budget="params=60%",
            calibration=calibration,
            example_input=images[:1],
            search=SearchSettings(trials=3),
        )
        stored = sum(parameter.numel() for parameter in conversion.model.parameters())
        assert stored == conversion.cost.harmonic_parameters <= 0.6 * conversion.cost.parameters
        assert conversion.plan.on("channels")
        assert all(kept.rank is not None for kept in conversion.plan.on("channels").values())
        assert hc.verify(model, conversion, inputs=images[:4]).as_planned
    with pytest.raises(UsageError, match="cannot be met"):
        hc.convert(model, budget="params=60%", search=SearchSettings(axes=("space",)), include=["0"])


@pytest.mark.slow
def test_a_search_over_both_axes_is_never_worse_than_over_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                                         nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)))  # fmt: skip
    images = correlated(64, 3)
    reached = {}
    for axes in (("space",), ("channels",), None):
        search = SearchSettings(trials=12, axes=axes)
        conversion = hc.convert(
            model, budget="macs=60%", calibration=images.split(32), example_input=images[:1], search=search
        )
        assert conversion.cost.factored_macs <= 0.6 * conversion.cost.dense_macs
        reached[axes] = conversion.calibration.divergence
        axes_used = {kept.axis for layer in conversion.plan.layers for kept in layer.keeps if not kept.whole}
        assert axes is None or axes_used <= set(axes)
    assert reached[None] <= 1.05 * min(reached[("space",)], reached[("channels",)])


def test_rank_and_a_budget_exclude_each_other() -> None:
    for options in ({"budget": "params=60%"}, {"max_drop": 1.0, "metric": lambda model: 1.0}):
        with pytest.raises(UsageError, match="both say what to keep"):
            hc.convert(seeded(Mixed), rank=0.5, **options)


def test_the_command_converts_verifies_exports_and_finetunes_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ok("convert", SAMPLE, "--lambda", "2", "--rank", "0.5", "--json")
    data = json.loads(result.stdout)
    path = "resnet_mnist5k-harmonic-2-rank0.5.safetensors"
    assert data["output"] == path
    assert Path(path).exists()
    ok("verify", SAMPLE, path, "--as-planned")
    ok("export", path, "-o", "dense.safetensors")
    ok("verify", path, "dense.safetensors")  # its layers hold the product of the two matrices
    kept = ok("convert", path, "--bits", "4", "-o", "coded.safetensors", "--json")
    layers = {layer["name"]: layer for layer in json.loads(kept.stdout)["plan"]["layers"]}
    assert layers["stage3.0.conv2"]["channels"] == {"rank": 32}
    fails(2, "--rank 0 must be a share", "convert", SAMPLE, "--rank", "0")
    fails(2, "unknown rank 'x'", "convert", SAMPLE, "--rank", "x")
    fails(2, "--rank 9999 of layer stem is out of range: its full rank is 9", "convert", SAMPLE, "--rank", "stem=9999")
    ok("convert", SAMPLE, "--rank", "stage3.*=0.25")
    assert Path("resnet_mnist5k-harmonic-full-rankcustom.safetensors").exists()


def test_finetuning_of_ranks_learns_from_the_uncut_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digit_folders(tmp_path / "digits" / "train", 4)
    digit_folders(tmp_path / "digits" / "val", 2, first=4)
    ok("convert", SAMPLE, "--rank", "0.3", "-o", "cut.safetensors")
    quick = ["--data-dir", "digits", "--epochs", "1", "--calibration-images", "0", "--hflip", "0", "--crop", "padded",
             "-b", "10", "--workers", "0"]  # fmt: skip
    result = ok("finetune", "cut.safetensors", *quick, "-o", "tuned.safetensors", "--json")
    assert "for weights of low rank, the uncut network teaches (--distill 0 trains on the labels)" in result.stderr
    recipe = json.loads(result.stdout)["recipe"]
    assert (recipe["distill"], recipe["clip_grad"], recipe["freeze_bn"]) == (1.0, 1.0, True)
    before, after = (hc.load(path) for path in ("cut.safetensors", "tuned.safetensors"))
    changed = {key for key, tensor in tensors_of(before).items() if not torch.equal(tensor, tensors_of(after)[key])}
    assert {"stage3.0.conv2.coefficients_in", "stage3.0.conv2.coefficients_out"} <= changed
    assert hc.load("tuned.safetensors").stage3[0].conv2.rank == before.stage3[0].conv2.rank


def test_a_layer_that_cannot_have_a_rank_is_named() -> None:
    class Own(nn.Conv2d):
        rank = 3

    model = nn.Sequential(Own(4, 8, 1))
    with pytest.raises(UsageError, match="an attribute 'rank' of its own"):
        hc.convert(model, rank={"0": 2})


def test_inspect_says_what_ranks_save() -> None:
    model = seeded(Mixed)
    inspection = hc.inspect(model, example_input=IMAGES[0])
    for share, cost in inspection.ranks.items():
        conversion = hc.convert(model, rank=float(share), example_input=IMAGES[0])
        assert conversion.cost == cost
    result = ok("inspect", SAMPLE)
    assert "parameters by share of the full rank: 0.5: 56.6% (MACs 56.2%), 0.25: 28.7% (MACs 28.3%)" in result.stdout


def test_setting_and_value_print() -> None:
    assert str(RankSetting.of(0.5)) == "0.5"
    assert str(RankSetting.of({"a*": 4, "b": 0.25})) == "a*=4,b=0.25"
    assert str(Rank(8)) == "rank 8"
    assert str(Rank(8, kernel_second=True)) == "rank 8, kernel second"
    with pytest.raises(UsageError, match="rank 5 of this Linear is out of range: 1 to 4"):
        to_ranked(seeded(lambda: nn.Linear(4, 4)), 5)
