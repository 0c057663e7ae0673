"""Import the user's own Python code: a file or module that builds a network or preprocesses images."""

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
    """Import a file or module of the user's. It can import its neighbours, as if python was started in its folder.

    Args:
        place: ``FILE.py`` or ``package.module``.
        schemes: schemes of source strings, which the error message lists.

    Raises:
        UsageError: there is no such file, or ``place`` is not the name of a module.
        Exception: any error of the user's code while it is imported.
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
    # A unique module name: dataclasses and pickle look modules up by name, and an installed package may have the
    # name of the file.
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
    """Return the functions and classes that a file defines, as the end of a message; the file is not executed."""
    try:
        body = ast.parse(Path(place).read_bytes()).body if place.endswith(".py") else []
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        body = []
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
    return f": {shortened([f'{place}:{name}' for name in names])}" if names else ""


def import_function(name: str, schemes: Sequence[str] = ()) -> Callable[..., Any]:
    """Import a function of the user's, named ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``.

    Args:
        schemes: schemes of source strings, which the error message lists if there is no such module.

    Raises:
        UsageError: there is no such file, module or function.
        InputError: the file raises an error when it is imported.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        raise UsageError(f"{name!r} names no function: give FILE.py:FUNCTION")
    try:
        module = import_place(place, schemes)
    except HarmconvertError:
        raise
    except ModuleNotFoundError as error:
        schemes_text = f"; known schemes are {', '.join(schemes)}" if schemes else ""
        raise UsageError(f"cannot import {place}: {first_line(error)}{schemes_text}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{place} fails when imported: {type(error).__name__}: {first_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"{place} has no function {attribute!r}{functions_in(place)}")
    typed_function: Callable[..., Any] = function
    return typed_function


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
