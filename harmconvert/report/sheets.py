"""The page's charts one by one, as figures: charts with the numbers behind them, and the network as a strip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..search.records import Search
from .charts import Chart, error_chart, search_chart, training_charts
from .kernels import size_text
from .summary import LayerFacts, Report


@dataclass(frozen=True)
class Sheet:
    """Charts of one thing and the rows of its .csv; ``names`` are those of 1, 2, ... along x where these are layers."""

    charts: tuple[Chart, ...]
    numbers: tuple[dict[str, Any], ...]
    names: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """The numbers."""
        return list(self.numbers)


@dataclass(frozen=True)
class Strip:
    """The convolutions over 1x1 in the order of the network."""

    layers: tuple[LayerFacts, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer; ``share`` of its frequencies that stays, from 0 to 1."""
        return [
            {
                **_place(number, layer),
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
    """The network as a strip of layers.

    Raises:
        InputError: it has none.
    """
    if not report.layers:
        raise InputError(f"{report.name} has no convolution over 1x1: there are no layers to draw")
    return Strip(report.layers)


def error_sheet(report: Report) -> Sheet:
    """Relative errors of the cut layers: of the kernel, and of the output before and after calibration.

    Raises:
        InputError: nothing is cut, or the file records no errors.
    """
    if not report.cut:
        raise InputError(f"nothing is cut in {report.name}: it makes no errors to draw")
    charts = [chart for plain in (True, False) if (chart := error_chart(report.layers, plain))]
    if not charts:
        raise InputError(f"{report.name} does not record what its cut broke: write it with harmconvert convert")
    numbers = [
        {
            **_place(number, layer),
            "kernel_error": layer.kernel_error,
            "output_error_before": layer.output_error_before,
            "output_error_after": layer.output_error_after,
            "decision": layer.decision,
        }
        for number, layer in enumerate(report.layers, 1)
        if layer.cut
    ]
    return Sheet(tuple(charts), tuple(numbers), tuple(layer.name or "(root)" for layer in report.layers))


def training_sheet(report: Report) -> Sheet:
    """Loss (nats) and top-1 by epoch, over all runs of training.

    Raises:
        InputError: the file records no epochs.
    """
    charts = training_charts(report)
    if not charts:
        raise InputError(f"{report.name} records no epochs of training: harmconvert finetune trains a checkpoint")
    epochs = [(run, row) for run, each in enumerate(report.training, 1) for row in each.get("epochs") or []]
    keys = ("loss", "accuracy", "test_loss", "test_top1", "lr")
    numbers = [
        {"epoch": number, "run": run, **{key: row.get(key) for key in keys}}
        for number, (run, row) in enumerate(epochs, 1)
    ]
    return Sheet(tuple(charts), tuple(numbers))


def search_sheet(search: Search) -> Sheet:
    """Every plan that a budget search saw."""
    chart = search_chart(search.to_json())
    return Sheet((chart,) if chart else (), tuple(search.rows()))


def _place(number: int, layer: LayerFacts) -> dict[str, Any]:
    return {"number": number, "layer": layer.name}
