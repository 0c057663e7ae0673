"""The commands that come after a report. Each runs as printed, in the folder from which the report was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from ..arguments import WORTH_A_CUT
from ..files import short_name
from ..storage.checkpoint import Header
from .answers import worse
from .facts import NextStep, Report
from .reproduce import source_words

# The data in the package for its sample networks: images for calibration, and images with labels.
_DATA = {"resnet_mnist5k": ("sample:mnist5k", "sample:mnist5k"), "efficientnet_lite0": ("sample:photographs", None)}


def next_steps(report: Report, header: Header, checkpoint: str, sized: bool) -> tuple[NextStep, ...]:
    """Return at most three steps: what improves or measures the network, then its export.

    Args:
        checkpoint: the path or the source string of the checkpoint.
        sized: the network declares the size of its input, so that commands can run it.
    """
    code = report.source is not None and report.source.scheme == "code"
    own = ["--trust-code"] if code else []
    steps = [*_improving(report, checkpoint), *(_measuring(report, header, checkpoint) if sized else ())][:2]
    steps.append(("Write plain weights, which load without harmconvert.",
                  ["export", checkpoint, "-o", f"{short_name(checkpoint)}-dense.safetensors"]))  # fmt: skip
    return tuple(NextStep(why, shlex.join(["harmconvert", *words, *own])) for why, words in steps)


def _improving(report: Report, checkpoint: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the step that makes the network smaller or better, if one can run without more data."""
    name = short_name(checkpoint)
    if report.saves_nothing and not report.from_scratch:
        if (report.parameter_share_over_1x1 or 0.0) >= WORTH_A_CUT:
            words = ["convert", checkpoint, "--lambda", "progressive", "-o", f"{name}-progressive.safetensors"]
            yield "Nothing is cut yet. Cut the high frequencies of the layers with small maps.", words
        else:
            words = ["convert", checkpoint, "--bits", "4", "-o", f"{name}-4bit.safetensors"]
            yield "Nothing is smaller yet. Code the weights with 4 bits.", words
    calibration, _ = _data(report)
    untouched = report.calibration is None and not report.training and not report.saves_nothing
    if untouched and calibration and report.commands:
        words = [*shlex.split(report.commands[0])[1:-2], "--data", calibration]
        why = "Reduce the error: calibrate on images without labels."
        yield why, [*words, "-o", f"{name}-calibrated.safetensors"]


def _measuring(report: Report, header: Header, checkpoint: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the steps that measure what the report does not know: how much worse, and how fast."""
    _, labelled = _data(report)
    source = header.source
    if labelled and all(stage.top1 is None for stage in report.stages):
        yield "Measure the accuracy.", ["evaluate", checkpoint, "--data", labelled]
    elif source is not None and source.sha256 and source.scheme != "reference" and not worse(report).known:
        words = ["verify", *source_words(source), checkpoint, "--as-planned"]
        yield "Compare the outputs with those of the uncut network, layer by layer.", words
    if report.timing is None:
        output = f"{short_name(checkpoint)}-timed.html"
        yield "Measure the time on this machine.", ["report", checkpoint, "--latency", "1", "-o", output]


def _data(report: Report) -> tuple[str | None, str | None]:
    """Return the data for calibration and the labelled data that are in the package for this network."""
    source = report.source
    return _DATA.get(source.name, (None, None)) if source and source.scheme == "sample" else (None, None)
