"""A new axis needs one class and one registration: plan, JSON, cost, search, file and report then handle it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.errors import InputError
from harmconvert.network import LayerInfo, find_layers, weighted_layers
from harmconvert.plan import AXES, Axis, Check, Kept, LayerCost, LayerPlan, Plan, WeightShape, cut_layer, make_plan
from harmconvert.report import page, report_of
from harmconvert.report.tables import conversion_table
from harmconvert.search import SearchSettings
from harmconvert.storage import read_header

from .networks import seeded


@dataclass(frozen=True)
class Digits(Kept):
    """The number of decimal digits that each weight keeps; 8 digits are all of float32."""

    axis: ClassVar[str] = "digits"
    count: int = 8

    @property
    def whole(self) -> bool:
        return self.count >= 8

    @property
    def key(self) -> str:
        return str(self.count)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count}

    def __str__(self) -> str:
        return f"{self.count} digits"


class DigitsAxis(Axis):
    """The axis of decimal digits: weights of convolutions and linear layers are rounded."""

    name: ClassVar[str] = "digits"
    budget_units: ClassVar[frozenset[str]] = frozenset({"macs"})

    def applies(self, layer: LayerInfo) -> bool:
        return layer.skip is None

    def whole(self, layer: LayerInfo, setting: Any = None) -> Digits:
        return Digits()

    def choices(self, whole: Kept) -> tuple[Kept, ...]:
        return tuple(map(Digits, (8, 4, 2)))

    def shared(self, kept: Sequence[Kept]) -> Digits:
        return Digits(max(one.count for one in kept if isinstance(one, Digits)))

    def from_json(self, data: Any, kernel_size: tuple[int, ...]) -> Digits:
        if not isinstance(data["count"], int) or not 1 <= data["count"] <= 8:
            raise ValueError(f"{data['count']!r} digits")
        return Digits(data["count"])

    def cost(self, shape: WeightShape, kept: Kept, cost: LayerCost) -> LayerCost:
        assert isinstance(kept, Digits)
        macs = None if cost.factored_macs is None else cost.factored_macs * kept.count // 8
        return replace(cost, kept_bytes=cost.kept_bytes * kept.count // 8, factored_macs=macs)

    def project(self, kernel: Tensor, kept: Kept) -> Tensor:
        assert isinstance(kept, Digits)
        return kernel if kept.whole else kernel.round(decimals=kept.count)

    def convert(self, model: nn.Module, kept: Mapping[str, Kept], values: bool = True) -> nn.Module:
        copied = copy.deepcopy(model)
        layers = weighted_layers(copied)
        for name, one in kept.items():
            if values and not one.whole:
                parameter = values_of(layers[name])
                with torch.no_grad():
                    parameter.copy_(self.project(parameter, one))
        return copied

    def check(self, original: nn.Module, converted: nn.Module, kept: Kept | None, as_calibrated: bool | None) -> Check:
        assert kept is not None
        before, after = (layer.weight.detach().double() for layer in (original, converted))  # type: ignore[operator]
        error = float((before - after).abs().max() / before.abs().max())
        values = values_of(converted).detach()
        rounded = torch.equal(self.project(values, kept), values)
        return Check(1, 1, error, None if rounded else "its weights are not rounded")


def values_of(layer: nn.Module) -> Tensor:
    """Return the parameter of a layer that holds its filters."""
    parameter = layer._parameters.get("weight", layer._parameters.get("coefficients"))
    assert parameter is not None
    return parameter


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXES, "digits", DigitsAxis())


def network() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        )
    )  # fmt: skip


X = torch.linspace(-1, 1, 4 * 81).reshape(4, 1, 9, 9)


def rounded_plan(model: nn.Module, **digits: int) -> Plan:
    whole = make_plan(find_layers(model), "full")
    return whole.map_layers(lambda layer: layer.keeping(Digits(digits.get(f"_{layer.name}", 8))))


def test_layers_without_a_space_axis_are_in_the_plan_and_stay_unchanged() -> None:
    model = network()
    assert [layer.name for layer in make_plan(find_layers(model), "full").layers] == ["0", "1"]
    plan = Plan((cut_layer("1", (3, 3), ((0, 0),)), LayerPlan("2", (1, 1)), LayerPlan("5", ())))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    conversion = hc.convert(model, again)
    assert [layer.name for layer in conversion.plan.layers] == ["1", "2", "5"]
    for name in ("2", "5"):
        assert torch.equal(conversion.model.get_submodule(name).weight, model.get_submodule(name).weight)
    assert hc.verify(model, conversion, X).as_planned


@pytest.mark.usefixtures("digits")
def test_the_plan_has_every_layer_with_the_new_axis() -> None:
    model = network()
    plan = make_plan(find_layers(model), 2, include=["1", "2", "5"])
    assert {layer.name: [kept.axis for kept in layer.keeps] for layer in plan.layers} == {
        "1": ["space", "digits"], "2": ["digits"], "5": ["digits"],
    }  # fmt: skip
    assert [skip.name for skip in plan.skipped] == ["0"]
    assert "1  3x3  keeps 3 of 9, 8 digits" in str(plan)
    assert "5  matrix  8 digits" in str(plan)


@pytest.mark.usefixtures("digits")
def test_a_plan_with_the_new_axis_is_saved_as_json_and_validated() -> None:
    plan = rounded_plan(network(), _2=4)
    data = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(data) == plan
    assert plan.layers[2].count == 4, "a kept value can be read from the layer"
    data["layers"][2]["digits"]["count"] = 99
    with pytest.raises(InputError, match="layer '2': 99 digits"):
        Plan.from_json(data)


def test_an_unknown_axis_is_refused() -> None:
    layer = {"name": "a", "kernel_size": [1, 1], "colour": {"hue": 3}}
    with pytest.raises(InputError, match="layer 'a': it keeps something on 'colour', an axis that this harmconvert"):
        Plan.from_json({"layers": [layer]})


@pytest.mark.usefixtures("digits")
def test_a_network_with_the_new_axis_is_converted_costed_verified_saved_and_reported(tmp_path: Path) -> None:
    model = network()
    plan = rounded_plan(model, _1=2, _5=4)
    conversion = hc.convert(model, plan)
    assert torch.equal(conversion.model[5].weight, model[5].weight.detach().round(decimals=4))
    # A weight has 4 bytes; layer 1 keeps a quarter of them and layer 5 half.
    assert conversion.cost.harmonic_bytes == conversion.cost.bytes - 216 * 4 * 3 // 4 - 18 * 4 // 2
    check = hc.verify(model, conversion, X)
    assert (check.ok, check.as_planned) == (False, True)
    assert check.verdict.startswith("cut as planned in 2 of 3 layers")
    console = Console(width=120, record=True)
    console.print(conversion_table(conversion))
    text = console.export_text()
    assert "2 digits" in text
    hc.save(conversion, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").plan == plan
    loaded = hc.load(tmp_path / "a.safetensors", model=network())
    with torch.no_grad():
        assert torch.equal(loaded(X), conversion.model(X))
    report = report_of(loaded, read_header(tmp_path / "a.safetensors"), "a")
    assert {layer.name: layer.other_axes for layer in report.layers if layer.other_axes} == {
        "1": "2 digits", "5": "4 digits",
    }  # fmt: skip
    assert "2 digits" in page(report)


@pytest.mark.usefixtures("digits")
def test_verify_names_a_weight_that_does_not_match_the_plan() -> None:
    model = network()
    conversion = hc.convert(model, rounded_plan(model, _5=2))
    with torch.no_grad():
        conversion.model[5].weight[0, 0] += 0.1234
    assert "5: its weights are not rounded" in hc.verify(model, conversion, X).problems


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("calibration", [None, X.repeat(8, 1, 1, 1).split(8)])
def test_a_search_for_macs_uses_the_new_axis_and_a_search_for_parameters_does_not(calibration: Any) -> None:
    model = network()
    settings: dict[str, Any] = {
        "include": ["1", "2", "5"], "calibration": calibration, "example_input": X,
        "search": SearchSettings(axes=("space", "digits")),
    }  # fmt: skip
    small = hc.convert(model, budget="macs=35%", **settings)
    assert small.cost.factored_macs is not None
    assert small.cost.dense_macs is not None
    assert small.cost.factored_macs <= 0.35 * small.cost.dense_macs
    assert any(layer.count < 8 for layer in small.plan.layers)
    few = hc.convert(model, budget="params=60%", **settings)
    assert few.cost.harmonic_parameters <= 0.6 * few.cost.parameters
    assert all(layer.count == 8 for layer in few.plan.layers)
