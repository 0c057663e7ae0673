"""Sets of single frequencies: the order equals an exhaustive one, depends on the images, and is stored in plans."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationSettings, Moments, calibration_set, moments, response_moments
from harmconvert.errors import InputError, UsageError
from harmconvert.kernels import all_frequencies, eliminate, frequencies_below
from harmconvert.network import find_layers
from harmconvert.pipeline import convert
from harmconvert.plan import Frequencies, plannable
from harmconvert.samples import mnist5k_held_back
from harmconvert.search import (
    APART,
    BY_ENERGY,
    BY_ERROR,
    Item,
    Order,
    SearchSettings,
    energy_scores,
    items_of,
    orders_by_energy,
    orders_by_error,
    swaps,
    whole_plan,
    with_order,
)

from . import oracle
from .commands import SAMPLE, ok
from .networks import CONVOLUTIONS, Branches, random_input, seeded
from .seams import replace_everywhere
from .test_calibration import fitted_rows, launched, smooth

BEST = SearchSettings(trials=2, frequencies="best", axes=("space",))


# --- the chain ---


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_elimination_equals_trying_every_frequency(
    groups: int, channels: int, out: int, frequencies: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    columns = channels * frequencies
    problems = []
    for _ in range(groups):
        mixed = generator.normal(size=(4 * columns + 3, columns)) @ generator.normal(size=(columns, columns))
        problems.append((mixed + generator.normal(size=mixed.shape), generator.normal(size=(out, columns))))
    order, errors = oracle.elimination(problems, frequencies)
    gram = torch.from_numpy(np.stack([matrix.T @ matrix for matrix, _ in problems]))
    found = eliminate(gram, torch.from_numpy(np.stack([coefficients for _, coefficients in problems])), frequencies)
    assert list(found.order) == order
    assert found.errors == pytest.approx(errors, rel=1e-6)


def choices_of(size: tuple[int, ...], *sets: Any) -> tuple[Any, ...]:
    """Return the choices of a search that keep these sets of frequencies."""
    return tuple((Frequencies(size, tuple(frequencies)),) for frequencies in sets)


def sets_of(item: Item) -> list[Any]:
    """Return the frequencies of each choice."""
    return [kept.frequencies for (kept,) in item.choices]


def moments_of(conv: nn.Module, x: Tensor) -> Moments | str:
    """Return the moments of a network of one convolution."""
    whole = hc.convert(nn.Sequential(conv))
    data = calibration_set(x.split(7))
    ((names, found),) = response_moments(whole.model, {"0": whole.model[0]}, data, 0, 1 << 30)
    assert names == ("0",)
    return found


def designed(conv: nn.Module, x: Tensor, centred: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each group's design matrix of all frequencies (centred if there is a bias) and its coefficients."""
    every = oracle.frequencies(conv.kernel_size, sum(conv.kernel_size))
    inside, outside = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    kernel = conv.weight.detach().numpy()
    problems = []
    for group, matrix in enumerate(oracle.design_matrix(conv, every, fitted_rows(x))):
        rows = []
        for o in range(outside):
            place = [(group * inside + i, o) if conv.transposed else (group * outside + o, i) for i in range(inside)]
            rows.append([oracle.coefficient(kernel[at], f) for at in place for f in every])
        problems.append((matrix - matrix.mean(0) if centred else matrix, np.array(rows)))
    return problems


@pytest.mark.parametrize(
    "name", ["plain", "strided, padded, no bias", "2x2", "grouped", "1x7", "ConvTranspose2d", "Conv2dSame"]
)
def test_moments_equal_those_of_the_responses_and_give_the_same_order(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    conv, x = seeded(make, torch.float64), smooth((40, *shape[1:]))
    found = moments_of(conv, x)
    problems = designed(conv, x, conv.bias is not None)
    assert not found.apart
    for gram, coefficients, (matrix, expected) in zip(found.gram, found.coefficients, problems, strict=True):
        second = matrix.T @ matrix
        assert gram.numpy() == pytest.approx(second, rel=1e-9, abs=2e-3 * second.diagonal().mean())
        assert coefficients.numpy() == pytest.approx(expected, abs=1e-12)
    order, errors = oracle.elimination(problems, math.prod(conv.kernel_size))
    chain = eliminate(found.gram, found.coefficients, len(order))
    assert list(chain.order) == order
    assert chain.errors == pytest.approx(errors, rel=0.05)


@pytest.mark.parametrize(
    "name",
    [pytest.param("plain", marks=pytest.mark.slow), "strided, padded, no bias", "grouped", "ConvTranspose2d"],
)
def test_in_a_large_layer_each_channel_is_eliminated_separately(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MOST_UNKNOWNS", 8)
    make, shape = CONVOLUTIONS[name]
    conv, x = seeded(make, torch.float64), smooth((40, *shape[1:]))
    found = moments_of(conv, x)
    assert found.apart
    assert found.gram.shape == (conv.in_channels, 9, 9)
    apart = [
        (matrix[:, start : start + 9], coefficients[:, start : start + 9])
        for matrix, coefficients in designed(conv, x, centred=True)
        for start in range(0, matrix.shape[1], 9)
    ]
    order, errors = oracle.elimination(apart, 9)
    chain = eliminate(found.gram, found.coefficients, 9)
    assert list(chain.order) == order
    assert chain.errors == pytest.approx(errors, rel=0.05)


def test_moments_that_exceed_the_memory_limit_are_computed_channel_by_channel() -> None:
    conv, x = seeded(CONVOLUTIONS["plain"][0], torch.float64), smooth((8, 3, 9, 9))
    whole = hc.convert(nn.Sequential(conv)).model
    enough = 32 * 27**2
    for memory, apart in ((enough, False), (enough - 1, True)):
        ((_, found),) = response_moments(whole, {"0": whole[0]}, calibration_set([x]), 0, memory)
        assert found.apart == apart


def test_silent_channels_and_layers_with_too_few_positions_have_an_order() -> None:
    conv = seeded(lambda: nn.Conv2d(3, 4, 8, stride=8), torch.float64)
    x = smooth((3, 3, 16, 16))
    x[:, 1] = 0
    found = moments_of(conv, x)
    assert sorted(eliminate(found.gram, found.coefficients, 64).order) == list(range(64))
    found = moments_of(seeded(lambda: nn.Conv2d(2, 2, 3, groups=2), torch.float64), torch.zeros(8, 2, 9, 9).double())
    assert sorted(eliminate(found.gram, found.coefficients, 9).order) == list(range(9))


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(2, 2), (1, 3), (4,)]))
def test_without_images_each_set_has_the_most_energy_among_sets_of_its_size(seed: int, size: tuple[int, ...]) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[len(size)](2, 3, size)
    with torch.no_grad():
        conv.weight.copy_(random_input(conv.weight.shape, seed=seed))
    model = nn.Sequential(conv)
    item = Item(("0",), choices_of(size, all_frequencies(size)))
    ((_, order),) = orders_by_energy(model, [item])
    assert order.by == BY_ENERGY
    for count in range(1, math.prod(size) + 1):
        subsets = [tuple(s) for s in itertools.combinations(all_frequencies(size), count)]
        ours = tuple(f for f in all_frequencies(size) if f in order.frequencies[-count:])
        scores = dict(zip(subsets, energy_scores(model, ["0"], choices_of(size, *subsets)), strict=True))
        assert scores[ours] == pytest.approx(min(scores.values()), abs=1e-9)


# --- what there is to choose ---


@pytest.mark.parametrize("size", [(3, 3), (2, 2), (1, 7), (5, 5), (64, 1), (3, 3, 3)])
def test_the_sets_of_an_order_are_nested_and_lambdas_stay_among_the_choices(size: tuple[int, ...]) -> None:
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    sites = find_layers(nn.Sequential(nn.ReLU(), conv(2, 2, size), conv(2, 2, size)))
    (_, item) = items_of(whole_plan(sites, include=["*"]), {})
    every = all_frequencies(size)
    order = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    more = with_order(item, order)
    assert set(sets_of(item)) <= set(sets_of(more))
    assert [len(s) for s in sets_of(more)] == sorted((len(s) for s in sets_of(more)), reverse=True)
    assert sets_of(more)[0] == every
    added = [s for s in sets_of(more) if s not in sets_of(item)]
    assert len(added) <= 12
    for chosen in added:
        assert set(chosen) == set(order[-len(chosen) :])
        assert list(chosen) == sorted(chosen, key=every.index), "in the house order, which a plan asks for"
    sizes = {len(s) for s in sets_of(more)}
    assert sizes == set(range(1, len(every) + 1)) if len(every) <= 12 else len(sizes) > 10


costs = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4)


@given(costs, st.data())
def test_swaps_stay_within_the_limit_and_reach_sets_of_the_same_size(
    rows: list[list[int]], data: st.DataObject
) -> None:
    changes = [sorted(row, reverse=True) for row in rows]
    scores = [[float(data.draw(st.integers(0, 20))) for _ in row] for row in changes]
    chosen = tuple(data.draw(st.integers(0, len(row) - 1)) for row in changes)
    limit = sum(row[i] for row, i in zip(changes, chosen, strict=True)) + data.draw(st.integers(0, 5))
    found = list(swaps(chosen, changes, scores, limit))
    assert chosen not in found
    for swap in found:
        assert sum(row[i] for row, i in zip(changes, swap, strict=True)) <= limit
    for number, row in enumerate(changes):
        for other, cost in enumerate(row):
            if other != chosen[number] and cost == row[chosen[number]]:
                assert (*chosen[:number], other, *chosen[number + 1 :]) in found


def test_among_choices_of_equal_cost_a_swap_uses_the_least_score() -> None:
    assert list(swaps((1, 0), [[2, 1, 0], [2, 1, 1]], [[0.0, 5.0, 9.0], [0.0, 3.0, 1.0]], 3)) == [(0, 2)]


# --- on networks ---


def barcodes(count: int, seed: int = 0) -> Tensor:
    """Return images that change only horizontally, so that they have no vertical frequencies."""
    return random_input((count, 3, 1, 12), torch.float64, seed).expand(-1, -1, 12, -1).contiguous()


def reader() -> nn.Module:
    """Return a network for barcodes, without padding: its edges would have vertical frequencies."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        torch.float64,
    )


def test_detail_that_the_images_lack_is_cut_first() -> None:
    model, images = reader(), barcodes(16).split(8)
    share = 0.4  # a third of each kernel, plus biases
    best = convert(model, budget={"params": share}, calibration=images, search=BEST)
    plain = convert(
        model, budget={"params": share}, calibration=images, search=SearchSettings(trials=2, axes=("space",))
    )
    across = ((0, 0), (0, 1), (0, 2))
    assert [layer.frequencies for layer in best.plan.layers] == [across, across]
    assert best.search.best.measured < 1e-9 < 1e-3 * plain.search.best.measured
    assert (best.search.notes, best.search.frequencies) == ((), "best")
    assert hc.verify(model, best.model, inputs=images[0]).as_planned


@pytest.mark.slow
def test_a_layer_that_cannot_be_refitted_is_ordered_by_energy_and_noted() -> None:
    model = seeded(Branches)
    images = random_input((16, 3, 20, 20)).split(8)
    found = convert(
        model,
        budget="params=80%",
        calibration=images,
        search=SearchSettings(trials=1, frequencies="best", axes=("space",)),
    )
    assert found.search.notes == ("frequencies by energy (it does not run on the calibration inputs): unused",)
    names = {layer.name: layer.frequencies for layer in found.plan.layers}
    assert names["tied_a"] == names["tied_b"]
    alone = convert(model, budget="params=80%", search=BEST)
    (note,) = alone.search.notes
    assert note.startswith("frequencies by energy (there are no images): shared, tied_a, ")
    json.dumps(found.to_json())


def test_every_order_names_its_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MOST_UNKNOWNS", 100)
    model = hc.open_source(SAMPLE).model
    sites = plannable(find_layers(model))
    items = items_of(whole_plan(sites, include=["stage1.0.*", "stage3.2.conv2"]), {})
    data = calibration_set([mnist5k_held_back()[0][:16]])
    whole = hc.convert(model).model
    progress: list[tuple[int, int]] = []

    def told() -> dict[str, str]:
        orders = orders_by_error(
            model, whole, items, data, CalibrationSettings(),
            lambda done, total, _: progress.append((done, total)),
        )  # fmt: skip
        return {item.names[0]: order.by for item, order in orders}

    found = told()
    assert found == {"stage1.0.conv1": APART, "stage1.0.conv2": APART, "stage3.2.conv2": APART}
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(moments, "MOST_UNKNOWNS", 200)
    assert set(told().values()) == {APART, BY_ERROR}


def test_weight_standardised_layers_have_an_order() -> None:
    for name in ("StdConv2d", "ScaledStdConv2d"):
        conv, x = seeded(CONVOLUTIONS[name][0], torch.float64), smooth((16, 3, 9, 9))
        found = moments_of(conv, x)
        assert sorted(eliminate(found.gram, found.coefficients, 9).order) == list(range(9))


def test_a_layer_with_activations_that_are_not_finite_is_ordered_by_energy() -> None:
    conv = seeded(lambda: nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        conv.weight.mul_(1e38)
    assert "NaN or infinite" in moments_of(conv, 1e10 * smooth((8, 3, 9, 9)).float())


def test_orders_are_stored_with_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, probes = reader(), tmp_path / "scores.json"
    arguments: dict[str, Any] = {"calibration": barcodes(16).split(8)}
    plain = SearchSettings(trials=0, probes=str(probes), axes=("space",))
    convert(model, budget="params=60%", search=plain, **arguments)
    kept = json.loads(probes.read_text())
    assert kept["orders"] == {}
    del kept["orders"]  # early files have no orders
    probes.write_text(json.dumps(kept))
    best = SearchSettings(trials=0, probes=str(probes), frequencies="best", axes=("space",))
    first = convert(model, budget="params=60%", search=best, **arguments)
    more = json.loads(probes.read_text())
    assert set(kept["single"]) < set(more["single"])
    assert {name: len(order["frequencies"]) for name, order in more["orders"].items()} == {"1": 9, "3": 9}
    replace_everywhere(monkeypatch, response_moments, None)  # it must not be called again
    again = convert(model, budget="params=60%", search=best, **arguments)
    assert again.plan == first.plan
    assert json.loads(probes.read_text()) == more
    more["orders"]["1"]["frequencies"] = "none"
    probes.write_text(json.dumps(more))
    with pytest.raises(InputError, match="cannot read probes from"):
        convert(model, budget="params=60%", search=best, **arguments)


def test_an_order_is_saved_and_read_again() -> None:
    order = Order(frequencies_below((3, 3), 2), BY_ENERGY, "why")
    assert Order.from_json(json.loads(json.dumps(order.to_json()))) == order


def test_frequencies_other_than_lambda_and_best_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown frequencies 'worst': use one of lambda, best"):
        SearchSettings(frequencies="worst")


@pytest.mark.slow
def test_two_processes_choose_the_same_plan_as_one(tmp_path: Path) -> None:
    (one,) = launched(tmp_path, 1, "best")
    first, second = launched(tmp_path, 2, "best")
    assert one["kept"] == first["kept"] == second["kept"]
    lambdas = [list(frequencies_below((3, 3), levels)) for levels in range(1, 6)]
    assert any(kept not in lambdas for kept in one["kept"])


@pytest.mark.slow
def test_the_convert_command_accepts_best_frequencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", SAMPLE, "--budget", "params=92%", "--frequencies", "best", "--include", "stage3.2.conv2"]
    text = ok(*arguments, "-o", "alone.safetensors").stdout
    assert "frequencies by energy (there are no images): stage3.2.conv2" in text
    arguments += ["--calibrate", "sample:mnist5k", "--calibration-images", "16", "--trials", "1"]
    found = json.loads(ok(*arguments, "-o", "best.safetensors", "--json").stdout)
    assert found["search"]["frequencies"] == "best"
    ok("verify", SAMPLE, "best.safetensors", "--as-planned")
    assert found["cost"]["harmonic_parameters"] <= 0.92 * 271_994


def test_energy_scores_do_not_depend_on_the_scale_of_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    sets = [frequencies_below((3, 3), levels) for levels in (1, 2, 4)]
    expected = energy_scores(model, ["0"], choices_of((3, 3), *sets))
    for scale in (1e-9, 1e100, 1e-200):
        with torch.no_grad():
            model[0].weight.mul_(scale)
        assert energy_scores(model, ["0"], choices_of((3, 3), *sets)) == pytest.approx(expected, rel=1e-9)
        with torch.no_grad():
            model[0].weight.div_(scale)
