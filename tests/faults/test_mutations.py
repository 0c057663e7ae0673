"""The suite notices a wrong line: mutations.py, a sample of it in the fast suite."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from . import mutations
from .mutants import MUTANTS
from .tally import LONG, Counter, size

# Those whose tests take a second or two.
QUICK = [m for m in MUTANTS if set(m.tests) <= {"test_basis.py", "test_projection.py", "test_plan.py"}]


def test_every_mutant_can_be_made() -> None:
    assert [reason for mutant in MUTANTS if (reason := mutations.stale(mutant))] == []
    assert all((mutations.ROOT / "tests" / test).is_file() for mutant in MUTANTS for test in mutant.tests)
    assert all(mutant.old != mutant.new for mutant in MUTANTS)
    assert len(MUTANTS) >= 24


@pytest.mark.slow
def test_a_mutant_is_noticed(tally: Counter) -> None:
    count = tally("tests", "a line of the mathematics broken")
    if LONG:
        assert mutations.baseline(MUTANTS) is None
    for mutant in size(random.Random(0).sample(QUICK, 2), [*MUTANTS]):
        found = mutations.outcome(mutant)
        complaint = f"{mutant.file}: {mutant.why}: {found.verdict}: {found.by}"
        count.trial(None if found.verdict == "caught" else complaint)


@pytest.mark.slow
def test_one_that_changes_nothing_survives_and_a_text_that_is_gone_is_told() -> None:
    harmless = replace(MUTANTS[0], new=MUTANTS[0].old + "  # as before")
    assert mutations.outcome(harmless).verdict == "survived"
    gone = replace(MUTANTS[0], old="no such line")
    assert mutations.outcome(gone).verdict == "stale"
    assert "has 'no such line' 0 times, not once" in mutations.outcome(gone).by
