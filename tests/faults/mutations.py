"""Mutation testing: do the tests detect a wrong line of the mathematics?

    python -m tests.faults.mutations                  # all of mutants.py, about a quarter of an hour
    python -m tests.faults.mutations knapsack ridge   # those with one of the words in place, expression or reason

Each mutant is a copy of the package and its tests in its own folder, with one expression replaced; the working tree is
never changed. The exit code is 1 if a mutant survives its tests, or if its expression is not in its function.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .mutants import MUTANTS, Mutant
from .places import NotFoundError, edit

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # a mutant that never ends counts as detected

# Part of every run: tests that imported another copy of harmconvert than the mutant would detect nothing.
_GUARD = """
import sys
from pathlib import Path

import pytest


def pytest_collection_finish(session):
    own = Path(__file__).parent / "harmconvert"
    files = [Path(m.__file__) for n, m in list(sys.modules.items()) if n.split(".")[0] == "harmconvert" and m.__file__]
    if not files or not all(file.is_relative_to(own) for file in files):
        pytest.exit(f"not the copy was imported: {files[:3]}", returncode=99)
"""


@dataclass(frozen=True)
class Outcome:
    """The result of a mutant: ``caught``, ``survived``, ``stale`` or ``broken``.

    It is stale if its expression is not exactly once in its function, and broken if the tests did not run. ``by`` names
    the first test that failed.
    """

    mutant: Mutant
    verdict: str
    by: str
    seconds: float


def stale(mutant: Mutant, package: Path = ROOT / "harmconvert") -> str | None:
    """Return why a mutant of the current package cannot be made; None if it can."""
    try:
        edited = edit(package, mutant.place, mutant.old, mutant.new)
        ast.parse(edited.text())
    except (NotFoundError, SyntaxError) as error:
        return str(error)
    return None


def outcome(mutant: Mutant) -> Outcome:
    """Make a mutant and run its tests."""
    if reason := stale(mutant):
        return Outcome(mutant, "stale", reason, 0.0)
    start = time.perf_counter()
    code, output = run_tests(mutant.tests, mutant)
    noticed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    verdict = {0: "survived", 1: "caught", 124: "caught"}.get(code, "broken")
    by = " ".join(noticed[:1]) if verdict != "broken" else output[-2000:]
    return Outcome(mutant, verdict, by or "no end", time.perf_counter() - start)


def run_tests(tests: Sequence[str], mutant: Mutant | None) -> tuple[int, str]:
    """Run the tests on a copy of the package with one expression replaced; return their exit code and output."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("harmconvert", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "faults"))
        for file in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / file, folder / file)
        (folder / "copied.py").write_text(_GUARD, encoding="utf-8")
        if mutant is not None:
            edited = edit(folder / "harmconvert", mutant.place, mutant.old, mutant.new)
            edited.path.write_text(edited.text(), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "copied"]
        command += ["-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
        # The mutant's tests must use neither the workers nor the table of the suite that runs this.
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "HARMCONVERT_"))}
        own |= {"PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return 124, ""
        return done.returncode, done.stdout + done.stderr


def baseline(mutants: Sequence[Mutant]) -> str | None:
    """Return what fails without any mutant; None if nothing does."""
    code, output = run_tests(tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests)), None)
    return None if code == 0 else output[-2000:]


def main(words: Sequence[str]) -> int:
    """Try the mutants that contain one of ``words`` (without words: all of them); print the result of each."""
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.place} {m.old} {m.why}" for word in words)]
    if failing := baseline(chosen):
        print(f"the tests fail without any mutant:\n{failing}")
        return 1
    outcomes = []
    for mutant in chosen:
        outcomes.append(outcome(mutant))
        found = outcomes[-1]
        print(f"{found.verdict:9} {found.seconds:5.0f} s  {mutant.place}: {mutant.why}\n{'':19} {found.by}", flush=True)
    caught = sum(found.verdict == "caught" for found in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    return int(caught < len(outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
