from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .tally import Counter, Tally


@pytest.fixture
def tally() -> Iterator[Counter]:
    """Yield a function that creates a line of the table; all lines are checked and written after the test."""
    made: list[Tally] = []

    def make(area: str, what: str) -> Tally:
        made.append(Tally(area, what))
        return made[-1]

    yield make
    if path := os.environ.get("HARMCONVERT_FAULTS_TABLE"):
        for one in made:
            one.write(path)
    for one in made:
        one.check()
