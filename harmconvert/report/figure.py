"""figure(): the paper's figures for any network, and the page's charts for a harmonic checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import CHECKPOINT_FIGURES, NETWORK_FIGURES, check_figure, check_harmonic
from ..calibration import CalibrationSettings
from ..data.datasets import DataRequest
from ..data.variety import Variety
from ..errors import Argument, HarmconvertError, UsageError
from ..network.forms import dense_form
from ..pipeline.calibrating import CalibrationData, calibration_batches, warn
from ..pipeline.devices import machine_for, ready
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import Openable, is_given, opened, text_of
from ..pipeline.testing import evaluation_loading, note_unread
from ..plan import Bits, Plan
from ..sources.opening import open_original
from ..sources.request import SourceRequest
from ..storage.checkpoint import Network
from ..training.evaluation import evaluate
from . import sheets
from .facts import Report
from .report import report
from .space import FilterBank, Spectrum, filter_bank, spectrum
from .tradeoff import CodedFile, Tradeoff, tradeoff
from .writing import drawing, write_figure

_CUT_ALREADY = "note: this checkpoint is cut already; here 'uncut' means this checkpoint"
# The data that a figure can show.
Content = FilterBank | Spectrum | Tradeoff | sheets.Sheet | sheets.Strip
_CONTENTS: Mapping[str, Callable[[Report], Content]] = {
    "errors": sheets.error_sheet,
    "training": sheets.training_sheet,
    "layers": sheets.layer_strip,
    "bits": sheets.bits_sheet,
    "ranks": sheets.ranks_sheet,
}


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn.

    ``output``: the image. ``numbers``: the .csv file. ``rows``: the rows of the .csv file. ``shown``: the data of the
    figure.
    """

    figure: str
    source: str
    output: str
    numbers: str
    rows: tuple[Mapping[str, Any], ...]
    shown: Content

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON, without ``shown``: ``rows`` has the same numbers."""
        written = {"output": self.output, "numbers": self.numbers}
        return {"figure": self.figure, "source": self.source, **written, "rows": [dict(row) for row in self.rows]}


@dataclass(frozen=True)
class TradeoffSettings:
    """The images and the settings of a trade-off.

    ``data``: labelled images for the test, as for `harmconvert.evaluate`. ``calibration``: images without labels, or
    batches, as for `harmconvert.convert_to_file`; None: no calibrated cuts. ``preprocessing``: replaces that of the
    network, for both. ``include``: patterns of layer names, as for `convert`. ``bits``: code the network with these
    numbers of bits per weight, such as ``(2, 3, 4)``, instead of cutting it by several lambdas.
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
    bits: Sequence[float] = ()


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
    """Draw one figure, and write its numbers to a .csv file beside it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     drawn = figure("sample:resnet_mnist5k", "spectrum", f"{folder}/spectrum.svg")
    >>> drawn.rows[0]["layer"]
    'stem'

    Args:
        model: a source string, a request or a network.
        kind: ``"filters"``, ``"spectrum"`` or ``"tradeoff"`` (the paper's figures 2, 3 and 4) for any network;
            ``"errors"``, ``"training"``, ``"layers"``, ``"bits"`` (bits and bytes of each layer) or ``"ranks"`` (the
            spectrum of each layer of low rank) for a harmonic checkpoint.
        output: the .png or .svg file to write; default: NAME-FIGURE.png.
        kernel_size: for filters and spectrum: show only this kernel size.
        tested: for a trade-off: its images and settings.
        force: replace existing files.
        listener: receives messages about the progress.

    Raises:
        UsageError: the figure is unknown, an output exists, the checkpoint is not harmonic, or a trade-off has no
            images.
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
        source, content = _from_checkpoint(model, kind, listener)
    else:
        source, content = _from_network(model, kind, kernel_size, tested, listener)
    rows = write_figure(content, image, numbers, force)
    return Figure(kind, source, str(image), str(numbers), tuple(rows), content)


def _from_checkpoint(model: Openable, kind: str, listener: Listener) -> tuple[str, Content]:
    """Return the source of a harmonic checkpoint, and the data of a figure of it."""
    facts = report(model, listener=listener).report
    if kind == "errors" and facts.calibration is None:
        listener.say("note: the checkpoint was not calibrated, so only the errors of the kernels are shown")
    content = _CONTENTS[kind](facts)
    if kind == "ranks" and all(layer.spectrum is None for layer in facts.ranks):
        listener.say(
            "note: the checkpoint records no spectra, so only the ranks are shown: convert records them if there are "
            "calibration inputs"
        )
    return str(facts.source or text_of(model)), content


def _from_network(
    model: Openable,
    kind: str,
    kernel_size: tuple[int, ...] | None,
    tested: TradeoffSettings | None,
    listener: Listener,
) -> tuple[str, Content]:
    """Return the source of a network, and the data of a figure of it."""
    if kind == "tradeoff" and tested is None:
        raise UsageError("a trade-off needs labelled images for the test: give ", Argument("tested"))
    # The filters of a kernel size do not depend on the weights, so pretrained weights need not be downloaded.
    form = "dense" if kind == "tradeoff" and not (tested and tested.bits) else "harmonic"
    network = opened(model, listener, pretrained=kind != "filters", form=form)
    source = str(network.source)
    if kind == "filters":
        return source, filter_bank(network.model, kernel_size)
    if tested is not None and kind == "tradeoff":
        return source, _tradeoff(network, model, tested, listener)
    content = spectrum(network.model, kernel_size)
    for skip in content.skipped:
        listener.say(f"note: skipped {skip.name} ({skip.kind}): {skip.why}")
    return source, content


def _for_coding(network: Network, request: Openable, listener: Listener) -> tuple[Plan, nn.Module]:
    """Return what codings of a checkpoint keep, and the network to code.

    A coded checkpoint would be rounded a second time, so the network from which it was made is coded if it is known.
    """
    assert network.header is not None
    plan = network.header.plan.without(Bits.axis)
    if network.header.codecs.coded:
        trusted = isinstance(request, SourceRequest) and (request.trust_code or bool(request.code))
        try:
            with listener.busy("loading the uncut network"):
                return plan, open_original(network.header, trust_code=trusted)
        except HarmconvertError as error:  # its remedies are for other flows
            listener.say(f"note: the uncut network is not known ({str(error).partition(': ')[0]})")
    if not network.header.plan.whole:
        listener.say(_CUT_ALREADY)
    return plan, dense_form(network.model)


def _tradeoff(network: Network, request: Openable, tested: TradeoffSettings, listener: Listener) -> Tradeoff:
    """Read the images, and test the uncut network and every cut or coding on them."""
    machine, preprocessing = machine_for(request, tested.device), tested.preprocessing or {}
    uncut, coded_file = network.model, None
    lam: str | Plan = "full"
    if tested.bits and network.header is not None:
        coded_file = CodedFile.of(network.model, network.header)
        lam, uncut = _for_coding(network, request, listener)
    elif network.header is not None and not network.header.plan.whole:
        listener.say(_CUT_ALREADY)
    # The network of a file declares the pre-processing, and the network from which it was made may not.
    declared = ready(network.model, request, machine.device)
    model = declared if uncut is network.model else ready(uncut, request, machine.device)
    if coded_file is not None:
        coded_file = replace(coded_file, model=declared)
    loading, config = evaluation_loading(
        DataRequest.parse(tested.data, holdout=0.0),
        declared,
        machine,
        batch_size=tested.batch_size,
        workers=tested.workers,
        preprocessing=preprocessing,
        listener=listener,
    )
    settings = tested.settings or CalibrationSettings(inputs=256)
    batches = calibration_batches(
        tested.calibration,
        declared,
        settings,
        batch_size=tested.calibration_batch_size,
        sizes=[tuple(config["input_size"])],
        preprocessing={key: value for key, value in preprocessing.items() if key != "input_size"},
        listener=listener,
    )
    variety = Variety()
    with listener.progress() as progress:
        result = tradeoff(
            model,
            lambda converted, uncut: evaluate(converted, loading.epoch(0), uncut, variety=None if uncut else variety),
            example_input=torch.zeros(1, *config["input_size"], device=machine.device),
            include=tested.include,
            calibration=batches,
            settings=settings,
            bits=tested.bits,
            lam=lam,
            coded_file=coded_file,
            progress=progress,
        )
    warn(variety.warning(), listener)
    note_unread(loading, result.uncut.evaluation, listener)
    return result
