"""Benchmarks: every way to run a network has a row, and the advice names the fastest."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.deploy import Benchmark, BenchmarkSettings, Row, peak_bytes, time_forms
from harmconvert.errors import UsageError

from .commands import converted, fails, ok
from .networks import Branches, random_input, seeded

X = random_input((1, 3, 24, 24))


def test_every_form_layout_batch_and_thread_count_has_a_row() -> None:
    before = torch.get_num_threads()
    model = hc.convert(seeded(Branches), 2, example_input=X).model
    found = time_forms(model, X, BenchmarkSettings(batches=(1, 3), threads=(1, 2), repeats=3))
    assert torch.get_num_threads() == before
    assert len(found.rows) == 4 * (2 + 2 + 1)
    for row in found.rows:
        assert row.seconds > 0
        assert row.examples_per_second == pytest.approx(row.batch / row.seconds)
        assert row.error < 1e-5
    assert set(found.factorings) == {(1, 1), (1, 2), (3, 1), (3, 2)}
    assert len(found.advice()) == 4
    json.dumps(found.to_json(), allow_nan=False)


def test_a_plain_network_has_only_the_dense_form() -> None:
    found = time_forms(seeded(Branches), X, BenchmarkSettings(batches=(2,), repeats=3))
    assert {row.form for row in found.rows} == {"dense"}
    assert found.factorings == {}


def test_a_form_that_does_not_compile_has_a_note_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(network: nn.Module) -> nn.Module:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("no compiler\nand more")

        return Broken()

    monkeypatch.setattr(torch, "compile", refuse)
    found = time_forms(
        seeded(Branches), X, BenchmarkSettings(batches=(1,), layouts=("contiguous",), compiled=True, repeats=3)
    )
    assert [row.compiled for row in found.rows] == [False, True]
    assert found.rows[0].seconds > 0
    assert found.rows[1].seconds is None
    assert found.rows[1].note == "does not compile (RuntimeError: no compiler)"
    assert found.fastest(1, torch.get_num_threads()) == found.rows[0]


def test_the_advice_names_the_fastest_form_and_its_speedup() -> None:
    row = Row("dense", False, "contiguous", 4, 2, 0.3, 0.0, 13.3, None, 0.0)
    rows = (row, replace(row, layout="channels_last", seconds=0.2), replace(row, form="factored", seconds=0.1))
    compiled = replace(row, compiled=True, seconds=0.15)
    [line] = Benchmark((*rows, compiled), {}, {}).advice()
    gain = "2.00 times as fast as the dense form, eager"
    assert line == f"batch 4, 2 threads: deploy the factored form, contiguous, eager: {gain}"
    noisy = (*rows[:2], replace(rows[2], spread=0.66), compiled)
    [line] = Benchmark(noisy, {}, {}).advice()
    assert line.endswith("these times vary by 66% between runs: repeat this on an idle machine before you rely on it")


def test_peak_memory_counts_only_memory_in_use_at_the_same_time() -> None:
    def run() -> None:
        for _ in range(3):
            torch.zeros(64 << 18).add_(1)  # 64 MiB, freed each time

    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not say how much memory was in use at most")
    found = peak_bytes(run, torch.device("cpu"))
    assert found is not None
    assert 50 << 20 < found < 150 << 20


def test_peak_memory_is_unknown_where_the_system_does_not_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_bytes(lambda: runs.append(1), torch.device("cpu")) is None
    assert not runs


@pytest.mark.parametrize(
    ("arguments", "message"), [({"forms": ["slow"]}, "unknown form 'slow'"), ({"layouts": ["x"]}, "unknown layout")]
)
def test_benchmark_refuses_invalid_arguments(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        time_forms(seeded(Branches), X, BenchmarkSettings(**arguments))


@pytest.mark.slow
def test_the_benchmark_command_prints_and_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    converted("a.safetensors", "--lambda", "2")
    text = ok("benchmark", "a.safetensors", "-b", "2", "--repeats", "3", "--layers", "--runtime", "torch").stdout
    assert "deploy the" in text
    assert "it keeps the whole basis" in text
    data = json.loads(ok("benchmark", "a.safetensors", "-b", "2", "--form", "dense", "--repeats", "3", "--json").stdout)
    assert {row["form"] for row in data["rows"]} == {"dense"}
    assert data["machine"]["torch"] == torch.__version__
    fails(2, "does not run on an example input", "benchmark", "a.safetensors", "--input-size", "3,28,28")


class OneAtATime(nn.Module):
    """Accepts only a batch of one example, with a scalar and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *, image: Tensor, scale: Tensor) -> dict[str, Tensor | None]:
        if len(image) > 1:
            raise ValueError("one image at a time")
        return {"map": scale * self.conv(image), "rest": None}


def test_an_unsupported_batch_size_has_a_note() -> None:
    inputs = {"image": X, "scale": torch.tensor(2.0)}
    model = hc.convert(seeded(OneAtATime)).model
    found = time_forms(
        model, inputs, BenchmarkSettings(batches=(1, 2), forms=("dense",), layouts=("contiguous",), repeats=3)
    )
    assert found.rows[0].seconds > 0
    assert (found.rows[1].seconds, found.rows[1].note) == (None, "does not run (ValueError: one image at a time)")
    assert found.advice()[1].endswith(": does not run (ValueError: one image at a time)")
    with pytest.raises(UsageError, match="the network does not run at batch 2, 3: does not run"):
        time_forms(model, inputs, BenchmarkSettings(batches=(2, 3), repeats=3))


def test_an_unsupported_memory_format_has_a_note() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.view(len(y), -1)

    found = time_forms(hc.convert(seeded(Flat)).model, X, BenchmarkSettings(batches=(2,), forms=("dense",), repeats=3))
    assert [bool(row.seconds) for row in found.rows] == [True, False]
    assert found.rows[1].note.startswith("does not run (RuntimeError: view size is not compatible")


@pytest.mark.parametrize("example", [None, "text"])
def test_an_input_without_tensors_is_refused(example: object) -> None:
    with pytest.raises(UsageError, match="give example_input"):
        time_forms(seeded(Branches), example)


def test_networks_in_sixteen_bits_are_timed_in_float32() -> None:
    model = hc.convert(seeded(Branches), 2, example_input=X).model.half()
    found = time_forms(
        model, X, BenchmarkSettings(batches=(1,), forms=("dense", "harmonic"), layouts=("contiguous",), repeats=3)
    )
    assert all(row.error < 2e-2 for row in found.rows)
    assert model.stem.coefficients.dtype == torch.float16
