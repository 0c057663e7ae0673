"""The spectrum of each layer of low rank: its numbers in the record of calibration, and how reports show it."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import harmconvert as hc
from harmconvert.calibration import CalibrationContext, CalibrationSettings, calibrate
from harmconvert.errors import InputError
from harmconvert.kernels import low_rank_of_channels, power_outside
from harmconvert.plan import apply_plan
from harmconvert.report import LayerRank, Report, page, ranks_sheet, report_of
from harmconvert.storage import Header, Source, read_header

from .commands import fails, ok
from .networks import random_input, seeded
from .test_figures import same_rows
from .test_report import OWN, Outline


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class WithoutGradients(nn.Module):
    """One layer. The effect of its outputs cannot be measured, so the metric is that of the inputs alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Small(nn.Module):
    """A layer of each kind: grouped, transposed with the kernel second, 1x1 and linear."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 3)
        self.point = nn.Conv2d(8, 9, 1)
        self.hidden = nn.Linear(9, 10)
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.up(self.wide(x).relu()).relu()).relu()
        return self.fc(self.hidden(x.mean((2, 3))).relu())


RANKS = {"wide": 2, "up": 3, "point": 2, "hidden": 4}
IMAGES = random_input((64, 4, 5, 5), seed=2).split(32)


@cache
def converted(calibrated: bool = True) -> hc.Conversion:
    return hc.convert(seeded(Small), rank=RANKS, calibration=IMAGES if calibrated else None)


def linear(**more: Any) -> hc.Conversion:
    net = seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)))
    return hc.convert(net, rank={"0": 3}, calibration=[random_input((64, 12))], **more)


def reported(conversion: hc.Conversion) -> Report:
    header = hc.save(conversion, "net.safetensors", source=Source("sample", "x"), force=True)
    return report_of(conversion.model, header, "net")


def expected_spectrum(moments: list[np.ndarray], most: int) -> list[float]:
    """Return the spectrum of the moments of each group: the slow and obvious way."""
    outside = np.zeros(most + 1)
    for one in moments:
        powers = sorted(np.linalg.eigvalsh(one), reverse=True)
        outside += [sum(powers[k:most]) for k in range(most + 1)]
    return list(np.interp(np.linspace(0, most, 17), range(most + 1), outside / outside[0]))


def fit_part(x: Tensor) -> np.ndarray:
    """Return the inputs of the fit: inputs 3, 7, 11 and so on are held back."""
    return torch.stack([row for number, row in enumerate(x) if number % 4 != 3]).numpy()


# --- the numbers ---


def test_the_spectrum_of_a_grouped_layer_is_that_of_its_output_moments() -> None:
    model = seeded(lambda: WithoutGradients(nn.Conv1d(12, 20, 1, groups=2)), torch.float64)
    x = random_input((200, 12, 1), torch.float64) * torch.logspace(0, -1, 12, dtype=torch.float64)[:, None]
    conversion = hc.convert(model, rank={"layer": 3}, calibration=[x + 1])
    assert any("fitted to each layer alone" in note for note in conversion.calibration.notes)
    (record,) = conversion.calibration.layers
    weights, z = model.layer.weight.detach()[..., 0].numpy(), fit_part(x)[:, :, 0]
    moments = []
    for weight, part in ((weights[:10], z[:, :6]), (weights[10:], z[:, 6:])):
        gram = (part - part.mean(0)).T @ (part - part.mean(0))
        damped = gram + 1e-3 * np.diag(gram).mean() * np.eye(6)
        moments.append(weight @ damped @ weight.T)
    assert record.spectrum == pytest.approx(expected_spectrum(moments, 6), rel=6e-4)


def test_the_spectrum_is_weighted_by_the_effect_of_the_outputs() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 2)), torch.float64)
    x = random_input((120, 9), torch.float64)
    context = CalibrationContext.of(model, [x], CalibrationSettings())
    plan = hc.convert(model, rank={"0": 2}).plan
    record = calibrate(model, apply_plan(model, plan), plan, context).layers[0]
    effects = context.effects_on(["0"], 0)[0]["0"][0].double().numpy()
    own = np.diag(effects)
    root = np.linalg.cholesky((0.7 * effects + np.diag(0.3 * own + 1e-3 * own.mean())) / own.mean())
    weight, z = model[0].weight.detach().numpy(), fit_part(x)
    gram = z.T @ z
    moments = root.T @ weight @ (gram + 1e-3 * np.diag(gram).mean() * np.eye(9)) @ weight.T @ root
    assert record.spectrum == pytest.approx(expected_spectrum([moments], 7), rel=6e-4)
    unweighted = weight @ gram @ weight.T
    assert record.spectrum != pytest.approx(expected_spectrum([unweighted], 7), rel=0.05)


def test_a_layer_that_keeps_the_projection_has_the_spectrum_in_the_metric() -> None:
    model = seeded(lambda: WithoutGradients(nn.Linear(6, 8, bias=False)), torch.float64)
    x = random_input((160, 6), torch.float64) * torch.logspace(0, -2, 6, dtype=torch.float64)
    x[3::4] = x[3::4].flip(1)  # the inputs that are held back are of another kind
    (record,) = hc.convert(model, rank={"layer": 3}, calibration=[x]).calibration.layers
    assert record.decision == "projection"
    weight, z = model.layer.weight.detach().numpy(), fit_part(x)
    gram = z.T @ z
    moments = weight @ (gram + 1e-3 * np.diag(gram).mean() * np.eye(6)) @ weight.T
    assert record.spectrum == pytest.approx(expected_spectrum([moments], 6), rel=6e-4)


def test_with_the_kernel_second_the_powers_are_those_of_the_channels() -> None:
    generator = torch.Generator().manual_seed(3)
    C = torch.randn(2, 5, 4 * 3, generator=generator, dtype=torch.float64)
    z = torch.randn(2, 40, 4 * 3, generator=generator, dtype=torch.float64)
    G = z.mT @ z
    powers = low_rank_of_channels(C, 3, 2, G).powers_GQ
    assert powers is not None
    for c, g, found in zip(C.numpy(), G.numpy(), powers, strict=True):
        channels = sum(g.reshape(4, 3, 4, 3)[:, f, :, f] for f in range(3))
        unfolded = np.concatenate([c.reshape(5, 4, 3)[:, :, f] for f in range(3)])
        moments = unfolded @ channels @ unfolded.T
        assert found.tolist() == pytest.approx(np.linalg.eigvalsh(moments)[-4:].tolist(), rel=1e-7)
        assert power_outside(found[None], 4).tolist() == pytest.approx(expected_spectrum([moments], 4), abs=1e-9)


def test_spectra_decrease_from_one_to_zero_and_survive_json() -> None:
    conversion = converted()
    record = conversion.calibration
    assert {layer.name for layer in record.layers} == set(RANKS)
    for layer in record.layers:
        spectrum = layer.spectrum
        assert spectrum is not None
        assert (len(spectrum), spectrum[0], spectrum[-1]) == (17, 1, 0)
        assert list(spectrum) == sorted(spectrum, reverse=True)
        assert all(float(f"{share:.4g}") == share for share in spectrum)
    report = reported(conversion)
    layers = read_header("net.safetensors").history["calibration"]["layers"]
    assert {one["name"]: tuple(one["spectrum"]) for one in layers} == {one.name: one.spectrum for one in record.layers}
    assert [(one.name, one.rank, one.full_rank) for one in report.ranks] == [
        ("wide", 2, 6), ("up", 3, 12), ("point", 2, 8), ("hidden", 4, 9),
    ]  # fmt: skip
    first = report.to_json()["ranks"][0]
    assert first["share"] == pytest.approx(1 / 3)
    assert first["spectrum"] == report.ranks[0].spectrum
    assert first["outside"] == report.ranks[0].outside


def test_other_layers_and_layers_without_outputs_have_no_spectrum() -> None:
    cut = hc.convert(seeded(Small), {"wide": 2}, calibration=IMAGES)
    assert "spectrum" not in cut.calibration.to_json()["layers"][0]
    zero = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    nn.init.zeros_(zero[0].weight)
    (record,) = hc.convert(zero, rank={"0": 2}, calibration=[random_input((32, 8))]).calibration.layers
    assert record.spectrum is None


def test_coded_ranks_have_their_spectra() -> None:
    plain, coded = (linear(**more).calibration for more in ({}, {"bits": 4}))
    spectra = {layer.name: layer.spectrum for layer in coded.layers if layer.spectrum}
    assert spectra == {"0": plain.layers[0].spectrum}
    assert {"0.first", "0.second"} <= {layer.name for layer in coded.layers}


def test_the_power_outside_a_rank_is_interpolated() -> None:
    layer = LayerRank("a", 3, 8, (1.0, 0.5, 0.0))
    assert (layer.share, layer.outside) == (0.375, 0.625)
    assert [layer.outside_at(share) for share in (0, 0.5, 0.75, 1)] == [1.0, 0.5, 0.25, 0.0]
    assert replace(layer, spectrum=None).outside is None


def test_a_network_of_linear_layers_has_a_page() -> None:
    text = page(reported(linear()))
    assert "Spectrum of each layer" in Outline(text).text["h2"]
    assert "Frequencies that the layers use" not in text


def test_a_header_with_another_spectrum_is_refused() -> None:
    conversion = linear()
    hc.save(conversion, "net.safetensors")
    document = read_header("net.safetensors").to_json()
    layers = document["history"]["calibration"]["layers"]
    for spectrum in ([1.0, 0.0], [2.0] * 17, [float("nan")] * 17, ["1"] * 17, 3, {}):
        layers["spectrum"] = [spectrum]
        with pytest.raises(InputError, match=r"layers: 0: spectrum: .* should be a rank spectrum"):
            Header.from_json(document)
    layers["spectrum"] = []
    with pytest.raises(InputError, match="its header is unreadable"):
        Header.from_json(document)
    del layers["spectrum"]
    report = report_of(conversion.model, Header.from_json(document), "old")
    assert report.ranks == (LayerRank("0", 3, 12),)


# --- the page and the figure ---


def test_the_page_shows_the_spectra_and_the_kept_ranks_as_a_heat_map_and_as_a_table() -> None:
    report = reported(converted())
    text = page(report)
    outline = Outline(text)
    assert "Spectrum of each layer" in outline.text["h2"]
    (area,) = (attributes for _, attributes in outline.tags if attributes.get("data-chart") == "ranks")
    assert area["aria-label"] == (
        "Output power outside each rank: share of the full rank, by layer of low rank, in the order of the network; "
        "colours: output power outside a rank of this height"
    )
    assert "4 layers of low rank, as a table" in outline.text["summary"]
    assert {"2 of 6", "3 of 12", "2 of 8", "4 of 9", "33.3 %"} <= set(outline.text["td"])
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    points = json.loads(data)["charts"]["ranks"]
    assert [(x, round(100 - y)) for x, y, _ in points] == [(12.5, 33), (37.5, 25), (62.5, 25), (87.5, 44)]
    assert points[0][2].startswith("wide\nkeeps rank 2 of 6 (33%)\noutput power outside the rank: ")
    (chart,) = ranks_sheet(report).charts
    assert chart.heat is not None
    assert (len(chart.heat.rows), {len(row) for row in chart.heat.rows}) == (16, {4})
    last = report.ranks[3].spectrum
    assert chart.heat.rows[-1][3] == pytest.approx(50 * (last[0] + last[1])), "the lowest cell, in percent"
    assert chart.heat.complete
    shares = chart.heat.shares()
    assert shares[-1][3] == pytest.approx(1 + np.log10(chart.heat.rows[-1][3] / 100) / 4)
    assert all(0 <= share <= 1 for row in shares for share in row if share is not None)


def test_without_calibration_inputs_only_the_ranks_are_shown() -> None:
    report = reported(converted(calibrated=False))
    assert [layer.spectrum for layer in report.ranks] == [None] * 4
    text = " ".join(page(report).split())
    assert "No spectrum is recorded, so only the ranks are shown" in text
    assert "power outside" not in text
    (chart,) = ranks_sheet(report).charts
    assert (chart.heat, chart.title) == (None, "Rank of each layer")
    assert ranks_sheet(report).rows()[0]["outside"] is None


def test_layers_without_a_spectrum_are_blank_among_others() -> None:
    report = reported(converted())
    mixed = replace(report, ranks=(replace(report.ranks[0], spectrum=None), *report.ranks[1:]))
    (chart,) = ranks_sheet(mixed).charts
    assert chart.heat is not None
    assert not chart.heat.complete
    assert {row[0] for row in chart.heat.rows} == {None}
    assert "not recorded" in Outline(page(mixed)).text["td"]


def test_a_network_without_ranks_has_no_spectra() -> None:
    report = reported(hc.convert(seeded(Small), 2))
    assert report.ranks == ()
    assert "Spectrum of each layer" not in page(report)
    with pytest.raises(InputError, match=r"no layer of net has a low rank, so there is no spectrum.*rank=0.5"):
        ranks_sheet(report)


def test_the_figure_has_a_row_for_each_layer() -> None:
    rows = hc.figure(converted(), "ranks", "r.png").rows
    assert [row["layer"] for row in rows] == list(RANKS)
    assert [rows[0][f"outside_{share}"] for share in ("0", "1")] == [1, 0]
    assert rows[1]["outside"] == rows[1]["outside_0.25"], "rank 3 of 12"
    assert Path("r.png").stat().st_size > 5000
    with Path("r.csv").open(newline="") as file:
        assert [row["outside"] for row in csv.DictReader(file)] == [str(row["outside"]) for row in rows]


def test_the_command_draws_the_figure_or_says_what_to_do() -> None:
    Path("net.py").write_text(OWN)
    convert = ["convert", "net.py:make", "--input-size", "1,12,12"]
    report = ["report", "--trust-code", "--figure", "ranks"]
    ok(*convert, "--rank", "2=2", "-o", "net.safetensors")
    result = ok(*report, "net.safetensors", "-o", "p.svg", "--json")
    (row,) = same_rows("p.csv", result.stdout)
    assert (row["layer"], row["rank"], row["full_rank"], row["outside"]) == ("2", 2, 4, None)
    assert "note: the checkpoint records no spectra, so only the ranks are shown" in result.stderr
    ok(*convert, "--lambda", "2", "-o", "cut.safetensors")
    message = "no layer of cut has a low rank, so there is no spectrum to draw: harmconvert convert reduces ranks with "
    fails(3, message + "--rank 0.5", *report, "cut.safetensors")
