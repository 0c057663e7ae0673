"""Counts of the inputs and faults that the fault suite tried: one line of a table for each test.

HARMCONVERT_FAULTS=long HARMCONVERT_FAULTS_TABLE=faults.csv python -m pytest tests/faults
python -m tests.faults.tally faults.csv           # the table, in Markdown
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
LONG = os.environ.get("HARMCONVERT_FAULTS") == "long"


def size(sample: T, whole: T) -> T:
    """Return ``sample`` in the fast suite and ``whole`` in the long one."""
    return whole if LONG else sample


@dataclass
class Tally:
    """One line of the table.

    ``lost`` counts targets that were neither the old file nor the complete new one; ``executed`` counts runs of code in
    a file.
    """

    area: str
    what: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    executed: int = 0
    complaints: list[str] = field(default_factory=list)

    def trial(self, complaint: str | None = None, *, lost: bool = False, executed: bool = False) -> None:
        """Count one input or fault; ``complaint`` says what went wrong, None that nothing did."""
        self.tried += 1
        self.survived += complaint is None and not lost and not executed
        self.lost += lost
        self.executed += executed
        if complaint is not None:
            self.complaints.append(complaint)

    def check(self) -> None:
        """Fail if anything went wrong or nothing was tried."""
        assert self.tried, "nothing was tried"
        counts = f"{self.survived} of {self.tried} survived, {self.lost} lost, {self.executed} executed"
        fine = self.survived == self.tried and not self.lost and not self.executed
        assert fine, "\n".join([counts, *self.complaints[:5]])

    def write(self, path: str | Path) -> None:
        """Append the line to a table in a single write, because several processes may do so."""
        values = [str(getattr(self, column)) for column in COLUMNS]
        line = ",".join(f'"{value}"' if "," in value else value for value in values) + "\n"
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line)


COLUMNS = [column.name for column in fields(Tally) if column.name != "complaints"]
Counter = Callable[[str, str], Tally]


def table(rows: list[dict[str, str]], areas: bool = False) -> str:
    """Return the table in Markdown, with lines of one kind (or of one area) grouped, and their sums."""
    merged: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row["area"]):
        counts = merged.setdefault(row["area"] if areas else f"{row['area']}: {row['what']}", [0] * 4)
        for place, column in enumerate(COLUMNS[2:]):
            counts[place] += int(row[column])
    merged["**all**"] = [sum(column) for column in zip(*merged.values(), strict=True)]
    lines = ["| what was tried | inputs and faults | survived | data lost | code executed |", "|---|--:|--:|--:|--:|"]
    return "\n".join(
        [*lines, *(f"| {name} | " + " | ".join(f"{n:,}" for n in row) + " |" for name, row in merged.items())]
    )


if __name__ == "__main__":
    with Path(sys.argv[1]).open(newline="", encoding="utf-8") as file:
        print(table(list(csv.DictReader(file, COLUMNS)), "--areas" in sys.argv))
