"""What reports, figures and comparisons show of coded weights: bits, bytes, and the trade-off of several rates."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmconvert as hc
from harmconvert.codecs import CodecTable, stored_bytes
from harmconvert.data import Batch
from harmconvert.errors import InputError, UsageError
from harmconvert.plan import tensor_bytes
from harmconvert.report import (
    CodedFile,
    Report,
    Tradeoff,
    bits_sheet,
    comparison_of,
    comparison_table,
    page,
    report_of,
    tradeoff,
    tradeoff_table,
    write_figure,
)
from harmconvert.storage import Source
from harmconvert.training import Evaluation, evaluate

from .commands import fails, ok
from .networks import seeded
from .pictures import digit_folders
from .test_coding import IMAGES, Small, bits_of
from .test_figures import same_rows
from .test_report import OWN, Outline, bytes_of_many

LABELS = torch.arange(64).split(16)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reported(conversion: hc.Conversion) -> Report:
    header = hc.save(conversion, "net.safetensors", source=Source("sample", "x"), force=True)
    return report_of(conversion.model, header, "net")


def coded(bits: Any = 3, **more: Any) -> hc.Conversion:
    return hc.convert(seeded(Small), bits=bits, **more)


# --- the data ---


def test_the_bytes_of_each_layer_are_those_of_its_tensors_in_the_file() -> None:
    conversion = coded({"stem": 4, "head": 6})
    report = reported(conversion)
    assert [layer.name for layer in report.coding] == ["stem", "depthwise", "point", "head"]
    stem, depthwise, _, head = report.coding
    entry = conversion.coded["stem.coefficients"]
    assert (stem.weights, stem.coded_bytes) == (16 * 27, stored_bytes(torch.empty(0), entry))
    assert stem.plain_bytes == 16 * 4 + 4 * 16 * 4 + 8, "the bias, and the norm with its counter"
    assert stem.bits == pytest.approx(8 * stem.coded_bytes / 432)
    assert (depthwise.weights, depthwise.bits, depthwise.plain_bytes) == (0, None, 16 * 9 * 4 + 16 * 4)
    assert head.weights == 24 * 5
    total = sum(layer.coded_bytes + layer.plain_bytes for layer in report.coding)
    assert total == tensor_bytes(conversion.model, conversion.coded) == report.form("harmonic").bytes
    assert report.bits == pytest.approx(bits_of(conversion))
    plain = report.to_json()
    assert plain["bits"] == report.bits
    assert plain["coding"][0] == {
        "name": "stem", "weights": 432, "coded_bytes": stem.coded_bytes, "plain_bytes": 328, "bits": stem.bits,
    }  # fmt: skip


def test_tied_weights_count_once_and_low_ranks_are_one_layer() -> None:
    net = seeded(
        lambda: nn.Sequential(*(nn.Conv2d(8, 8, 3, bias=False) for _ in range(3)), nn.Embedding(10, 4, max_norm=1))
    )
    net[2].weight = net[0].weight
    tied = reported(hc.convert(net, bits=4))
    assert [(layer.name, layer.weights, layer.plain_bytes) for layer in tied.coding] == [
        ("0", 8 * 8 * 9, 0), ("1", 8 * 8 * 9, 0), ("3", 0, 160),
    ]  # fmt: skip
    ranked = hc.convert(seeded(Small), bits=4, rank={"point": 4})
    layers = {layer.name: layer for layer in reported(ranked).coding}
    assert layers["point"].weights == 4 * (16 + 24)


def test_a_network_without_coded_weights_has_no_bits() -> None:
    report = reported(hc.convert(seeded(Small), 2))
    assert (report.coding, report.bits) == ((), None)
    assert "Bits and bytes" not in page(report)
    with pytest.raises(InputError, match=r"no weight of net is coded, so there are no bits to draw.*bits=3"):
        bits_sheet(report)


# --- the page and the figure ---


def test_the_page_of_a_coded_network_shows_bits_and_bytes_in_charts_and_in_a_table() -> None:
    report = reported(coded({"stem": 4, "head": 6}))
    text = page(report)
    outline = Outline(text)
    assert "Bits and bytes of each layer" in outline.text["h2"]
    labels = [attributes["aria-label"] or "" for _, attributes in outline.tags if "data-bars" in attributes]
    assert [label.partition(":")[0] for label in labels] == [
        "Bits per coded weight of each layer",
        "Bytes of each layer",
    ]
    for layer in report.coding:
        assert f"{layer.plain_bytes:,}" in outline.text["td"]
    for layer in (report.coding[0], report.coding[3]):
        assert {f"{layer.bits:.2f}", f"{layer.coded_bytes:,}", f"{layer.weights:,}"} <= set(outline.text["td"])
    assert "2 of 4 layers coded, as a table" in outline.text["summary"]
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    charts = json.loads(data)["charts"]
    assert [point[2].partition("\n")[0] for point in charts["bits"]] == ["stem", "head", "depthwise", "point"]
    assert charts["bits"][2][1] == 0, "layers that are not coded are at the upper end"
    assert charts["bytes"][0][2] == (
        f"stem\n432 weights of {report.coding[0].bits:.3g} bits: {report.coding[0].coded_bytes} bytes\n"
        "not coded: 328 bytes"
    )


def test_the_page_of_a_coded_network_does_not_say_that_it_computes_the_same() -> None:
    text = " ".join(page(reported(coded())).split())
    assert "computes the same" not in text
    assert "was converted to a smaller network" in text
    assert "The weights of 4 layers are coded with" in text


def test_the_bits_figure_has_a_row_for_each_layer() -> None:
    conversion = coded()
    drawn = hc.figure(conversion, "bits", "b.svg")
    rows = drawn.rows
    assert [row["layer"] for row in rows] == ["stem", "depthwise", "point", "head"]
    assert sum(row["coded_bytes"] for row in rows) == sum(
        stored_bytes(torch.empty(0), e) for e in conversion.coded.values()
    )
    assert rows[0]["bits"] == pytest.approx(8 * rows[0]["coded_bytes"] / rows[0]["weights"])
    with Path("b.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == [row["layer"] for row in rows]


def test_every_layer_has_a_bar_also_if_it_is_not_coded() -> None:
    bits, sizes = bits_sheet(replace(reported(coded()), coding=bytes_of_many(300))).charts
    assert [(series.look, len(series.points)) for series in bits.series] == [("bars", 200), ("bars", 100), ("line", 2)]
    assert sizes.path(sizes.series[0]).count("M") == 300
    assert sizes.path(sizes.series[0]).startswith("M0.3 1000V")


# --- side by side ---


def test_a_comparison_has_the_bits_of_coded_files_and_a_dash_for_others() -> None:
    one, other = reported(coded()), reported(hc.convert(seeded(Small), 2))
    found = comparison_of([one, other])
    assert found.columns[0].bits == one.bits
    assert [column["bits"] for column in found.to_json()["checkpoints"]] == [one.bits, None]
    cells = [list(column.cells) for column in comparison_table(found).columns]
    row = cells[0].index("bits per coded weight")
    assert [column[row] for column in cells[1:]] == [f"{one.bits:.2f}", "-"]
    assert "bits per coded weight" not in list(comparison_table(comparison_of([other, other])).columns[0].cells)


# --- the trade-off of several rates ---


def measured(labels: bool = True, make: Callable[[], nn.Module] = Small, **more: Any) -> Tradeoff:
    no_label = torch.full((16,), -1)
    batches = [Batch(x, y % 5 if labels else no_label, []) for x, y in zip(IMAGES, LABELS, strict=True)]

    def quality(converted: nn.Module, uncut: nn.Module | None) -> Evaluation:
        return evaluate(converted, batches, uncut)

    return tradeoff(seeded(make), quality, example_input=IMAGES[0][:1], **more)


def test_every_rate_is_coded_once_and_measured() -> None:
    progress: list[tuple[int, int, str]] = []
    found = measured(bits=[2, 5, 2], progress=lambda *what: progress.append(what))
    assert progress == [(0, 3, "uncut"), (1, 3, "5 bits"), (2, 3, "2 bits")]
    assert found.coded
    assert [(point.name, point.calibrated) for point in found.points] == [("5 bits", False), ("2 bits", False)]
    images = torch.cat(IMAGES)
    for point in found.points:
        conversion = coded(point.bits)
        assert point.bytes == conversion.cost.harmonic_bytes
        with torch.no_grad():
            same = (conversion.model(images).argmax(1) == seeded(Small)(images).argmax(1)).double().mean()
        assert point.disagreement == pytest.approx(100 * (1 - float(same)))
    rows = found.rows()
    assert [row["network"] for row in rows] == ["uncut", "5 bits", "2 bits"]
    assert [row["bits"] for row in rows] == [None, 5, 2]
    assert rows[0]["bytes"] == tensor_bytes(seeded(Small))
    assert rows[1]["byte_share"] == rows[1]["bytes"] / rows[0]["bytes"]
    assert "parameters" not in rows[0]


def test_rates_are_calibrated_if_there_are_inputs() -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    found = measured(make=tiny, bits=[3], calibration=IMAGES)
    assert [point.calibrated for point in found.points] == [True]
    (plain,) = measured(make=tiny, bits=[3]).points
    assert found.points[0].divergence < plain.divergence


def test_a_cut_is_kept_by_every_coding() -> None:
    found = measured(bits=[3], lam=hc.convert(seeded(Small), {"stem": 2}).plan)
    assert found.points[0].parameters == found.uncut.parameters - 16 * 3 * 6


@pytest.mark.parametrize("labels", [True, False])
def test_the_point_of_the_file_is_marked(labels: bool) -> None:
    conversion = coded(4)
    header = replace(conversion.header(), history={"calibration": {}})
    given = CodedFile.of(conversion.model, header)
    assert given is not None
    found = measured(labels, bits=[2, 6], coded_file=given)
    assert found.this_file is not None
    assert (found.this_file.name, found.this_file.calibrated) == ("this file", True)
    assert found.this_file.bytes == conversion.cost.harmonic_bytes
    assert found.this_file.bits == pytest.approx(bits_of(conversion))
    last = found.rows()[-1]
    assert (last["network"], last["bytes"], last["calibrated"]) == ("this file", found.this_file.bytes, True)
    assert (last["error"] is None) is not labels
    cells = list(tradeoff_table(found).columns[0].cells)
    assert cells == ["uncut", "6 bits", "2 bits", "this file, calibrated"]
    write_figure(found, Path("a.svg"), Path("a.csv"))
    assert Path("a.svg").stat().st_size > 5000
    assert CodedFile.of(conversion.model, replace(header, codecs=CodecTable())) is None


def test_rates_out_of_range_are_refused_before_any_evaluation() -> None:
    def quality(converted: nn.Module, uncut: nn.Module | None) -> Evaluation:
        pytest.fail("nothing to evaluate")

    with pytest.raises(UsageError, match=r"bits=12 must be above 0 and at most 10 bits per weight"):
        tradeoff(seeded(Small), quality, bits=[2, 12])


def test_the_command_codes_the_source_of_a_checkpoint_and_marks_its_own_point() -> None:
    Path("net.py").write_text(OWN)
    digit_folders(Path("digits"), 2)
    pictures = ["--input-size", "1,12,12", "--mean", "0.13", "--std", "0.3"]
    ok("convert", "net.py:make", "--bits", "3", *pictures, "-o", "a.safetensors")
    run = ["report", "a.safetensors", "--trust-code", "--figure", "tradeoff", "--data-dir", "digits", "--workers", "0"]
    rows = same_rows("a-tradeoff.csv", ok(*run, "--bits", "3,5", "--json").stdout)
    assert [row["network"] for row in rows] == ["uncut", "5 bits", "3 bits", "this file"]
    assert rows[3]["bytes"] == rows[2]["bytes"], "the network of the file was coded in the same way"
    assert rows[3]["divergence"] == pytest.approx(rows[2]["divergence"], abs=1e-6)
    assert rows[1]["divergence"] < rows[2]["divergence"]
    Path("net.py").write_text(OWN.replace("manual_seed(0)", "manual_seed(11)"))
    result = ok(*run, "--bits", "5", "--force")
    assert "note: the uncut network is not known (the weights of net.py:make are not those that were" in result.stderr
    assert "'uncut' means this checkpoint" in result.stderr
    assert re.search(r"^this file .* 0\.00 ", result.stdout, re.MULTILINE)
    fails(2, "--bits 0.0 must be above 0 and at most 10", *run, "--bits", "0", "-o", "b.png")
