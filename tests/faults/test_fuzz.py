"""Readers raise only a HarmconvertError: fuzzing with hypothesis, and the inputs that fuzzing has found before."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import mutating, readers
from .tally import Counter, size

NAMES = list(readers.TARGETS)
# Fuzzing has found no bug in these targets so far.
NOTHING_FOUND = {"source", "weights", "reference", "header"}


@pytest.mark.parametrize("name", NAMES)
def test_valid_documents_are_read(name: str, tmp_path: Path) -> None:
    target = readers.TARGETS[name]
    for seed in target.seeds():
        path = tmp_path / f"file{target.suffix}"
        path.write_bytes(mutating.made(None, target.kind, [seed]))
        target.read(path)


def test_each_folder_of_the_corpus_belongs_to_a_reader() -> None:
    """A folder under another name would never be read."""
    folders = {path.name for path in readers.CORPUS.iterdir()}
    assert folders == {name.replace(" ", "-") for name in NAMES if name not in NOTHING_FOUND}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOTHING_FOUND])
def test_inputs_of_the_corpus_are_refused_or_read(name: str, tally: Counter) -> None:
    kept = readers.corpus(name)
    assert kept, f"no input of {name} is kept in {readers.CORPUS}"
    count = tally("fuzzing", "inputs that found a bug or a path of their own")
    for path in kept:
        found = readers.complaint(readers.TARGETS[name], path.read_bytes())
        count.trial(None if found is None else f"{path.name}: {found}")


@pytest.mark.parametrize("name", NAMES)
def test_mutated_valid_files_are_refused_or_read(name: str, tally: Counter) -> None:
    target = readers.TARGETS[name]
    seeds, count = target.seeds(), tally("fuzzing", "valid files and documents put out of order (hypothesis)")

    @settings(max_examples=size(40, 2000), suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        file = mutating.made(lambda below: data.draw(st.integers(0, below - 1)), target.kind, seeds)
        # Counted and not raised, because hypothesis would run a failing example again to shrink it.
        count.trial(readers.complaint(target, file))

    tried()
