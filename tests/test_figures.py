"""Figures: their numbers equal slow calculations, their images are valid, the command has the right exit codes."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from harmconvert import save
from harmconvert.arguments import check_figure
from harmconvert.calibration import CalibrationSettings
from harmconvert.data import Batch
from harmconvert.errors import InputError, OutsideError, UsageError
from harmconvert.kernels import Basis
from harmconvert.layers import to_block, to_harmonic
from harmconvert.pipeline import convert
from harmconvert.plan import Cost
from harmconvert.report import (
    Point,
    Report,
    Sheet,
    Spectrum,
    Strip,
    Tradeoff,
    bits_sheet,
    drawing,
    error_sheet,
    figures,
    filter_bank,
    layer_strip,
    ranks_sheet,
    report_of,
    search_sheet,
    spectrum,
    tradeoff,
    tradeoff_table,
    training_sheet,
    write_figure,
)
from harmconvert.search import SearchSettings
from harmconvert.training import Evaluation, evaluate

from . import oracle, test_report
from .commands import SAMPLE, converted, fails, ok
from .networks import CONVOLUTIONS, Branches, seeded
from .pictures import digit_folders


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- spectrum: numbers ---

SMALL = ["plain", "grouped", "depthwise", "1x7", "2x2", "Conv3d", "ConvTranspose2d", "StdConv2d"]


@pytest.mark.parametrize("name", SMALL)
def test_magnitudes_are_the_mean_of_absolute_inner_products(name: str) -> None:
    conv = seeded(CONVOLUTIONS[name][0])
    (layer,) = spectrum(conv).layers
    kernels = conv.weight.detach().double().numpy()
    size = kernels.shape[2:]
    expected = oracle.mean_magnitudes(kernels, oracle.frequencies(size, sum(size) - len(size) + 1))
    assert layer.magnitudes == pytest.approx(expected, rel=1e-6)
    assert layer.relative == pytest.approx([value / max(expected) for value in expected], rel=1e-6)
    assert layer.kernel_size == size
    assert all(layer.kept)


@pytest.mark.parametrize("normalization", ["ortho", "l1"])
def test_the_spectrum_of_a_harmonic_convolution_shows_its_kept_frequencies(normalization: str) -> None:
    """Magnitudes refer to orthonormal filters, independent of the basis of the coefficients."""
    conv = seeded(lambda: nn.Conv2d(3, 4, 3))
    kept = oracle.frequencies((3, 3), 2)
    (plain,) = spectrum(conv).layers
    (cut,) = spectrum(to_harmonic(conv, kept, Basis("dct", normalization))).layers
    assert cut.kept == (True,) * 3 + (False,) * 6
    assert cut.magnitudes[:3] == pytest.approx(plain.magnitudes[:3], rel=1e-5)
    assert cut.magnitudes[3:] == (0.0,) * 6
    assert max(cut.relative) == 1


def test_the_spectrum_of_a_block_shows_its_1x1_weights() -> None:
    conv = seeded(lambda: nn.Conv2d(2, 5, 3))
    block = nn.Sequential(to_block(conv))
    (layer,) = spectrum(block).layers
    assert layer.name == "0"
    assert layer.magnitudes == pytest.approx(spectrum(conv).layers[0].magnitudes, rel=1e-5)


def test_layers_are_in_the_order_of_the_network_and_panels_grouped_by_kernel_size() -> None:
    found = spectrum(seeded(Branches))
    names = ["stem", "shared", "tied_a", "tied_b", "deep.odd name [x]", "unused"]
    assert [layer.name for layer in found.layers] == names
    assert {size: len(layers) for size, layers in found.panels.items()} == {(3, 3): 5, (5, 5): 1}
    assert [layer.name for layer in spectrum(seeded(Branches), (5,)).layers] == ["unused"]
    rows = found.rows()
    assert len(rows) == 5 * 9 + 25
    assert rows[1] == {
        "layer": "stem",
        "kernel": "3x3",
        "frequency": "(0, 1)",
        "level": 1,
        "kept": True,
        "mean_abs": found.layers[0].magnitudes[1],
        "relative": found.layers[0].relative[1],
    }


def test_layers_that_a_spectrum_leaves_out_are_listed() -> None:
    from timm.layers.cond_conv2d import CondConv2d

    net = nn.Sequential(nn.Conv2d(3, 4, 3), CondConv2d(4, 4, 3, num_experts=2))
    found = spectrum(net)
    assert [layer.name for layer in found.layers] == ["0"]
    assert [(skip.name, skip.why) for skip in found.skipped] == [("1", "its kernels are computed anew for each input")]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Conv2d(3, 4, 1), InputError, "has no convolution over 1x1: there is nothing to draw"),
        (lambda: nn.Conv2d(3, 4, 3, device="meta"), InputError, r"layer \(root\) is on the meta device"),
        (lambda: _spoilt(), InputError, "weight holds NaN"),
        (lambda: nn.DataParallel(nn.Conv2d(3, 4, 3)), UsageError, "wrapped in DataParallel"),
    ],
)
def test_networks_without_a_spectrum_are_refused(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        spectrum(make())


def _spoilt() -> nn.Module:
    conv = nn.Conv2d(1, 1, 3)
    conv.weight.data[0] = float("nan")
    return conv


def test_a_layer_of_zeros_has_a_spectrum_of_zeros() -> None:
    conv = nn.Conv2d(1, 1, 3)
    nn.init.zeros_(conv.weight)
    assert spectrum(conv).layers[0].relative == (0.0,) * 9


# --- filters: numbers ---


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4,)])
def test_filters_are_those_of_eq_1(size: tuple[int, ...]) -> None:
    conv = nn.Conv1d(1, 1, size) if len(size) == 1 else nn.Conv2d(1, 1, size)
    bank = filter_bank(conv)
    levels = sum(size) - len(size) + 1
    assert [one.frequency for one in bank.filters] == oracle.frequencies(size, levels)
    for one in bank.filters:
        np.testing.assert_allclose(np.reshape(one.values, size), oracle.dct_kernel(size, one.frequency), atol=1e-12)
    assert bank.lambdas == tuple((lam, len(oracle.frequencies(size, lam))) for lam in range(1, levels + 1))
    row = bank.rows()[-1]
    for position in itertools.product(*map(range, size)):
        value = oracle.dct_kernel(size, bank.filters[-1].frequency)[position]
        assert row["value_" + "_".join(map(str, position))] == pytest.approx(value, abs=1e-12)


def test_filters_of_the_most_common_kernel_size_are_the_default() -> None:
    net = seeded(Branches)
    assert (filter_bank(net).kernel_size, filter_bank(net).layers) == ((3, 3), 5)
    assert filter_bank(net, (5, 5)).kernel_size == (5, 5)
    assert filter_bank(net, (5,)).layers == 1
    with pytest.raises(UsageError, match=r"no layer has a kernel of 7x7 \(there are: 3x3, 5x5\)"):
        filter_bank(net, (7, 7))
    with pytest.raises(
        UsageError, match="filters of 3x2x3 have more than two axes and cannot be drawn: use kind=spectrum"
    ):
        filter_bank(seeded(CONVOLUTIONS["Conv3d"][0]))


def test_a_filter_bank_counts_the_layers_that_keep_each_filter() -> None:
    net = nn.Sequential(*(nn.Conv2d(2, 2, 3) for _ in range(4)))
    assert filter_bank(net).cuts == ()
    assert all(one.kept_by == 4 for one in filter_bank(net).filters)
    cut = convert(net, {"1": 2, "2": 2}).model
    bank = filter_bank(cut)
    assert bank.cuts == ((2, 2), (5, 2))
    assert [one.kept_by for one in bank.filters] == [4, 4, 4, 2, 2, 2, 2, 2, 2]
    odd = nn.Sequential(to_harmonic(nn.Conv2d(2, 2, 3), [(0, 0), (1, 1), (2, 2)]), nn.Conv2d(2, 2, 3))
    assert filter_bank(odd).cuts == ((None, 1), (5, 1))


# --- trade-off: numbers ---


class Small(nn.Module):
    """A classifier of 8x8 images with six classes, whose sizes can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.middle = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.last = nn.Conv2d(4, 6, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.stem(x).relu()).relu()).mean((2, 3))


IMAGES = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(60) % 6


def small_tradeoff(labels: torch.Tensor = LABELS, **more: Any) -> Tradeoff:
    net = seeded(Small)

    def worth(converted: nn.Module, uncut: nn.Module | None) -> Evaluation:
        return evaluate(converted, [Batch(IMAGES, labels, [])], uncut)

    return tradeoff(net, worth, example_input=IMAGES[:1], **more)


def test_every_point_of_a_tradeoff_is_measured_on_the_converted_network() -> None:
    found = small_tradeoff()
    uncut = seeded(Small)
    whole = 9 * (1 * 4 + 4 * 4 + 4 * 6)
    assert (found.uncut.parameters, found.uncut.parameter_share) == (whole, 1)
    # progressive: middle and last have the smallest maps (lambda 2); the input layer has the next and stays whole.
    sizes = {"full": whole, "3": 36 + 6 * 40, "progressive, 2": 36 + 3 * 40, "1": 36 + 1 * 40}
    assert {", ".join(point.lambdas): point.parameters for point in found.points} == sizes
    with torch.no_grad():
        before = uncut(IMAGES).double().numpy()
    for point in found.points:
        lam = point.lambdas[-1]
        model = convert(uncut, lam if lam == "full" else int(lam), example_input=IMAGES[:1]).model
        with torch.no_grad():
            logits = model(IMAGES).double().numpy()
        wrong = sum(int(row.argmax()) != int(label) for row, label in zip(logits, LABELS, strict=True))
        other = sum(int(a.argmax()) != int(b.argmax()) for a, b in zip(logits, before, strict=True))
        assert point.error == pytest.approx(100 * wrong / 60)
        assert point.disagreement == pytest.approx(100 * other / 60)
        assert point.divergence == pytest.approx(oracle.softened_kl(logits, before, 1), abs=1e-9)
        for value, interval in ((wrong, point.error_interval), (other, point.disagreement_interval)):
            assert interval == pytest.approx([100 * bound for bound in oracle.wilson(value, 60)], abs=1e-6)
    assert found.points[0].mac_share == 1
    shares = [point.mac_share for point in found.points[1:] if point.mac_share is not None]
    assert len(shares) == len(sizes) - 1
    assert shares == sorted(set(shares), reverse=True)
    assert found.uncut.disagreement_interval == (0, 0)


def test_calibrated_and_plain_cuts_are_both_shown() -> None:
    found = small_tradeoff(calibration=[IMAGES])
    assert [point.calibrated for point in found.points] == [False, False, True, False, True, False, True]
    for plain, calibrated in itertools.pairwise(found.points[1:]):
        if calibrated.calibrated:
            assert plain.lambdas == calibrated.lambdas
            assert plain.parameters == calibrated.parameters
            assert calibrated.divergence <= plain.divergence
    assert [row["lambda"] for row in found.rows()][:2] == ["uncut", "full"]


def test_without_labels_the_tradeoff_has_no_error_rates() -> None:
    found = small_tradeoff(torch.full((60,), -1))
    assert not found.labelled
    assert {row["error"] for row in found.rows()} == {None}
    assert "top-1 error" not in str([column.header for column in tradeoff_table(found).columns])


def test_the_tradeoff_reports_its_progress() -> None:
    told: list[Any] = []
    small_tradeoff(progress=lambda *what: told.append(what), include=["last"])
    assert told[:2] == [(0, 5, "uncut"), (1, 5, "lambda full")]
    assert told[-1] == (4, 5, "lambda 1")


def test_a_tradeoff_of_a_network_that_cannot_be_truncated_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten())
    with pytest.raises(
        InputError, match=r"no lambda cuts a layer of this network: 0 \(.*1 \(depthwise.*include=PATTERN"
    ):
        tradeoff(net, lambda model, uncut: pytest.fail("nothing to evaluate"), example_input=torch.zeros(1, 3, 8, 8))


# --- the page's charts: numbers ---


def calibrated_and_trained() -> Report:
    """Return the report of a network that was calibrated and then trained in two runs of two epochs."""
    history = {"training": [test_report.training(), test_report.training()]}
    settings = CalibrationSettings(0.1, seed=7)
    return test_report.made(
        test_report.small(), 2, history, calibration=[torch.randn(40, 1, 16, 16)], settings=settings,
    )  # fmt: skip


def test_the_error_chart_has_the_errors_of_the_report() -> None:
    report = calibrated_and_trained()
    sheet = error_sheet(report)
    assert [chart.name for chart in sheet.charts] == ["kernels", "outputs"]
    assert sheet.names == ("0", "2", "3")
    assert [(row["number"], row["layer"]) for row in sheet.rows()] == [(2, "2"), (3, "3")]
    for row, layer in zip(sheet.rows(), report.cut, strict=True):
        assert row["kernel_error"] == layer.kernel_error
        assert (row["output_error_before"], row["output_error_after"]) == (
            layer.output_error_before, layer.output_error_after,
        )  # fmt: skip
        assert row["decision"] in ("refit", "kept")
    plain = error_sheet(test_report.made(test_report.small(), 2))
    assert [chart.name for chart in plain.charts] == ["kernels"]
    assert plain.rows()[0]["output_error_after"] is None


def test_the_training_chart_counts_epochs_over_all_runs() -> None:
    rows = training_sheet(calibrated_and_trained()).rows()
    assert [(row["epoch"], row["run"], row["loss"]) for row in rows] == [(1, 1, 1), (2, 1, 0.5), (3, 2, 1), (4, 2, 0.5)]
    assert {row["test_top1"] for row in rows} == {0.95}


def test_the_layer_strip_has_every_layer() -> None:
    found = test_report.made(test_report.small(), 2, exclude=["3"])
    rows = layer_strip(found).rows()
    assert [(row["layer"], row["kernel"], row["kept"], row["total"], row["share"]) for row in rows] == [
        ("0", "3x3", 9, 9, 1.0), ("2", "5x5", 10, 25, 0.4), ("3", "3x3", 0, 9, 1.0),
    ]  # fmt: skip
    assert (rows[1]["parameters"], rows[1]["kept_parameters"]) == (400, 160)
    assert rows[2]["why"]


@pytest.mark.parametrize(
    ("make", "lam", "message"),
    [
        (error_sheet, "full", "no layer is cut in net: there are no errors to draw"),
        (training_sheet, 2, "net records no epochs of training: harmconvert finetune trains a checkpoint"),
    ],
)
def test_steps_that_were_not_done_have_no_chart(make: Callable[[Report], Any], lam: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(test_report.made(test_report.small(), lam))


def test_errors_that_were_not_recorded_have_no_chart() -> None:
    conversion = convert(test_report.small(), 2)
    report = report_of(conversion.model, save(conversion.model, "bare.safetensors"), "bare")
    with pytest.raises(InputError, match="bare does not record the errors of its cut"):
        error_sheet(report)
    with pytest.raises(InputError, match="there are no layers to draw"):
        layer_strip(replace(report, layers=()))


def searched() -> Sheet:
    conversion = convert(
        test_report.small(), budget={"params": 0.6}, example_input=torch.zeros(1, 1, 16, 16), search=SearchSettings(4)
    )
    assert conversion.search is not None
    return search_sheet(conversion.search)


def strip_of(count: int) -> Strip:
    """Return a strip of ``count`` layers with every appearance: truncated, whole, skipped."""
    layers = layer_strip(test_report.made(test_report.small(), 2, exclude=["3"])).layers
    return Strip(tuple(layers[number % 3] for number in range(count)))


# --- images ---


class Hostile(nn.Module):
    """A network whose layer names contain markup, mathematics and control characters."""

    def __init__(self) -> None:
        super().__init__()
        names = ("<script>alert(1)</script>", "$x_1^2$", "100%_\\frac", "--><b>&amp;", "\u6f22\n\x07", "n" * 200)
        self.layers = nn.ModuleDict({name: nn.Conv2d(1, 1, 3) for name in names})


def deep() -> Spectrum:
    return spectrum(nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(300))))


def worth_of(top1: float, agreement: float | None, kl: float | None) -> Evaluation:
    return Evaluation(1000, 1000, top1, None, None, agreement, kl, 1.0)


def even_tradeoff() -> Tradeoff:
    """Return a trade-off whose errors have the same order of magnitude, so that the axis is linear."""
    cost = Cost(5_000_000_000, 2_000_000_000, 0, 0, 0, 0)
    uncut = Point((), False, cost, worth_of(0.76, None, None))
    return Tradeoff(uncut, (Point(("full",), False, cost, worth_of(0.7, 0.9, 0.1)),))


DRAWN: dict[str, Callable[[], Any]] = {
    "filters": lambda: filter_bank(nn.Conv2d(1, 1, 3)),
    "filters, cut": lambda: filter_bank(convert(nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(2))), 2).model),
    "filters, one axis": lambda: filter_bank(nn.Conv1d(1, 1, 40)),
    "filters, a column": lambda: filter_bank(nn.Conv2d(1, 1, (7, 1))),
    "filters, large": lambda: filter_bank(nn.Conv2d(1, 1, 14)),
    "spectrum": lambda: spectrum(seeded(Branches)),
    "spectrum, 256 frequencies": lambda: spectrum(nn.Conv2d(1, 1, 16)),
    "spectrum, cut": lambda: spectrum(convert(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)), 2).model),
    "spectrum, 300 layers": deep,
    "spectrum, hostile": lambda: spectrum(Hostile()),
    "errors": lambda: error_sheet(calibrated_and_trained()),
    "errors, 1000 layers": lambda: error_sheet(test_report.deep()),
    "errors, hostile": lambda: error_sheet(test_report.hostile()),
    "training": lambda: training_sheet(calibrated_and_trained()),
    "bits": lambda: bits_sheet(test_report.coded(5)),
    "bits, 300 layers": lambda: bits_sheet(test_report.coded(300)),
    "ranks": lambda: ranks_sheet(test_report.ranked(3)),
    "ranks, 300 layers": lambda: ranks_sheet(test_report.ranked(300)),
    "layers": lambda: strip_of(3),
    "layers, 64": lambda: strip_of(64),
    "layers, 1000": lambda: strip_of(1000),
    "layers, hostile": lambda: layer_strip(test_report.hostile()),
    "search": searched,
    "trade-off": lambda: small_tradeoff(calibration=[IMAGES]),
    "trade-off, no labels": lambda: small_tradeoff(torch.full((60,), -1)),
    "trade-off, linear": even_tradeoff,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "errors, 1000 layers")) for name in DRAWN]
)
def test_image_files_are_valid_and_have_a_readable_size(name: str) -> None:
    found = DRAWN[name]()
    write_figure(found, Path("a.png"), Path("a.csv"))
    with Image.open("a.png") as image:
        image.load()
        width, height = image.size
        assert not image.info.keys() & {"Software", "Creation Time"}
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, "an empty page"
    assert 400 <= width <= 2400
    assert 200 <= height <= 6500


@pytest.mark.parametrize(
    "name",
    ["filters, cut", "spectrum, hostile", "trade-off, linear", "errors", "layers",
     pytest.param("bits", marks=pytest.mark.slow), pytest.param("ranks", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_same_numbers_give_the_same_bytes(name: str) -> None:
    for suffix in (".png", ".svg"):
        figures.save(figures.draw(DRAWN[name]()), Path(f"a{suffix}"), suffix)
        with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "figure.facecolor": "red"}):
            torch.manual_seed(0)
            found = DRAWN[name]()
            figures.save(figures.draw(found), Path(f"b{suffix}"), suffix)
            assert matplotlib.rcParams["font.size"] == 30, "the user's settings are put back"
        torch.manual_seed(0)
        figures.save(figures.draw(DRAWN[name]()), Path(f"a{suffix}"), suffix)
        assert Path(f"a{suffix}").read_bytes() == Path(f"b{suffix}").read_bytes()


def test_names_of_layers_are_not_interpreted_as_markup() -> None:
    write_figure(spectrum(Hostile()), Path("a.svg"), Path("a.csv"))
    root = ElementTree.parse("a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    tags = {element.tag.rpartition("}")[2] for element in root.iter() if isinstance(element.tag, str)}
    assert tags.isdisjoint({"script", "b", "foreignObject", "a"})
    assert "date" not in tags
    text = Path("a.svg").read_text()
    assert "<script" not in text
    assert "$x_1^2$" in text, "drawn letter by letter, not as mathematics"
    with Path("a.csv").open(newline="", encoding="utf-8") as file:
        assert {row["layer"] for row in csv.DictReader(file)} == {f"layers.{name}" for name in Hostile().layers}


def test_a_missing_matplotlib_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("harmconvert.report.figures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutsideError, match=r"drawn by matplotlib: pip install 'harmconvert\[report\]'"):
        drawing()
    fails(4, "pip install 'harmconvert[report]'", "report", SAMPLE, "--figure", "filters")
    # The rest of the package does not need matplotlib.
    monkeypatch.delitem(sys.modules, "harmconvert.report.tables")
    importlib.import_module("harmconvert.report.tables")


# --- where they go ---


def test_outputs_are_named_and_existing_files_are_kept() -> None:
    assert check_figure("timm:resnet50", "spectrum", None, False) == (
        Path("resnet50-spectrum.png"),
        Path("resnet50-spectrum.csv"),
    )
    assert check_figure("x", "filters", "A.SVG", False)[1] == Path("A.csv")
    with pytest.raises(UsageError, match=r"a.pdf should end in .png or .svg"):
        check_figure("x", "filters", "a.pdf", False)
    Path("a.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"a.csv exists: use force=True to replace it"):
        check_figure("x", "filters", "a.png", False)
    write_figure(filter_bank(nn.Conv2d(1, 1, 3)), Path("a.PNG"), Path("a.csv"), force=True)
    assert sorted(path.name for path in Path().iterdir()) == ["a.PNG", "a.csv"]


# --- the command ---


def same_rows(path: str, document: str) -> list[dict[str, Any]]:
    """Return the rows of a command's JSON output; they must equal those of the .csv file."""
    found = json.loads(document)
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert found["numbers"] == path
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in found["rows"]]
    assert rows == expected
    return found["rows"]


def test_filters_and_spectrum_of_a_truncated_network_are_drawn() -> None:
    converted("cut.safetensors", "--lambda", "progressive")
    result = ok("report", "cut.safetensors", "--figure", "filters", "--json")
    rows = same_rows("cut-filters.csv", result.stdout)
    assert [row["kept_by"] for row in rows] == [19, 19, 19, 13, 13, 13, 7, 7, 7]
    assert json.loads(result.stdout)["output"] == "cut-filters.png"
    assert json.loads(result.stdout)["source"] == SAMPLE
    result = ok("report", "cut.safetensors", "--figure", "spectrum", "-o", "s.svg", "--json")
    rows = same_rows("s.csv", result.stdout)
    assert sum(not row["kept"] for row in rows) == 6 * 3 + 6 * 6
    again = ok("report", "cut.safetensors", "--figure", "spectrum", "-o", "s.svg", "--force")
    assert again.stdout == "wrote s.svg and s.csv\n"
    assert ElementTree.parse("s.svg").getroot().tag.endswith("svg")


def test_filters_are_drawn_without_downloading_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of resnet50 would have to be downloaded."""
    ok("report", "resnet50", "--figure", "filters", "--kernel-size", "7x7", "-o", "a.png")
    with Path("a.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 49


@pytest.mark.slow
def test_the_tradeoff_is_drawn_on_labelled_digits() -> None:
    digit_folders(Path("digits"), 2)
    data = ["--data-dir", "digits", "--workers", "0", "--include", "stage3.1.*"]
    calibrated = ["--calibrate", "sample:mnist5k", "--calibration-images", "16"]
    result = ok("report", SAMPLE, "--figure", "tradeoff", *data, *calibrated, "--json")
    rows = same_rows("resnet_mnist5k-tradeoff.csv", result.stdout)
    # Layers that are not included stay plain; progressive and lambda 2 truncate the two smallest maps equally.
    assert [(row["lambda"], row["calibrated"]) for row in rows] == [
        ("uncut", False), ("full", False), ("3", False), ("3", True), ("progressive, 2", False),
        ("progressive, 2", True), ("1", False), ("1", True),
    ]  # fmt: skip
    assert rows[0]["parameters"] == 271994
    assert rows[2]["parameters"] == 271994 - 2 * 64 * 64 * 3
    assert {row["images"] for row in rows} == {20}
    assert rows[0]["error"] == 0
    assert rows[1]["disagreement"] == 0
    assert rows[7]["divergence"] < rows[6]["divergence"]
    assert all(math.isfinite(row["error_high"]) for row in rows)
    assert "calibrating on 16 images of sample:mnist5k" in result.stderr


def test_the_tradeoff_is_printed_as_a_table_that_explains_uncut() -> None:
    digit_folders(Path("digits"), 1)
    converted("cut.safetensors", "--lambda", "3")
    run = ["--figure", "tradeoff", "--data-dir", "digits", "--workers", "0", "--include", "stage3.2.*"]
    result = ok("report", "cut.safetensors", *run)
    assert "note: this checkpoint is cut already; here 'uncut' means this checkpoint" in result.stderr
    assert "other than uncut" in result.stdout
    assert result.stdout.splitlines()[1].startswith("uncut")
    assert result.stdout.splitlines()[-1] == "wrote cut-tradeoff.png and cut-tradeoff.csv"


@pytest.mark.slow
def test_the_report_command_draws_the_charts_of_the_page() -> None:
    calibrated = ["--calibrate", "sample:mnist5k", "--calibration-images", "40"]
    ok("convert", SAMPLE, "--lambda", "stage3.2.*=2", *calibrated, "-o", "cut.safetensors")
    result = ok("report", "cut.safetensors", "--figure", "errors", "--json")
    rows = same_rows("cut-errors.csv", result.stdout)
    assert [row["layer"] for row in rows] == ["stage3.2.conv1", "stage3.2.conv2"]
    assert all(row["output_error_after"] <= row["output_error_before"] for row in rows)
    assert json.loads(result.stdout)["source"] == SAMPLE
    rows = same_rows("l.csv", ok("report", "cut.safetensors", "--figure", "layers", "-o", "l.svg", "--json").stdout)
    assert [row["kept"] for row in rows] == [9] * 17 + [3, 3]
    assert ElementTree.parse("l.svg").getroot().tag.endswith("svg")
    fails(
        3,
        "cut records no epochs of training: harmconvert finetune",
        "report",
        "cut.safetensors",
        "--figure",
        "training",
    )
    converted("plain.safetensors", "--lambda", "2")
    result = ok("report", "plain.safetensors", "--figure", "errors")
    assert "note: the checkpoint was not calibrated, so only the errors of the kernels are shown" in result.stderr
    assert result.stdout == "wrote plain-errors.png and plain-errors.csv\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no figure is named: give --figure filters, spectrum or tradeoff"),
        (
            ["--figure", "pie"],
            2,
            "'pie' is not one of 'filters', 'spectrum', 'tradeoff', 'errors', 'training', 'layers', 'bits', 'ranks'",
        ),
        (["--figure", "errors"], 2, "is not a harmonic checkpoint: make one first with: harmconvert convert"),
        (["--figure", "layers", "--kernel-size", "3"], 2, "--kernel-size works only with --figure filters or"),
        (["--figure", "training", "--include", "x"], 2, "--include works only with --figure tradeoff"),
        (["--figure", "bits", "--bits", "2,3"], 2, "--bits works only with --figure tradeoff"),
        (["--figure", "tradeoff", "--bits", "two"], 2, "'two' is not a list of numbers"),
        (["--figure", "errors", "--device", "cpu"], 2, "--device works only with --figure tradeoff or --latency"),
        (["--figure", "filters", "-o", "a.pdf"], 2, "a.pdf should end in .png or .svg"),
        (["--figure", "filters", "-o", "none/a.png"], 2, "the folder none does not exist"),
        (["--figure", "filters", "--kernel-size", "7"], 2, "no layer has a kernel of 7 (there are: 3x3)"),
        (["--figure", "filters", "--kernel-size", "big"], 2, "'big' is not a size such as 3 or 1x7"),
        (["--figure", "filters", "--dataset", "x"], 2, "--data works only with --figure tradeoff"),
        (["--figure", "spectrum", "--calibrate", "x"], 2, "--calibrate works only with --figure tradeoff"),
        (["--figure", "spectrum", "--include", "x"], 2, "--include works only with --figure tradeoff"),
        (["--figure", "tradeoff", "--kernel-size", "3"], 2, "--kernel-size works only with --figure filters or"),
        (["--figure", "tradeoff"], 2, "no data is named: give --data DATA"),
        (["--figure", "tradeoff", "--dataset", "sample:mnist5k", "--damping", "1"], 2, "--damping works only with"),
    ],
)
def test_report_refuses_invalid_options(arguments: list[str], code: int, message: str) -> None:
    fails(code, message, "report", SAMPLE, *arguments)
