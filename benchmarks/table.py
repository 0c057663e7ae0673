"""Append the rows of a result to a table, one by one, so that an interrupted run can be continued."""

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
    """Yield the keys of the rows that the table has, and a function that appends a row and prints it."""
    done: set[tuple[str, ...]] = set()
    is_new = not path.exists()
    if not is_new:
        with path.open() as file:
            done = {tuple(row[key] for key in keys) for row in csv.DictReader(file)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if is_new:
            writer.writeheader()

        def write(row: Row) -> None:
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)

        yield done, write


def processor() -> str:
    """Return the name of the processor, and its instructions for 8 and 16 bits."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name, flags = (
        next(line.split(":")[1] for line in lines if line.startswith(key)) for key in ("model name", "flags")
    )
    known = {"avx512_vnni": "VNNI", "avx512_bf16": "BF16", "amx_tile": "AMX"}
    return ", ".join([name.strip(), *(short for flag, short in known.items() if flag in flags.split())])
