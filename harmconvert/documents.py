"""JSON from files that somebody else may have made: text to values, and values to what was expected.

A *shape* says what is expected: a type, a test of a value, ``None`` for nothing, ``[shape]`` for a list, a dict from
name to shape for a record (other names are let pass, and none has to be there), ``{...: shape}`` for a dict from any
name, a tuple of shapes for any of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import InputError


def parsed(text: str) -> Any:
    """What JSON text holds.

    >>> parsed('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}

    Raises:
        ValueError: it is no JSON, or such as can be read in two ways or not at all: a name twice in one object, halves
            of characters, numbers or nesting beyond what Python takes.
    """
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of characters: some are pairs, others nothing can write
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a character") from error
    return value


def json_text(data: Any) -> str:
    """JSON of what a command or a report tells; NaN and infinity, for which JSON has no word, are null.

    >>> print(json_text({"seconds": float("inf")}))
    {
     "seconds": null
    }
    """
    return json.dumps(_told(data), indent=1, allow_nan=False, default=str)


def _told(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {str(key): _told(value) for key, value in data.items()}
    return [_told(value) for value in data] if isinstance(data, list | tuple) else data


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands in it twice")
    return found


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever is wrong with values that are read becomes an InputError that says of what: InputErrors may be nested.

    >>> with reading("this is not a plan"), reading("layer 'a'"):
    ...     {}["frequencies"]
    Traceback (most recent call last):
    harmconvert.errors.InputError: this is not a plan: layer 'a': 'frequencies' is missing
    """
    try:
        yield
    except KeyError as error:
        raise InputError(f"{what}: {error} is missing") from error
    except ValueError as error:  # as ours are
        raise InputError(f"{what}: {error}") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{what}: {type(error).__name__}: {error}") from error


def number(value: Any) -> bool:
    """A number that a float can hold, NaN and infinity among them."""
    return isinstance(value, float) or (whole(value) and abs(value) < 1 << 1000)


def finite(value: Any) -> bool:
    """A number, neither NaN nor infinite."""
    return number(value) and math.isfinite(value)


def whole(value: Any) -> bool:
    """A whole number, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def count(value: Any) -> bool:
    """A whole number of zero or more, such as 64 bits hold."""
    return whole(value) and 0 <= value < 1 << 63


def pair(value: Any) -> bool:
    """Two finite numbers."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(finite, value))


def plain(value: Any, depth: int = 100) -> bool:
    """What JSON can hold, nested no deeper than any file of ours; dicts have names for keys."""
    if isinstance(value, Mapping | list | tuple) and not depth:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and plain(part, depth - 1) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(plain(part, depth - 1) for part in value)
    return value is None or isinstance(value, str | bool | int | float)


Shape = Any  # type | Callable[[Any], bool] | None | list[Shape] | dict[str, Shape] | tuple[Shape, ...]


def check(value: Any, shape: Shape, where: str) -> None:
    """Raise ValueError, saying where, unless a value is of a shape.

    >>> check({"a": [1, None], "b": ""}, {"a": [(count, None)]}, "it")
    >>> check({"a": [1, "x"]}, {"a": [(count, None)]}, "it")
    Traceback (most recent call last):
        ...
    ValueError: it: a: 1: 'x' should be a count or nothing
    """
    if isinstance(shape, tuple):
        if not any(_fits(value, one) for one in shape):
            deeper = [one for one in shape if isinstance(one, dict | list) and isinstance(value, type(one))]
            for one in deeper:  # says more
                check(value, one, where)
            raise ValueError(f"{where}: {_shown(value)} should be {' or '.join(map(_called, shape))}")
    elif isinstance(shape, dict) and isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: {_shown(key)} is no name")
            if (wanted := shape.get(key, shape.get(...))) is not None or key in shape:
                check(part, wanted, f"{where}: {key}")
    elif isinstance(shape, list) and isinstance(value, list | tuple):
        for index, part in enumerate(value):
            check(part, shape[0], f"{where}: {index}")
    elif not _is(value, shape):
        raise ValueError(f"{where}: {_shown(value)} should be {_called(shape)}")


def _fits(value: Any, shape: Shape) -> bool:
    try:
        check(value, shape, "")
    except ValueError:
        return False
    return True


def _is(value: Any, shape: Shape) -> bool:
    if shape is None or isinstance(shape, dict | list):
        return shape is None and value is None
    if isinstance(shape, type):
        return isinstance(value, shape)
    test: Callable[[Any], bool] = shape
    return test(value)


def _called(shape: Shape) -> str:
    if shape is None:
        return "nothing"
    if isinstance(shape, dict | list):
        return {"dict": "an object", "list": "a list"}[type(shape).__name__]
    return {"str": "text", "bool": "true or false"}.get(shape.__name__, f"a {shape.__name__}")


def _shown(value: Any) -> str:
    """A value in a message: not all of it."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 200:
        return "a number of hundreds of digits"
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
