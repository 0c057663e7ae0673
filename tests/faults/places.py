"""Find a place in the package by its function and an expression, in whichever file they are, and edit it."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


class NotFoundError(Exception):
    """The function or the expression is missing, or there is more than one; the message says which."""


@dataclass(frozen=True)
class Definition:
    """A function or a constant of the package, with its dotted name from the package's root.

    Examples of names: ``kernels.basis.dct_vectors``, ``layers.block.HarmonicBlock2d.forward``.
    """

    name: str
    path: Path
    node: ast.FunctionDef | ast.Assign


@dataclass(frozen=True)
class Edit:
    """The replacement of the bytes from ``start`` to ``end`` of a file by ``new``."""

    path: Path
    start: int
    end: int
    new: str

    def text(self) -> str:
        """Return the content of the file with the new text."""
        content = self.path.read_bytes()
        return (content[: self.start] + self.new.encode() + content[self.end :]).decode()


def edit(package: Path, place: str, old: str, new: str) -> Edit:
    """Return the edit that replaces ``old``, an expression or a statement, by ``new`` in a function of the package.

    ``place`` is the dotted name of the function. If it has no ``old`` because one of the two has moved, these are
    searched in turn: functions with the same last two parts of the name (a method that moved with its class), functions
    with the same last part, and all functions. ``old`` must occur exactly once in the first group that contains it.
    Syntax trees are compared, so layout, quotes and parentheses do not matter.
    """
    wanted = ast.dump(_parsed(old))
    found: list[tuple[Definition, ast.expr | ast.stmt]] = []
    for candidates in _candidates(package, place):
        if found := [(d, node) for d in candidates for node in _nodes(d.node) if ast.dump(node) == wanted]:
            break
    if len(found) != 1:
        there = ", ".join(sorted({definition.name for definition, _ in found})) or "none"
        raise NotFoundError(f"{place} has {old!r} {len(found)} times, not once; functions that have it: {there}")
    return _edit(*found[0], new)


def _candidates(package: Path, place: str) -> Iterator[list[Definition]]:
    """Yield groups of definitions to search, the most similar names first."""
    parts = place.split(".")
    for shared in (len(parts), 2, 1):
        yield [d for d in _definitions(package) if d.name.split(".")[-shared:] == parts[-shared:]]
    yield _definitions(package)


@cache
def _definitions(package: Path) -> list[Definition]:
    found = []
    for path in sorted(package.rglob("*.py")):
        module = [part for part in path.relative_to(package).with_suffix("").parts if part != "__init__"]
        found += [Definition(".".join(module + names), path, node) for names, node in _named(_module(path), [])]
    return found


def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _named(node: ast.AST, outer: list[str]) -> Iterator[tuple[list[str], ast.FunctionDef | ast.Assign]]:
    for child in ast.iter_child_nodes(node):
        names = [*outer, child.name] if isinstance(child, ast.FunctionDef | ast.ClassDef) else outer
        if isinstance(child, ast.FunctionDef):
            yield names, child
        elif isinstance(child, ast.Assign) and isinstance(node, ast.Module):
            yield from (([target.id], child) for target in child.targets if isinstance(target, ast.Name))
        yield from _named(child, names)


def _nodes(definition: ast.FunctionDef | ast.Assign) -> Iterator[ast.expr | ast.stmt]:
    """Yield the expressions and statements of a definition, except those of inner functions, which have own names."""
    ahead: list[ast.AST] = [definition]
    while ahead:
        node = ahead.pop()
        if isinstance(node, ast.expr | ast.stmt) and not isinstance(node, ast.Expr):
            yield node
        ahead += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.FunctionDef)]


def _parsed(text: str) -> ast.expr | ast.stmt:
    (statement,) = ast.parse(text).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _edit(definition: Definition, node: ast.expr | ast.stmt, new: str) -> Edit:
    lines = definition.path.read_bytes().splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    if isinstance(_parsed(new), ast.expr):
        return Edit(definition.path, start, end, f"({new})")
    return Edit(definition.path, start, end, textwrap.indent(new, " " * node.col_offset).lstrip())
