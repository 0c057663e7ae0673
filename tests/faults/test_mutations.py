"""The tests detect a wrong line: all mutants of mutations.py, or a sample of them in the fast suite."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from . import mutations
from .mutants import MUTANTS
from .places import NotFoundError, edit
from .tally import LONG, Counter, size

# The mutants whose tests need a second or two.
QUICK = [m for m in MUTANTS if set(m.tests) <= {"test_basis.py", "test_projection.py", "test_plan.py"}]


@pytest.mark.slow
def test_every_mutant_can_be_made() -> None:
    assert [reason for mutant in MUTANTS if (reason := mutations.stale(mutant))] == []
    assert all((mutations.ROOT / "tests" / test).is_file() for mutant in MUTANTS for test in mutant.tests)
    assert all(mutant.old != mutant.new for mutant in MUTANTS)
    assert len(MUTANTS) >= 24


@pytest.mark.slow
def test_every_mutant_makes_a_test_fail(tally: Counter) -> None:
    count = tally("tests", "a line of the mathematics broken")
    if LONG:
        assert mutations.baseline(MUTANTS) is None
    for mutant in size(random.Random(0).sample(QUICK, 2), [*MUTANTS]):
        found = mutations.outcome(mutant)
        complaint = f"{mutant.place}: {mutant.why}: {found.verdict}: {found.by}"
        count.trial(None if found.verdict == "caught" else complaint)


@pytest.mark.slow
def test_a_mutant_without_effect_survives_and_a_missing_expression_is_reported() -> None:
    harmless = replace(MUTANTS[0], new=MUTANTS[0].old)
    assert mutations.outcome(harmless).verdict == "survived"
    gone = replace(MUTANTS[0], old="no_such_name")
    assert mutations.outcome(gone).verdict == "stale"
    assert "has 'no_such_name' 0 times, not once" in mutations.outcome(gone).by


def a_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


FILES = {
    "a/one.py":
        "LIMIT = 3\n\n\ndef twice(x):\n    y = (x +\n         1)  # é\n    return 2*y\n"
        "\n\ndef square(x):\n    return x*x\n",
    "b/two.py":
        "class C:\n    def run(self):\n        def inner():\n            return 2 * y\n        return inner() - 1\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "old", "new", "line"),
    [
        ("a.one.twice", "2 * y", "3 * y", "    return (3 * y)\n"),
        ("a.one.twice", "y = x + 1", "y = x", "    y = x  # é\n"),
        ("a.one.LIMIT", "3", "4", "LIMIT = (4)\n"),
        ("moved.elsewhere.twice", "2 * y", "y", "    return (y)\n"),
        ("b.two.C.run", "inner() - 1", "inner()", "        return (inner())\n"),
        ("b.two.C.run", "return inner() - 1", "pass", "        pass\n"),
        ("a.one.twice", "2 * y", "y if x else 0", "    return (y if x else 0)\n"),
        ("a.one.twice", "inner() - 1", "inner()", "        return (inner())\n"),
        ("a.one.renamed", "inner() - 1", "inner()", "        return (inner())\n"),
        ("moved.C.run.inner", "return 2 * y", "pass", "            pass\n"),
    ],
)
def test_a_place_is_found_by_its_function_and_an_expression(
    tmp_path: Path, place: str, old: str, new: str, line: str
) -> None:
    assert line in edit(a_package(tmp_path, FILES), place, old, new).text()


def test_a_moved_function_is_distinguished_from_another_of_the_same_name_by_the_expression(tmp_path: Path) -> None:
    package = a_package(tmp_path, {**FILES, "c.py": "def twice(x):\n    return x + x\n"})
    assert edit(package, "old.twice", "x + x", "x").path == package / "c.py"
    assert edit(package, "old.twice", "2 * y", "y").path == package / "a" / "one.py"


@pytest.mark.parametrize(
    ("place", "old", "message"),
    [
        ("a.one.twice", "y - 1", "a.one.twice has 'y - 1' 0 times, not once"),
        ("b.two.C.run", "2 * y", "b.two.C.run has '2 * y' 2 times, not once"),
        ("a.one.square", "x", "a.one.square has 'x' 2 times, not once"),
        ("a.one.thrice", "2 * y", "a.one.thrice has '2 * y' 2 times, not once; functions that have it: a.one.twice, b"),
        ("a.one.thrice", "z", "a.one.thrice has 'z' 0 times, not once"),
    ],
)  # fmt: skip
def test_a_missing_place_is_reported(tmp_path: Path, place: str, old: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=re.escape(message)):
        edit(a_package(tmp_path, FILES), place, old, "1")
