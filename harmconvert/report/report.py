"""report(): what is known about a harmonic checkpoint, as data and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_harmonic, check_report, not_harmonic
from ..files import short_name
from ..pipeline.benchmark import benchmark
from ..pipeline.inputs import Sizes, zeros_of
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import Openable, is_given, opened, text_of
from ..sources import published_checkpoint
from .facts import Report
from .page import write_report
from .summary import report_of


@dataclass(frozen=True)
class Reported:
    """A report, and the page or JSON file to which it was written (None: it was not written)."""

    report: Report
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return {"output": self.output, **self.report.to_json()}


def report(
    model: Openable,
    output: str | Path | None = None,
    *,
    file: str | Path | None = None,
    latency: int | None = None,
    input_sizes: Sizes = (),
    example_input: Any = None,
    device: str | None = None,
    force: bool = False,
    listener: Listener = SILENT,
) -> Reported:
    """Report on a harmonic checkpoint, layer by layer: what was done and what the forms cost, as far as it is recorded.

    >>> import harmconvert as hc
    >>> cut = hc.convert(hc.open_source("sample:resnet_mnist5k").model, "progressive")
    >>> facts = report(cut).report
    >>> len(facts.layers), len(facts.cut), f"{facts.share:.0%}"
    (19, 12, '44%')

    Args:
        model: the path of a harmonic checkpoint, a request or a harmonic network.
        output: the .html page or the .json file to write; None: write no file.
        file: if ``model`` is a network, the file that contains it, for its name, hash and size.
        latency: measure the time of the forms on this machine, with this number of examples in a batch.
        input_sizes: the size (C, H, W) of each input of one example, on which MACs are counted; default: the sizes that
            the network declares.
        example_input: used instead of ``input_sizes``, as for `convert`.
        device: the device on which the forms are timed.
        force: replace an existing file.
        listener: receives messages about the progress.

    Raises:
        UsageError: the network is not harmonic, or the output exists.
        InputError: the history in the file is invalid.
        OutsideError: jinja2, which makes the page, is not installed.
    """
    text = text_of(model)
    path = None if output is None else check_report(text, str(output), force)
    if is_given(model):
        checkpoint, activity = file, f"writing {output}" if output is not None else f"reading {text}"
    else:
        check_harmonic(text)
        checkpoint, activity = None, f"reading {text}"
    network = opened(model, listener)
    if network.header is None:
        raise not_harmonic(text)
    if not is_given(model):
        checkpoint = published_checkpoint(text) or Path(text.removeprefix("reference:"))
    example = zeros_of(input_sizes, network.model) if input_sizes else example_input
    times = None
    if latency:
        times = benchmark(
            network, example_input, input_sizes=input_sizes, batches=(latency,), device=device, listener=listener
        )
    with listener.busy(activity):
        name = short_name(text if file is None else str(file))
        facts = report_of(
            network.model, network.header, name, path=checkpoint, example_input=example, latency=times,
            checkpoint=str(file or f"{name}.safetensors") if is_given(model) else text,
        )  # fmt: skip
        if path is not None:
            write_report(facts, path, force)
            listener.wrote(path)
    return Reported(facts, None if path is None else str(path))
