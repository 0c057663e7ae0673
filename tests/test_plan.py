from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmconvert.arguments import parse_lambda
from harmconvert.errors import InputError, UsageError
from harmconvert.kernels import BASES, Basis, all_frequencies
from harmconvert.network import LayerInfo
from harmconvert.plan import Plan, cut_layer, make_plan

SITES = [
    LayerInfo("stem", "Conv2d", (7, 7), reads_input=True, output_size=(112, 112)),
    LayerInfo("layer1.conv", "Conv2d", (3, 3), output_size=(56, 56)),
    LayerInfo("layer2.conv", "Conv2d", (3, 3), output_size=(14, 14)),
    LayerInfo("layer2.dw", "Conv2d", (5, 5), depthwise=True, output_size=(14, 14)),
    LayerInfo("layer3.conv", "Conv2d", (3, 3), output_size=(7, 7)),
    LayerInfo("layer3.wide", "Conv2d", (1, 7), output_size=(7, 7)),
    LayerInfo("odd", "CondConv2d", (3, 3), skip="its kernels are computed anew for each input"),
]


def kept(plan: Plan) -> dict[str, int]:
    return {layer.name: len(layer.frequencies) for layer in plan.layers}


WHOLE = {"stem": 49, "layer1.conv": 9, "layer2.conv": 9, "layer2.dw": 25, "layer3.conv": 9, "layer3.wide": 7}


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        ("full", {}),
        (5, {}),
        (3, {"layer1.conv": 6, "layer2.conv": 6, "layer3.conv": 6}),
        (2, {"layer1.conv": 3, "layer2.conv": 3, "layer3.conv": 3, "layer3.wide": 5}),
        ("progressive", {"layer2.conv": 6, "layer3.conv": 3, "layer3.wide": 5}),
        ({"layer3.*": 2}, {"layer3.conv": 3, "layer3.wide": 2}),
        ({"*": 3, "stem": 1}, dict.fromkeys(WHOLE, 6) | {"stem": 1, "layer3.wide": 3}),
    ],
)
def test_policies_give_the_expected_plans(lam: Any, expected: dict[str, int]) -> None:
    plan = make_plan(SITES, lam)
    assert kept(plan) == WHOLE | expected
    assert [(s.name, s.why) for s in plan.skipped] == [("odd", "its kernels are computed anew for each input")]


def test_notes_say_why_the_input_layer_and_depthwise_layers_stay_whole() -> None:
    notes = make_plan(SITES, 2).notes
    assert notes == {
        "stem": "whole: it reads the network's input",
        "layer2.dw": "whole: depthwise, unless a pattern names it",
    }


def test_include_selects_layers_and_does_not_affect_the_others() -> None:
    plan = make_plan(SITES, 2, include=["layer2.*", "stem"])
    assert kept(plan) == {"stem": 15, "layer2.conv": 3, "layer2.dw": 10}
    assert {s.why for s in plan.skipped} == {
        "not among those to include",
        "its kernels are computed anew for each input",
    }


def test_excluded_layers_stay_unchanged() -> None:
    plan = make_plan(SITES, "full", exclude=["layer?.conv"])
    assert kept(plan) == {"stem": 49, "layer2.dw": 25, "layer3.wide": 7}
    assert [s.name for s in plan.skipped if s.why == "excluded by layer?.conv"] == [
        "layer1.conv",
        "layer2.conv",
        "layer3.conv",
    ]


def test_progressive_considers_only_planned_layers() -> None:
    plan = make_plan(SITES, "progressive", exclude=["layer3.*"])
    assert kept(plan)["layer2.conv"] == 3
    assert kept(plan)["layer1.conv"] == 6


def test_progressive_compares_maps_by_the_number_of_positions() -> None:
    sizes = {"square": (6, 6), "flat": (2, 12), "long": (9, 4), "large": (7, 7)}
    sites = [LayerInfo(name, "Conv2d", (3, 3), output_size=size) for name, size in sizes.items()]
    assert kept(make_plan(sites, "progressive")) == {"square": 6, "flat": 3, "long": 6, "large": 9}


def test_progressive_leaves_layers_that_did_not_run_whole() -> None:
    sites = [*SITES, LayerInfo("aside", "Conv2d", (3, 3))]
    plan = make_plan(sites, "progressive")
    assert kept(plan)["aside"] == 9
    assert plan.notes["aside"] == "whole: it did not run on the example input"


def test_progressive_without_sizes_asks_for_an_input() -> None:
    with pytest.raises(UsageError, match=r"give an example input \(example_input\)"):
        make_plan([LayerInfo("a", "Conv2d", (3, 3))], "progressive")


def test_the_last_matching_pattern_decides() -> None:
    assert kept(make_plan(SITES, {"layer*": 2, "layer3.conv": 4}))["layer3.conv"] == 8


def test_tied_layers_keep_the_union_of_frequencies_and_are_skipped_together() -> None:
    tied = [
        LayerInfo("a", "Conv2d", (3, 3), output_size=(14, 14)),
        LayerInfo("b", "Conv2d", (3, 3), output_size=(7, 7), tied_to="a"),
    ]
    assert kept(make_plan(tied, "progressive")) == {"a": 6, "b": 6}
    plan = make_plan([*tied, SITES[1]], "full", exclude=["b"])
    assert {s.name: s.why for s in plan.skipped} == {
        "b": "excluded by b",
        "a": "its weight is tied to b, which is skipped",
    }
    assert set(kept(plan)) == {SITES[1].name}


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        (0, "lambda 0 is out of range"),
        (6, "lambda 6 is out of range: a bare number is meant for 3x3 kernels, which have levels 1 to 5"),
        (-1, "out of range"),
        (True, "unknown lambda True"),
        ("half", "unknown lambda 'half'"),
        (2.5, "unknown lambda 2.5"),
        ({"layer9*": 2}, r"'layer9\*' matches no convolution over 1x1 \(there are: stem, layer1.conv"),
        ({"layer3.conv": 6}, "layer layer3.conv: lambda 6 does not fit a 3x3 kernel: it has 5 levels"),
        ({"layer3.conv": 0}, "layer layer3.conv: lambda 0"),
    ],
)
def test_an_invalid_lambda_is_refused(lam: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(SITES, lam)


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_patterns_that_match_nothing_are_refused(which: str) -> None:
    with pytest.raises(UsageError, match="'nothing' matches no convolution"):
        make_plan(SITES, "full", **{which: ["nothing"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", "full"),
        (" progressive ", "progressive"),
        ("3", 3),
        ("layer3.*=2", {"layer3.*": 2}),
        ("a=b=1, c=2", {"a=b": 1, "c": 2}),
    ],
)
def test_texts_of_lambda_are_parsed(text: str, expected: Any) -> None:
    assert parse_lambda(text) == expected


@pytest.mark.parametrize("text", ["", "two", "-1", "1.5", "layer=", "=2", "a=2,", "a=two", "a=-1"])
def test_the_message_for_an_unreadable_lambda_lists_valid_texts(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown lambda .*use full, progressive, a number, or PATTERN=N"):
        parse_lambda(text)


def test_a_pattern_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="'a' twice"):
        parse_lambda("a=1,a=2")


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers = []
    for name in draw(st.lists(st.text(max_size=8), unique=True, max_size=4)):
        size = draw(sizes)
        some = draw(st.sets(st.sampled_from(all_frequencies(size)), min_size=1))
        basis = Basis(draw(st.sampled_from(BASES)), draw(st.sampled_from(["ortho", "l1"])))
        layers.append(cut_layer(name, size, tuple(f for f in all_frequencies(size) if f in some), basis))
    return Plan(tuple(layers), policy=draw(st.text(max_size=8)))


@given(plans())
def test_a_plan_is_converted_to_json_and_back(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_is_saved_read_and_followed(tmp_path: Path) -> None:
    plan = make_plan(SITES, "progressive")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert make_plan(SITES, again) == plan


def test_layers_that_a_plan_does_not_name_stay_unchanged() -> None:
    plan = Plan(make_plan(SITES, 2).layers[1:3])
    followed = make_plan(SITES, plan)
    assert kept(followed) == {"layer1.conv": 3, "layer2.conv": 3}
    assert {s.name for s in followed.skipped if s.why == "not in the plan"} == set(WHOLE) - set(kept(followed))


def test_a_plan_of_another_network_is_refused() -> None:
    with pytest.raises(UsageError, match="the plan does not fit this network: 'elsewhere' matches no"):
        make_plan(SITES, Plan((cut_layer("elsewhere", (3, 3), ((0, 0),)),)))
    with pytest.raises(UsageError, match=r"layer stem has kernel \(7, 7\), the plan says \(3, 3\)"):
        make_plan(SITES, Plan((cut_layer("stem", (3, 3), ((0, 0),)),)))
    with pytest.raises(UsageError, match=r"layer stem has kernel \(7, 7\), the plan says \(1, 49\)"):
        make_plan(SITES, Plan((cut_layer("stem", (1, 49), ((0, 0),)),)))


GOOD: dict[str, Any] = {"name": "a", "kernel_size": [3, 3], "frequencies": [[0, 0]]}


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": [10**9, 10**9]},
        {"kernel_size": []},
        {"kernel_size": [3, float("nan")]},
        {"kernel_size": [True, 3]},
        {"kernel_size": "33"},
        {"frequencies": [[0, -1]]},
        {"frequencies": [[0, 3]]},
        {"frequencies": [[0, 1], [0, 0]]},
        {"frequencies": []},
        {"frequencies": None},
        {"name": None, "kernel_size": None},
    ],
)
def test_a_malicious_plan_raises_input_error(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="this is not a plan"):
        Plan.from_json({"layers": [GOOD | change]})


@pytest.mark.parametrize("data", [None, [], 3, {}, {"layers": 3}, {"layers": [3]}, {"layers": [GOOD, GOOD]}])
def test_data_that_is_not_a_plan_raises_input_error(data: Any) -> None:
    with pytest.raises(InputError, match="this is not a plan"):
        Plan.from_json(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_an_unreadable_plan_file_raises_input_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_is_printed_as_text() -> None:
    assert str(make_plan(SITES[:2], 2)).splitlines() == [
        "plan 2: 2 layers, 0 skipped",
        "  stem         7x7  keeps 49 of 49",
        "  layer1.conv  3x3  keeps 3 of 9",
    ]


def test_a_layer_has_levels_only_if_it_keeps_whole_levels() -> None:
    assert cut_layer("a", (3, 3), ((0, 0), (0, 1), (1, 0))).levels == 2
    assert cut_layer("a", (3, 3), ((0, 0), (0, 1))).levels is None


def test_include_restricts_the_layers_that_follow_a_plan() -> None:
    sites = [LayerInfo(name, "Conv2d", (3, 3), False) for name in ("a", "b", "c")]
    plan = make_plan(sites, {"*": 2})
    for choice in ({"exclude": ["c"]}, {"include": ["a", "b"]}):
        narrowed = make_plan(sites, plan, **choice)
        assert [layer.name for layer in narrowed.layers] == ["a", "b"]
        assert [skip.name for skip in narrowed.skipped] == ["c"]
    sites[2] = LayerInfo("c", "Conv2d", (3, 3), False, skip="it is quantised")
    for choice in ({}, {"exclude": ["a"]}, {"include": ["a", "b"]}):
        with pytest.raises(UsageError, match=r"layer c is skipped \(it is quantised\)"):
            make_plan(sites, plan, **choice)


def test_the_message_for_a_wrong_plan_names_the_layer() -> None:
    layer = {"name": "stem", "kernel_size": [3, 3], "frequencies": [[0, 0]]}
    for change, message in (
        ({"frequencies": [[0, 3]]}, "this is not a plan: layer 'stem': "),
        ({"frequencies": "all"}, "this is not a plan: layer 'stem': space: frequencies"),
        ({"kernel_size": [0]}, "this is not a plan: layer 'stem': kernel size"),
    ):
        with pytest.raises(InputError, match=message):
            Plan.from_json({"layers": [layer | change]})
    del layer["frequencies"]
    with pytest.raises(InputError, match="layer 'stem': 'frequencies' is missing"):
        Plan.from_json({"layers": [layer]})
