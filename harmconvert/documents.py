"""Read JSON from files that may come from anybody, and check its values against an expected shape.

A *shape* is one of:

- a type, or a function that tests a value (such as `count`);
- ``None`` for JSON's null;
- ``[shape]`` for a list;
- a dict from key to shape for an object (no key is required; other keys are allowed and not checked);
- ``{...: shape}`` for an object with any keys;
- a tuple of shapes, of which one must fit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import InputError, counted


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}

    Raises:
        ValueError: the text is not JSON, or is ambiguous or unreadable: an object has the same key twice, a string has
            half of a surrogate pair, a number is too long, or the nesting is too deep for Python.
    """
    try:
        value = json.loads(text, object_pairs_hook=_dict_of_distinct_keys)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # surrogates: whole pairs are characters, a half cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it contains half of a surrogate pair") from error
    return value


def json_text(data: Any) -> str:
    """Return JSON for the output of a command or a report; NaN and infinity, which JSON does not have, become null.

    >>> print(json_text({"seconds": float("inf")}))
    {
     "seconds": null
    }
    """
    return json.dumps(_with_null_for_nan(data), indent=1, allow_nan=False, default=str)


def _with_null_for_nan(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): _with_null_for_nan(value) for key, value in data.items()}
    return [_with_null_for_nan(value) for value in data] if isinstance(data, list | tuple) else data


def _dict_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} appears twice in one object")
    return result


@contextmanager
def input_errors(what: str) -> Iterator[None]:
    """Turn errors of code that reads values into an InputError whose message begins with ``what``. May be nested.

    >>> with input_errors("this is not a plan"), input_errors("layer 'a'"):
    ...     {}["frequencies"]
    Traceback (most recent call last):
    harmconvert.errors.InputError: this is not a plan: layer 'a': 'frequencies' is missing
    """
    try:
        yield
    except KeyError as error:
        raise InputError(f"{what}: {error} is missing") from error
    except ValueError as error:  # includes InputError
        raise InputError(f"{what}: {error}") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{what}: {type(error).__name__}: {error}") from error


def number(value: Any) -> bool:
    """Return whether the value is a number that a float can hold, including NaN and infinity."""
    return isinstance(value, float) or (whole(value) and abs(value) < 1 << 1000)


def finite(value: Any) -> bool:
    """Return whether the value is a number and neither NaN nor infinite."""
    return number(value) and math.isfinite(value)


def whole(value: Any) -> bool:
    """Return whether the value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def count(value: Any) -> bool:
    """Return whether the value is a whole number from 0 to 2^63 - 1."""
    return whole(value) and 0 <= value < 1 << 63


def pair(value: Any) -> bool:
    """Return whether the value is a list of two finite numbers."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(finite, value))


def json_value(value: Any, depth: int = 100) -> bool:
    """Return whether JSON can hold the value, with text for keys and nested at most ``depth`` levels deep."""
    if isinstance(value, Mapping | list | tuple) and not depth:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and json_value(part, depth - 1) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(json_value(part, depth - 1) for part in value)
    return value is None or isinstance(value, str | bool | int | float)


Shape = Any  # type | Callable[[Any], bool] | None | list[Shape] | dict[str, Shape] | tuple[Shape, ...]


def check(value: Any, shape: Shape, where: str) -> None:
    """Raise ValueError unless the value has the shape; the message begins with ``where`` and names the wrong part.

    >>> check({"a": [1, None], "b": ""}, {"a": [(count, None)]}, "it")
    >>> check({"a": [1, "x"]}, {"a": [(count, None)]}, "it")
    Traceback (most recent call last):
        ...
    ValueError: it: a: 1: 'x' should be a count or null
    """
    if isinstance(shape, tuple):
        if not any(_fits(value, one) for one in shape):
            same_type = [one for one in shape if isinstance(one, dict | list) and isinstance(value, type(one))]
            for one in same_type:  # this message names the wrong part inside the value
                check(value, one, where)
            raise ValueError(f"{where}: {_value_text(value)} should be {' or '.join(map(_shape_text, shape))}")
    elif isinstance(shape, dict) and isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {_value_text(key)} should be text")
            if (part_shape := shape.get(key, shape.get(...))) is not None or key in shape:
                check(part, part_shape, f"{where}: {key}")
    elif isinstance(shape, list) and isinstance(value, list | tuple):
        for index, part in enumerate(value):
            check(part, shape[0], f"{where}: {index}")
    elif not _fits_one(value, shape):
        raise ValueError(f"{where}: {_value_text(value)} should be {_shape_text(shape)}")


def _fits(value: Any, shape: Shape) -> bool:
    try:
        check(value, shape, "")
    except ValueError:
        return False
    return True


def _fits_one(value: Any, shape: Shape) -> bool:
    if shape is None or isinstance(shape, dict | list):
        return shape is None and value is None
    if isinstance(shape, type):
        return isinstance(value, shape)
    test: Callable[[Any], bool] = shape
    return test(value)


_SHAPE_TEXTS = {
    "str": "text", "bool": "true or false", "whole": "a whole number", "finite": "a finite number",
    "pair": "a pair of numbers", "json_value": "a JSON value",
}  # fmt: skip


def _shape_text(shape: Shape) -> str:
    if shape is None:
        return "null"
    if isinstance(shape, dict | list):
        return {"dict": "an object", "list": "a list"}[type(shape).__name__]
    return _SHAPE_TEXTS.get(shape.__name__) or f"a {shape.__name__.strip('_').replace('_', ' ')}"


def _value_text(value: Any) -> str:
    """Return a short text for a value in a message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 200:
        return "a number of hundreds of digits"
    if isinstance(value, Mapping | list | tuple):
        return f"a {type(value).__name__} of {counted(len(value), 'item')}"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
