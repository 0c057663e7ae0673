"""Budgets: the choice equals brute force, plans stay within the budget, scores are stored and not mixed up."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import harmconvert as hc
from harmconvert.arguments import Budget
from harmconvert.calibration import calibrate
from harmconvert.errors import InputError, UsageError
from harmconvert.kernels import Basis, all_frequencies, frequencies_below
from harmconvert.layers import layer_times
from harmconvert.network import find_layers, run_times, trace
from harmconvert.pipeline import convert
from harmconvert.plan import Frequencies, Plan, make_plan, network_cost, plannable
from harmconvert.samples import mnist5k_held_back
from harmconvert.search import (
    Searching,
    SearchSettings,
    costs_of,
    energy_scores,
    frontier,
    items_of,
    plan_of,
    smallest_within,
)

from .commands import SAMPLE, ok, run
from .networks import Branches, random_input, seeded
from .pictures import digit_folders
from .seams import replace_everywhere

X = random_input((2, 3, 16, 16))
numbers = st.integers(0, 60)


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    costs = [draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes]
    scores = [draw(st.lists(numbers.map(float), min_size=n, max_size=n)) for n in sizes]
    return costs, scores


def brute_force(costs: list[list[int]], scores: list[list[float]], budget: int) -> float | None:
    totals = [
        sum(score[i] for score, i in zip(scores, chosen, strict=True))
        for chosen in itertools.product(*(range(len(cost)) for cost in costs))
        if sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= budget
    ]
    return min(totals, default=None)


@given(instances(), st.integers(0, 300))
def test_the_knapsack_equals_brute_force(case: tuple[Any, Any], budget: int) -> None:
    costs, scores = case
    found = frontier(costs, scores)
    chosen, expected = found.best(budget), brute_force(costs, scores, budget)
    assert found.exact
    if chosen is None:
        assert expected is None
        return
    assert sum(score[i] for score, i in zip(scores, chosen, strict=True)) == expected
    assert sum(cost[i] for cost, i in zip(costs, chosen, strict=True)) <= budget


def test_among_plans_of_equal_score_the_cheapest_is_chosen() -> None:
    assert frontier([[9, 3], [5, 4, 2]], [[1.0, 1.0], [0.0, 2.0, 2.0]]).best(100) == (1, 0)
    found = frontier([[9, 3, 5]], [[1.0, 1.0, 1.0]])
    assert (found.costs.tolist(), found.scores.tolist()) == ([3], [1.0])


@settings(deadline=None)
@given(instances(), st.integers(0, 300), st.integers(2, 5))
def test_a_thinned_frontier_stays_within_the_budget(case: tuple[Any, Any], budget: int, limit: int) -> None:
    costs, scores = case
    found = frontier(costs, scores, limit)
    assert len(found.costs) <= max(limit, 2) + 1
    chosen = found.best(budget)
    if chosen is None:
        assert brute_force(costs, scores, budget) is None, "the cheapest plan is never thinned out"
        return
    total = sum(cost[i] for cost, i in zip(costs, chosen, strict=True))
    assert total <= budget
    assert total in found.costs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("params", "params= is no share of the network"),
        ("params=0", "params=0 is no share"),
        ("params=101%", "at most 100%"),
        ("params=1.5", "at most 100%"),
        ("params=-3", "no share"),
        ("params=half", "no share"),
        ("params=nan", "no share"),
        ("params=0M", "params=0M is no share of the network: give 60% or 0.6, at most 100%, or an amount in k, M, G"),
        ("params=5MB", "no share"),
        ("bytes=10", "or an amount in B, kB, KiB, MB, MiB, GB, GiB"),
        ("latency=1e400s", "no share"),
        ("weight=60%", "unknown budget 'weight': use one of params, macs, bytes, latency, such as params=60%"),
        ({"params": 0.5, "macs": 0.5}, "names 2"),
        ({}, "names 0"),
    ],
)
def test_invalid_budgets_are_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(given)
    assert message in str(caught.value)


def test_valid_budgets_are_parsed() -> None:
    same = [Budget.parse(text) for text in ("params=60%", "params=0.6", " params = 60 % ".replace(" %", "%"))]
    assert {*same, Budget.parse({"params": 0.6}), Budget.parse({"params": "60%"})} == {Budget("params", 0.6)}
    assert str(same[0]) == "params=60%"


@pytest.mark.parametrize(
    ("text", "amount", "shown"),
    [
        ("params=5M", 5_000_000, "params=5M"),
        ("params=0.0123 m", 12_300, "params=12.3k"),
        ("bytes=10MB", 10_000_000, "bytes=10MB"),
        ("bytes=10mib", 10_485_760, "bytes=10MiB"),
        ("bytes=1023B", 1023, "bytes=1023B"),
        ("macs=1.2T", 1_200_000_000_000, "macs=1.2T"),
        ("latency=1500us", 1500, "latency=1.5ms"),
    ],
)
def test_amounts_with_suffixes_are_parsed(text: str, amount: int, shown: str) -> None:
    budget = Budget.parse(text)
    assert (budget.share, budget.amount, str(budget)) == (None, amount, shown)
    assert Budget.parse(shown) == budget
    assert (budget.limit(amount + 1), budget.limit(amount), budget.limit(1)) == (amount, amount, 1)


def test_an_amount_and_its_share_give_the_same_limit() -> None:
    model = seeded(Branches)
    whole = convert(model, example_input=X).cost
    for unit, of_it in (("params", whole.parameters), ("macs", whole.dense_macs)):
        assert of_it is not None
        amount = int(0.6 * of_it)
        by_share = convert(model, budget={unit: 0.6}, example_input=X)
        by_amount = convert(model, budget=f"{unit}={amount / 1000:.12g}k", example_input=X)
        assert by_amount.plan.layers == by_share.plan.layers
        assert by_amount.search is not None
        assert by_amount.search.limit == amount
    with pytest.raises(UsageError, match=r"the budget params=0\.3k cannot be met: cutting can bring the [0-9,]+ param"):
        convert(model, budget={"params": "0.3k"}, example_input=X)
    assert all(layer.whole for layer in convert(model, budget="params=1G", example_input=X).plan.layers)


@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
def test_the_costs_of_choices_add_up_to_the_cost_of_the_network(unit: str) -> None:
    """Tied weights count once, bytes follow the layer's dtype, and MACs are those of the factored form."""
    model = seeded(Branches)
    model.deep.half()
    run_ = trace(seeded(Branches), X)
    sites = plannable(find_layers(model, run_))
    whole = make_plan(sites, "full")
    items = items_of(whole, {site.name: site.tied_to for site in sites if site.tied_to})
    assert ("tied_a", "tied_b") in [item.names for item in items]
    total, changes = costs_of(model, whole, items, unit, run_)
    for chosen in itertools.islice(itertools.product(*(range(0, len(row), 2) for row in changes)), 40):
        cost = network_cost(model, plan_of(whole, items, chosen, ""), run_)
        found = {"params": cost.harmonic_parameters, "bytes": cost.harmonic_bytes, "macs": cost.factored_macs}[unit]
        assert found == total + sum(row[choice] for row, choice in zip(changes, chosen, strict=True))


@pytest.mark.parametrize("size", [(3, 3), (5, 5), (7, 7), (64, 1), (2, 2), (1, 7), (3, 3, 3)])
def test_every_uniform_lambda_is_among_the_choices(size: tuple[int, ...]) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    model = nn.Sequential(nn.ReLU(), conv(2, 2, size), conv(2, 2, size))
    sites = plannable(find_layers(model))
    (_, item) = items_of(make_plan(sites, "full"), {})
    sets = [kept.frequencies for (kept,) in item.choices]
    assert sets[0] == all_frequencies(size)
    assert [len(s) for s in sets] == sorted({len(s) for s in sets}, reverse=True)
    for lam in range(1, 6):
        uniform = make_plan(sites, lam, include=["2"])
        assert uniform.layers[0].frequencies in sets


@pytest.mark.parametrize(
    "share", [pytest.param(0.9, marks=pytest.mark.slow), 0.5, pytest.param(0.3, marks=pytest.mark.slow), 0.15]
)
@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("frequencies", ["lambda", "best"])
def test_a_budget_is_never_exceeded(frequencies: str, unit: str, share: float) -> None:
    model = hc.open_source(SAMPLE).model
    example = torch.zeros(1, 1, 28, 28)
    search = SearchSettings(frequencies=frequencies)
    found = convert(model, budget={unit: share}, example_input=example, search=search)
    cost, whole = (
        found.cost,
        network_cost(model, make_plan(plannable(find_layers(model)), "full"), trace(model, example)),
    )
    kept = {"params": cost.harmonic_parameters, "macs": cost.factored_macs}[unit]
    all_ = {"params": whole.parameters, "macs": whole.dense_macs}[unit]
    assert kept <= share * all_
    assert kept > (share - 0.08) * all_, "and it is used"
    assert (found.search.scored_by, found.search.frequencies) == ("energy", frequencies)
    assert found.search.best.cost == kept
    assert found.plan.policy == f"{unit}={100 * share:g}%"


def digits(count: int) -> list[torch.Tensor]:
    return [mnist5k_held_back()[0][:count]]


def test_a_latency_budget_uses_the_times_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are fixed: 4 ms for each dense layer, 1 ms for each frequency when factored, 10 ms for the network."""

    def few_are_fast(conv: Any, site: object) -> tuple[float, float]:
        return 4e-3, 1e-3 * len(conv.frequencies)

    replace_everywhere(monkeypatch, layer_times, few_are_fast)
    replace_everywhere(monkeypatch, run_times, lambda model, x: {"dense": 11e-3, "dense, channels_last": 10e-3})
    layers = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
    network, x = seeded(lambda: nn.Sequential(*layers)), random_input((1, 3, 12, 12))
    search = convert(network, budget="latency=60%", example_input=x).search
    assert search is not None
    assert (search.unit, search.scored_by) == ("latency", "energy")
    assert (search.whole, search.smallest, search.limit) == (10000, 4000, 6000)
    assert search.best.cost == 6000  # microseconds
    with pytest.raises(UsageError, match="the budget latency=39% cannot be met: cutting can bring the 10,000 micro"):
        convert(network, budget="latency=39%", example_input=x)
    with pytest.raises(UsageError, match=r"the budget latency=60% is measured: give an example input"):
        convert(network, budget="latency=60%")
    replace_everywhere(monkeypatch, few_are_fast, lambda conv, site: (40e-3, 1e-3))  # more than the whole network
    search = convert(network, budget="latency=60%", example_input=x).search
    assert search is not None
    assert 500 < search.smallest < search.limit


def test_a_latency_budget_is_measured_on_this_machine() -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten()))
    search = convert(network, budget="latency=100%", example_input=random_input((2, 3, 12, 12))).search
    assert search is not None
    assert 0 < search.smallest <= search.best.cost <= search.limit == search.whole


@pytest.mark.slow
def test_the_chosen_plan_is_the_best_of_those_tried_and_beats_the_uniform_plan() -> None:
    model = hc.open_source(SAMPLE).model
    found = convert(model, budget="params=35%", calibration=digits(64), search=SearchSettings(trials=5))
    search = found.search
    assert len(search.tried) == 5
    origins = {plan.origin: plan.measured for plan in search.tried}
    assert "lambda 2" in origins
    assert search.best.measured == min(plan.measured for plan in search.tried)
    assert search.best.measured < origins["lambda 2"]
    assert all(plan.cost <= search.limit for plan in search.tried)
    assert found.calibration.divergence == search.best.measured
    assert hc.verify(model, found).as_planned
    again = convert(model, Plan.from_json(found.plan.to_json()), calibration=digits(64))
    assert again.calibration.divergence == pytest.approx(found.calibration.divergence, rel=1e-3)
    json.dumps(found.to_json())


@pytest.mark.slow
def test_scores_are_stored_and_measured_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, probes = hc.open_source(SAMPLE).model, tmp_path / "scores.json"
    first = convert(
        model,
        budget="params=40%",
        calibration=digits(32),
        search=SearchSettings(trials=2, probes=str(probes), axes=("space",)),
    )
    kept = json.loads(probes.read_text())
    assert len(kept["single"]) == 18 * 4
    assert len(kept["whole"]) == 2
    calls: list[str] = []
    replace_everywhere(monkeypatch, calibrate, lambda *a, **k: calls.append("calibrate"))
    settings_ = SearchSettings(trials=0, probes=str(probes), axes=("space",))
    second = convert(model, budget="params=20%", calibration=digits(32), search=settings_)
    assert len(calls) == 1, "the delivered network alone is calibrated"
    assert second.cost.harmonic_parameters < first.cost.harmonic_parameters
    assert second.search.tried[0].measured is None


@pytest.mark.slow
def test_an_interrupted_search_continues_where_it_stopped(tmp_path: Path) -> None:
    model, probes = hc.open_source(SAMPLE).model, tmp_path / "scores.json"
    arguments: dict[str, Any] = {
        "budget": "params=40%", "calibration": digits(16), "search": SearchSettings(trials=1, probes=str(probes)),
    }  # fmt: skip

    def stop(done: int, total: int, what: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, progress=stop, **arguments)
    assert len(json.loads(probes.read_text())["single"]) == 7
    whole = convert(model, **arguments)
    alone = convert(model, **{**arguments, "search": SearchSettings(trials=1)})
    assert whole.plan == alone.plan


def test_probes_of_other_weights_inputs_or_settings_are_refused(tmp_path: Path) -> None:
    model, probes = hc.open_source(SAMPLE).model, tmp_path / "scores.json"
    search = SearchSettings(trials=1, probes=str(probes), axes=("space",))
    convert(model, budget="params=95%", include=["stage3.2.*"], calibration=digits(16), search=search)
    arguments: dict[str, Any] = {"budget": "params=95%", "include": ["stage3.2.*"], "search": search}
    other = hc.open_source(SAMPLE).model
    with torch.no_grad():
        other.fc.bias.add_(1) if hasattr(other, "fc") else next(other.parameters()).add_(1e-3)
    with pytest.raises(UsageError, match="holds probes of other weights: remove it, or name another file"):
        convert(other, calibration=digits(16), **arguments)
    with pytest.raises(UsageError, match="holds probes of other images"):
        convert(model, calibration=digits(17), **arguments)
    with pytest.raises(UsageError, match="holds probes of other settings"):
        convert(model, calibration=digits(16), basis="haar", **arguments)
    for spoilt in ("{", "[]", '{"version": 2}', '{"version": 1, "key": {}, "single": {"a": "b"}, "whole": {}}'):
        probes.write_text(spoilt)
        with pytest.raises(InputError, match=r"(holds probes|read probes) .*: remove (it|the file)"):
            convert(model, calibration=digits(16), **arguments)


def test_the_message_for_an_impossible_budget_names_the_reachable_minimum() -> None:
    model = hc.open_source(SAMPLE).model
    with pytest.raises(UsageError, match=r"271,994 parameters of this network to 31,636 at least, so ask for 11\.7%"):
        convert(model, budget="params=5%")
    with pytest.raises(UsageError, match="counts multiply-adds: give an example input"):
        convert(seeded(Branches), budget="macs=50%")
    with pytest.raises(UsageError, match=r"lam \(=2\) and budget \(='params=50%'\) both say what to keep"):
        convert(model, 2, budget="params=50%")
    with pytest.raises(InputError, match="no layer of this Sequential may be cut: include names those that should"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)), budget="params=50%")
    alone = r"cannot be compared on these images \(one input: none can be held back\), so plans cannot"
    with pytest.raises(InputError, match=alone):
        convert(model, budget="params=50%", calibration=digits(1))


def test_the_energy_score_is_the_cut_energy_relative_to_the_batch_norm_variance() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 5, 3)))
    model[1].running_var.copy_(torch.tensor([1.0, 4.0, 0.5, 2.0]))
    sets = [(Frequencies((3, 3), kept),) for kept in (all_frequencies((3, 3)), frequencies_below((3, 3), 2))]
    whole, cut = energy_scores(model, ["0"], sets)
    kernels_FK = Basis().kernels((3, 3))
    lost = (model[0].weight.double().flatten(2) @ kernels_FK[3:].T).square().sum((1, 2))
    assert whole == pytest.approx(0, abs=1e-12)
    assert cut == pytest.approx((lost / model[1].running_var).mean().item(), rel=1e-6)
    _, cut = energy_scores(model, ["2"], sets)
    weight = model[2].weight.double()
    lost = (weight.flatten(2) @ kernels_FK[3:].T).square().sum((0, 2))
    assert cut == pytest.approx((lost / weight.square().sum((0, 2, 3))).mean().item(), rel=1e-6)


# --- the command line ---


@pytest.mark.slow
def test_the_convert_command_accepts_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", SAMPLE, "--budget", "params=30%", "--calibrate", "sample:mnist5k"]
    arguments += ["--calibration-images", "32", "--trials", "2"]
    result = ok(*arguments, "--save-plan", "plan.json")
    assert "parameters: 271,994 now, 31,636 (11.6%) at least; params=30% is 81,598" in result.stderr
    assert "taken" in result.stdout
    assert Path("resnet_mnist5k-harmonic-params30.safetensors").exists()
    assert [path.name for path in Path().glob("*.probes.json")] == ["resnet_mnist5k-harmonic.probes.json"]
    followed = ok("convert", SAMPLE, "--plan", "plan.json", "-o", "followed.safetensors", "--json")
    plan = json.loads(followed.stdout)["plan"]
    assert plan == json.loads(Path("plan.json").read_text())
    found = json.loads(ok(*arguments, "-o", "again.safetensors", "--json").stdout)
    assert found["search"]["tried"]
    assert found["cost"]["harmonic_parameters"] <= 81_598


@pytest.mark.slow
def test_a_second_budget_reuses_the_scores_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    few = ["--calibrate", "sample:mnist5k", "--calibration-images", "16", "--include", "stage3.2.*", "--trials", "0"]
    few += ["--axes", "space"]
    ok("convert", SAMPLE, "--budget", "params=95%", *few, "-o", "out/first.safetensors")
    kept = Path("out/resnet_mnist5k-harmonic.probes.json").read_text()
    assert len(json.loads(kept)["single"]) == 2 * 4
    calls: list[str] = []
    measured = Searching._divergence
    monkeypatch.setattr(
        Searching, "_divergence", lambda self, *a, **k: calls.append("probe") or measured(self, *a, **k)
    )
    ok("convert", SAMPLE, "--budget", "params=85%", *few, "-o", "out/second.safetensors")
    assert not calls
    assert Path("out/resnet_mnist5k-harmonic.probes.json").read_text() == kept
    # Probes of other images are refused, also in a file named with --probes.
    few[3] = "17"
    result = run("convert", SAMPLE, "--budget", "params=85%", *few, "-o", "out/third.safetensors")
    assert result.exit_code == 2
    assert "holds probes of other images and settings: remove it, or name another file (--probes)" in result.stderr
    ok("convert", SAMPLE, "--budget", "params=90%", *few, "--probes", "mine.json", "-o", "out/third.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "params=30%", "--lambda", "2"], "give one of them, once"),
        (["--budget", "params=30%", "--budget", "macs=30%"], "give one of them, once"),
        (["--trials", "3"], "--trials works only with --budget"),
        (["--frequencies", "best"], "--frequencies works only with --budget"),
        (["--budget", "params=30%", "--frequencies", "worst"], "'worst' is not one of 'lambda', 'best'"),
        (["--budget", "params=0%"], "is no share of the network"),
        (["--budget", "params=1%"], "cannot be met"),
        (["--max-drop", "1"], "--max-drop POINTS is measured on data: give --data DATA"),
        (["--labelled", "sample:mnist5k"], "--labelled works only with --max-drop POINTS"),
        (["--max-drop", "1", "--labelled", "sample:mnist5k", "--lambda", "2"], "give one of them, once"),
        (["--max-drop", "1", "--labelled", "nowhere"], "there is no folder and no data set 'nowhere'"),
    ],
)
def test_options_that_do_not_fit_a_budget_are_refused(arguments: list[str], message: str) -> None:
    result = run("convert", SAMPLE, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


# --- the largest drop ---


@given(st.floats(0, 1), st.floats(0, 0.5))
def test_bisection_finds_the_smallest_share_within_the_drop(threshold: float, least: float) -> None:
    """The drop falls as the share grows; the result is always within the drop."""
    made, steps = smallest_within(lambda share: (share, 0.0 if share >= threshold else 10.0), least, 1.0, 7)
    assert made >= threshold
    assert made == pytest.approx(max(threshold, least), abs=(1 - least) / 2**7 + 1e-12)
    assert all(0 <= step.share <= 1 for step in steps)


def test_nothing_is_cut_where_every_cut_costs_too_much() -> None:
    made, steps = smallest_within(lambda share: (share, 0.0 if share == 1 else 50.0), 0.1, 1.0, 3)
    assert made == 1
    assert len(steps) == 5
    with pytest.raises(UsageError, match="a drop of -1 points: give 0 or more"):
        smallest_within(lambda share: (share, 0.0), 0.1, -1)


@pytest.mark.slow
def test_the_smallest_network_within_a_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digit_folders(tmp_path / "digits", 20)
    arguments = ["convert", SAMPLE, "--max-drop", "3", "--labelled", "digits", "--calibrate", "sample:mnist5k"]
    arguments += ["--calibration-images", "32", "--trials", "1", "--search-figure", "search.svg", "--json"]
    found = json.loads(ok(*arguments).stdout)
    assert found["output"] == "resnet_mnist5k-harmonic-drop3.safetensors"
    within = [step["share"] for step in found["drops"] if step["drop"] <= 3]
    assert found["cost"]["harmonic_parameters"] / found["cost"]["parameters"] <= min(within)
    assert found["cost"]["harmonic_parameters"] / found["cost"]["parameters"] < 0.5
    assert found["held_out"]["uncut"]["images"] == 100
    assert found["held_out"]["converted"]["top1"] > 0.85
    assert Path("search.svg").read_text().startswith("<?xml")
    plans = list(csv.DictReader(Path("search.csv").read_text().splitlines()))
    assert [row["taken"] for row in plans if row["plan"] != "frontier"].count("True") == 1


def test_a_search_may_truncate_depthwise_layers() -> None:
    """Lambda policies leave depthwise layers whole."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 5, groups=16), nn.Conv2d(16, 4, 1), nn.Flatten())
    search = SearchSettings(axes=("space",))
    found = convert(net, budget={"params": 0.8}, example_input=random_input((1, 3, 8, 8)), search=search)
    assert found.cost.harmonic_parameters <= 0.8 * found.cost.parameters
    assert [layer.name for layer in found.plan.layers if not layer.whole] == ["1"]
    assert found.plan.notes == {}


def test_a_search_by_drop_may_keep_only_the_zero_frequency() -> None:
    """For a kernel larger than 3x3, lambda 1 keeps more than the zero frequency."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 9, padding=4), nn.Conv2d(8, 8, 9, padding=4))
    found = convert(net, max_drop=1.0, metric=lambda network: 50.0)
    assert found.cost.harmonic_parameters == 8 * 9 + 8 + 2 * (8 * 8 + 8)
    assert len(found.drops) == 1


def test_labelled_images_have_the_requested_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digit_folders(tmp_path / "digits", 2)
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    arguments = ["convert", "mine.py:make", "--trust-code", "--max-drop", "100", "--labelled", "digits", "--json"]
    arguments += ["--preprocess", "none"]
    found = json.loads(ok(*arguments, "--input-size", "3,32,32").stdout)
    assert found["held_out"]["converted"]["images"] == 10


def test_max_drop_needs_a_metric_and_allows_no_lambda() -> None:
    with pytest.raises(UsageError, match=r"max_drop needs a metric .* these need max_drop"):
        convert(nn.Conv2d(3, 4, 3), max_drop=1.0)
    with pytest.raises(UsageError, match="max_drop finds the size of the network"):
        convert(nn.Conv2d(3, 4, 3), 2, max_drop=1.0, metric=lambda network: 1.0)
