"""figure(): the paper's figures of any network, and the page's charts of a harmonic checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..arguments import CHECKPOINT_FIGURES, NETWORK_FIGURES, check_figure, check_harmonic
from ..calibration import CalibrationSettings
from ..data.datasets import DataRequest
from ..data.variety import Variety
from ..errors import Argument, UsageError
from ..pipeline.calibrating import CalibrationData, calibration_batches, warn
from ..pipeline.devices import machine_for, ready
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import Openable, is_given, opened, text_of
from ..pipeline.testing import evaluation_loading, note_unread
from ..storage.checkpoint import Network
from ..training.evaluation import evaluate
from . import sheets
from .filters import FilterBank, filter_bank
from .report import report
from .spectrum import Spectrum, spectrum
from .tradeoff import Tradeoff, tradeoff
from .writing import drawing, write_figure

# What a figure shows.
Shown = FilterBank | Spectrum | Tradeoff | sheets.Sheet | sheets.Strip


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn: its image, the .csv beside it with the ``rows`` of its numbers, and what is shown."""

    figure: str
    source: str
    output: str
    numbers: str
    rows: tuple[Mapping[str, Any], ...]
    shown: Shown

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict of all but what the rows are made from."""
        written = {"output": self.output, "numbers": self.numbers}
        return {"figure": self.figure, "source": self.source, **written, "rows": [dict(row) for row in self.rows]}


@dataclass(frozen=True)
class TradeoffSettings:
    """What a trade-off tests on and calibrates on.

    ``data`` are labelled images, ``calibration`` images without labels or batches (None: plain cuts alone), as for
    `harmconvert.evaluate` and `harmconvert.convert_to_file`; of both, ``preprocessing`` where it is not the network's
    own. ``include`` are patterns of layers, as for `convert`.
    """

    data: str | Path | DataRequest
    calibration: CalibrationData | None = None
    settings: CalibrationSettings | None = None
    include: Sequence[str] = ()
    preprocessing: Mapping[str, Any] | None = None
    batch_size: int = 256
    calibration_batch_size: int = 32
    workers: int | None = None
    device: str | None = None


def figure(
    model: Openable,
    kind: str,
    output: str | Path | None = None,
    *,
    kernel_size: tuple[int, ...] | None = None,
    tested: TradeoffSettings | None = None,
    force: bool = False,
    listener: Listener = SILENT,
) -> Figure:
    """Draw one figure, and write its numbers beside it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     drawn = figure("sample:resnet_mnist5k", "spectrum", f"{folder}/spectrum.svg")
    >>> drawn.rows[0]["layer"]
    'stem'

    Args:
        model: a source string, a request or a network.
        kind: of any network ``"filters"``, ``"spectrum"`` or ``"tradeoff"`` (the paper's figures 2, 3 and 4); of a
            harmonic checkpoint ``"errors"``, ``"training"`` or ``"layers"``.
        output: the .png or .svg file to write; default: NAME-FIGURE.png.
        kernel_size: of filters and spectrum: of this kernel only.
        tested: what a trade-off is tested on.
        force: replace files that are there.
        listener: is told what happens.

    Raises:
        UsageError: an unknown figure, outputs that exist, no harmonic checkpoint, no images for a trade-off.
        InputError: there is nothing to draw. OutsideError: matplotlib is not installed.
    """
    if kind not in (*NETWORK_FIGURES, *CHECKPOINT_FIGURES):
        raise UsageError(f"unknown figure {kind!r}: use {', '.join((*NETWORK_FIGURES, *CHECKPOINT_FIGURES))}")
    text = text_of(model)
    image, numbers = check_figure(text, kind, None if output is None else str(output), force)
    if kind in CHECKPOINT_FIGURES and not is_given(model):
        check_harmonic(text)
    drawing()
    if kind in CHECKPOINT_FIGURES:
        source, shown = _of_a_checkpoint(model, kind, listener)
    else:
        source, shown = _of_a_network(model, kind, kernel_size, tested, listener)
    rows = write_figure(shown, image, numbers, force)
    return Figure(kind, source, str(image), str(numbers), tuple(rows), shown)


def _of_a_checkpoint(model: Openable, kind: str, listener: Listener) -> tuple[str, Shown]:
    """The source of a harmonic checkpoint, and what a figure of it shows."""
    found = report(model, listener=listener).report
    if kind == "errors" and found.calibration is None:
        listener.say("note: it was not calibrated: these are errors of the kernels alone")
    source = str(found.source or text_of(model))
    if kind == "layers":
        return source, sheets.layer_strip(found)
    return source, sheets.error_sheet(found) if kind == "errors" else sheets.training_sheet(found)


def _of_a_network(
    model: Openable,
    kind: str,
    kernel_size: tuple[int, ...] | None,
    tested: TradeoffSettings | None,
    listener: Listener,
) -> tuple[str, Shown]:
    """The source of a network, and what a figure of it shows."""
    if kind == "tradeoff" and tested is None:
        raise UsageError("a trade-off is tested on labelled images: give ", Argument("tested"))
    # Filters are those of a kernel size, whatever the weights: there is nothing to fetch.
    form = "dense" if kind == "tradeoff" else "harmonic"
    network = opened(model, listener, pretrained=kind != "filters", form=form)
    source = str(network.source)
    if kind == "filters":
        return source, filter_bank(network.model, kernel_size)
    if tested is not None and kind == "tradeoff":
        return source, _tradeoff(network, model, tested, listener)
    found = spectrum(network.model, kernel_size)
    for skip in found.skipped:
        listener.say(f"note: left out {skip.name} ({skip.kind}): {skip.why}")
    return source, found


def _tradeoff(network: Network, given: Openable, tested: TradeoffSettings, listener: Listener) -> Tradeoff:
    """Read the images, and test every cut on them."""
    if network.header is not None and not network.header.plan.whole:
        listener.say("note: this checkpoint is cut already: it is what 'uncut' means here")
    machine, preprocessing = machine_for(given, tested.device), tested.preprocessing or {}
    model = ready(network.model, given, machine.device)
    loading, config = evaluation_loading(
        DataRequest.of(tested.data, holdout=0.0),
        model,
        machine,
        batch_size=tested.batch_size,
        workers=tested.workers,
        preprocessing=preprocessing,
        listener=listener,
    )
    settings = tested.settings or CalibrationSettings(inputs=256)
    batches = calibration_batches(
        tested.calibration,
        model,
        settings,
        batch_size=tested.calibration_batch_size,
        sizes=[tuple(config["input_size"])],
        preprocessing={key: value for key, value in preprocessing.items() if key != "input_size"},
        listener=listener,
    )
    variety = Variety()
    with listener.progress() as progress:
        found = tradeoff(
            model,
            lambda converted, uncut: evaluate(converted, loading.epoch(0), uncut, variety=None if uncut else variety),
            example_input=torch.zeros(1, *config["input_size"], device=machine.device),
            include=tested.include,
            calibration=batches,
            settings=settings,
            progress=progress,
        )
    warn(variety.remark(), listener)
    note_unread(loading, found.uncut.evaluation, listener)
    return found
