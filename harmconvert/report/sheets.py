"""The data of figures that show one thing of the page: charts with their numbers, and the strip of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import Argument, InputError
from ..kernels.ranks import SPECTRUM_STEPS
from ..search.records import Search
from .charts import Chart, error_chart, search_chart, training_charts
from .coding import bits_charts
from .facts import LayerFacts, Report
from .ranks import rank_chart
from .text import layer_name, size_text


@dataclass(frozen=True)
class Sheet:
    """Charts, and ``numbers``, the rows of their .csv. ``names``: if x counts layers, the names of the layers."""

    charts: tuple[Chart, ...]
    numbers: tuple[dict[str, Any], ...]
    names: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the .csv."""
        return list(self.numbers)


@dataclass(frozen=True)
class Strip:
    """The layers with kernels larger than 1x1, in the order of the network."""

    layers: tuple[LayerFacts, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each layer; ``share``: the share of its kernel that is kept, from 0 to 1."""
        return [
            {
                **_layer_cells(number, layer),
                "kernel": size_text(layer.kernel),
                "kept": layer.kept,
                "total": layer.total,
                "share": layer.share,
                "parameters": layer.parameters,
                "kept_parameters": layer.kept_parameters,
                "why": layer.why,
            }
            for number, layer in enumerate(self.layers, 1)
        ]


def layer_strip(report: Report) -> Strip:
    """Return the strip of layers of a network.

    Raises:
        InputError: no layer has a kernel larger than 1x1.
    """
    if not report.layers:
        raise InputError(f"{report.name} has no convolution over 1x1: there are no layers to draw")
    return Strip(report.layers)


def error_sheet(report: Report) -> Sheet:
    """Return charts of the relative errors of the kernels and outputs of cut layers, before and after calibration.

    Raises:
        InputError: no layer is cut, or the file records no errors.
    """
    if not report.cut:
        raise InputError(f"no layer is cut in {report.name}: there are no errors to draw")
    charts = [chart for plain in (True, False) if (chart := error_chart(report.layers, plain))]
    if not charts:
        raise InputError(f"{report.name} does not record the errors of its cut: write it with harmconvert convert")
    numbers = [
        {
            **_layer_cells(number, layer),
            "kernel_error": layer.kernel_error,
            "output_error_before": layer.output_error_before,
            "output_error_after": layer.output_error_after,
            "decision": layer.decision,
        }
        for number, layer in enumerate(report.layers, 1)
        if layer.cut
    ]
    return Sheet(tuple(charts), tuple(numbers), tuple(layer_name(layer.name) for layer in report.layers))


def training_sheet(report: Report) -> Sheet:
    """Return charts of the loss (nats) and top-1 of each epoch, over all training runs.

    Raises:
        InputError: the file records no epochs.
    """
    charts = training_charts(report)
    if not charts:
        raise InputError(f"{report.name} records no epochs of training: harmconvert finetune trains a checkpoint")
    epochs = [(number, row) for number, run in enumerate(report.training, 1) for row in run.get("epochs") or []]
    keys = ("loss", "accuracy", "test_loss", "test_top1", "lr")
    numbers = [
        {"epoch": number, "run": run, **{key: row.get(key) for key in keys}}
        for number, (run, row) in enumerate(epochs, 1)
    ]
    return Sheet(tuple(charts), tuple(numbers))


def bits_sheet(report: Report) -> Sheet:
    """Return charts of the bits per coded weight and of the bytes of each layer.

    Raises:
        InputError: no weight is coded.
    """
    if not report.coding:
        what = f"no weight of {report.name} is coded, so there are no bits to draw"
        raise InputError(what, ": harmconvert convert codes weights with ", Argument("bits", 3))
    keys = ("weights", "bits", "coded_bytes", "plain_bytes")
    numbers = [
        {"number": number, "layer": layer.name, **{key: getattr(layer, key) for key in keys}}
        for number, layer in enumerate(report.coding, 1)
    ]
    names = tuple(layer_name(layer.name) for layer in report.coding)
    return Sheet(tuple(bits_charts(report.coding)), tuple(numbers), names)


def ranks_sheet(report: Report) -> Sheet:
    """Return the chart of the spectrum of each layer of low rank, and of the rank that it keeps.

    The rows have ``outside``, the share of the output power outside the rank, and ``outside_0`` to ``outside_1``, this
    share for ranks of these shares of the full rank.

    Raises:
        InputError: no layer has a low rank.
    """
    chart = rank_chart(report.ranks)
    if chart is None:
        what = f"no layer of {report.name} has a low rank, so there is no spectrum to draw"
        raise InputError(what, ": harmconvert convert reduces ranks with ", Argument("rank", 0.5))
    steps = [step / SPECTRUM_STEPS for step in range(SPECTRUM_STEPS + 1)]
    keys = ("rank", "full_rank", "share", "outside")
    numbers = [
        {
            "number": number,
            "layer": layer.name,
            **{key: getattr(layer, key) for key in keys},
            **{f"outside_{share:g}": layer.outside_at(share) for share in steps},
        }
        for number, layer in enumerate(report.ranks, 1)
    ]
    return Sheet((chart,), tuple(numbers), tuple(layer_name(layer.name) for layer in report.ranks))


def search_sheet(search: Search) -> Sheet:
    """Return the chart of all plans that a search under a budget evaluated."""
    chart = search_chart(search.to_json())
    return Sheet((chart,) if chart else (), tuple(search.rows()))


def _layer_cells(number: int, layer: LayerFacts) -> dict[str, Any]:
    return {"number": number, "layer": layer.name}
