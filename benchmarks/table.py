"""The rows of a result, appended as they come: a stop loses nothing, and another run skips what is there."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

Row = Mapping[str, object]


@contextmanager
def appended(
    path: Path, fields: Sequence[str], keys: Sequence[str] = ()
) -> Iterator[tuple[set[tuple[str, ...]], Callable[[Row], None]]]:
    """The keys of the rows that ``path`` has, and a function that writes one more there and prints it."""
    done: set[tuple[str, ...]] = set()
    fresh = not path.exists()
    if not fresh:
        with path.open() as file:
            done = {tuple(row[key] for key in keys) for row in csv.DictReader(file)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if fresh:
            writer.writeheader()

        def write(row: Row) -> None:
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)

        yield done, write
