"""Import the user's own Python: a file or a module that makes a network or preprocesses images."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import HarmconvertError, InputError, UsageError, first_line, shortened


def import_place(place: str, schemes: Sequence[str]) -> ModuleType:
    """A file or module of the user's, which may import its neighbours, as when python is started beside it.

    Args:
        place: ``FILE.py`` or ``package.module``.
        schemes: of source strings, to name where the place is no such thing.

    Raises:
        UsageError: no such file, or no name of a module; and whatever it raises when imported.
    """
    if not place.endswith(".py"):
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", place):
            raise UsageError(
                f"unknown source {place!r}: use {', '.join(schemes)}:NAME, or MODULE:FACTORY"
                if schemes
                else f"{place!r} is neither FILE.py nor the name of a module"
            )
        with _first_on_path(Path.cwd()):
            return importlib.import_module(place)
    path = Path(place).resolve()
    # A name of its own: dataclasses and pickles look their module up, and the stem may be an installed package's.
    name = f"harmconvert_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(
            f"there is no file {place}"
            + (f": give FILE.py:FACTORY, or one of {', '.join(schemes)}:NAME" if schemes else ": give FILE.py:FUNCTION")
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def functions_in(place: str) -> str:
    """The functions and classes that a file defines, as the end of a message; found without running it."""
    try:
        body = ast.parse(Path(place).read_bytes()).body if place.endswith(".py") else []
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    return f": {shortened([f'{place}:{name}' for name in names])}" if names else ""


def import_function(name: str, schemes: Sequence[str] = ()) -> Callable[..., Any]:
    """A function of the user's, named as ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``.

    Args:
        schemes: of source strings, to name where there is no such module.

    Raises:
        UsageError: there is no such file, module or function. InputError: the file fails when it is imported.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise UsageError(f"{name!r} names no function: give FILE.py:FUNCTION")
    try:
        module = import_place(place, schemes)
    except HarmconvertError:
        raise
    except ModuleNotFoundError as error:
        known = f"; known schemes are {', '.join(schemes)}" if schemes else ""
        raise UsageError(f"cannot import {place}: {first_line(error)}{known}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{place} fails when imported: {type(error).__name__}: {first_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{place} has no function {attribute!r}{functions_in(place)}")
    found: Callable[..., Any] = function
    return found


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
