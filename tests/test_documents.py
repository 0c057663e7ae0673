"""JSON from untrusted files, and the shapes against which it is checked."""

from __future__ import annotations

from typing import Any

import pytest

from harmconvert.documents import check, count, finite, json_value, number, parse_json, whole
from harmconvert.storage import check_history


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, null, NaN]}', '"\\ud83d\\ude00"', '{"a": {"a": 1}}', "[" * 90 + "]" * 90]
)
def test_valid_json_is_parsed(text: str) -> None:
    import json

    assert repr(parse_json(text)) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "'c' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5000, "4300"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\uDFFF": 1}', "half of a surrogate pair"),
    ],
)
def test_ambiguous_or_invalid_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "number_", "finite_", "whole_", "count_"),
    [
        (1, True, True, True, True),
        (0, True, True, True, True),
        (-1, True, True, True, False),
        (2**63, True, True, True, False),
        (10**400, False, False, True, False),
        (1.5, True, True, False, False),
        (float("nan"), True, False, False, False),
        (float("inf"), True, False, False, False),
        (True, False, False, False, False),
        ("1", False, False, False, False),
        (None, False, False, False, False),
    ],
)
def test_kinds_of_numbers_are_distinguished(
    value: Any, number_: bool, finite_: bool, whole_: bool, count_: bool
) -> None:
    assert (number(value), finite(value), whole(value), count(value)) == (number_, finite_, whole_, count_)


def test_values_that_json_can_hold_are_recognised() -> None:
    assert json_value({"a": [1, 2.5, None, True, {"b": ("x",)}]})
    assert not json_value({1: 2})
    assert not json_value([{"a": {1}}])
    assert not json_value(1j)
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert json_value(deep)
    assert not json_value([deep])


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (1, str, "it: 1 should be text"),
        ("x", bool, "it: 'x' should be true or false"),
        ([], {}, "it: a list of 0 items should be an object"),
        ({}, [], "it: a dict of 0 items should be a list"),
        ([1, -2], [count], "it: 1: -2 should be a count"),
        ({"a": None}, {"a": count}, "it: a: None should be a count"),
        ({"a": 1}, {"a": None}, "it: a: 1 should be null"),
        ({"a": {"b": ["x"]}}, {"a": ({"b": [count]}, None)}, "it: a: b: 0: 'x' should be a count"),
        ({"a": {"b": "x"}}, {...: {...: finite}}, "it: a: b: 'x' should be a finite"),
        ({1: 2}, {}, "it: the key 1 should be text"),
        (10**400, (count, None), "it: a number of hundreds of digits should be a count or null"),
        ("x" * 1000, count, "x.... should be a count"),
    ],
)
def test_the_message_for_a_wrong_value_names_its_place(value: Any, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(value, shape, "it")


def test_unknown_and_missing_entries_are_allowed() -> None:
    check({"other": object()}, {"a": count}, "it")
    check({}, {"a": count, "b": [str]}, "it")
    check({"a": None, "b": [[1, 2], []]}, {"a": (count, None), "b": [[count]]}, "it")


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "history: a list of 0 items should be an object"),
        ({"calibration": 3}, "history: calibration: 3 should be an object or null"),
        (
            {"calibration": {"layers": [{"name": "a", "error_before": "0.1"}]}},
            "layers: 0: error_before: '0.1' should be",
        ),
        (
            {"calibration": {"layers": [{"spectrum": [1, 0]}]}},
            "spectrum: a list of 2 items should be a rank spectrum or",
        ),
        ({"calibration": {"changed": {"a": 1}}}, "changed: a: 1 should be text"),
        ({"training": {}}, "history: training: a dict of 0 items should be a list"),
        (
            {"training": [{"stages": [{"name": "cut", "evaluation": {"top1": []}}]}]},
            "evaluation: top1: a list of 0 items should",
        ),
        ({"conversion": {"search": {"frontier": [[1]]}}}, "frontier: 0: a list of 1 item should be a pair"),
    ],
)
def test_a_history_with_wrong_types_is_refused(history: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_history(history)
