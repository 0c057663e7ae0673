"""report(): what is known of a harmonic checkpoint, as data and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import check_harmonic, check_report, not_harmonic
from ..deploy.benchmark import Benchmark
from ..files import short_name
from ..pipeline.benchmark import benchmark
from ..pipeline.inputs import Sizes, zeros_of
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import Openable, is_given, opened, text_of
from ..storage.checkpoint import Network
from .page import write_report
from .summary import Report, report_of


@dataclass(frozen=True)
class Reported:
    """A report, and the page or JSON file that it was written to (None: nowhere)."""

    report: Report
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
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
    """Report on a harmonic checkpoint: what was done, and what it costs, layer by layer, as far as its file says.

    >>> import harmconvert as hc
    >>> cut = hc.convert(hc.open_source("sample:resnet_mnist5k").model, "progressive")
    >>> found = report(cut).report
    >>> len(found.layers), len(found.cut), f"{found.share:.0%}"
    (19, 12, '44%')

    Args:
        model: the path of a harmonic checkpoint, a request or a harmonic network.
        output: the .html page or the .json file to write; None writes nothing.
        file: of a network that is given, the file that it is in, for its name, hash and size.
        latency: time the forms here, on batches of so many examples.
        input_sizes: of each input of one example, (C, H, W), to count MACs on; default: the network's own.
        example_input: instead of ``input_sizes``, as for `convert`.
        device: where to time the forms.
        force: replace a file that is there.
        listener: is told what happens.

    Raises:
        UsageError: no harmonic network, or an output that exists. InputError: the file's history is unreadable.
        OutsideError: jinja2, which makes the page, is not installed.
    """
    text = text_of(model)
    path = None if output is None else check_report(text, str(output), force)
    if is_given(model):
        where, what = file, f"writing {output}" if output is not None else f"reading {text}"
    else:
        check_harmonic(text)
        where, what = Path(text.removeprefix("reference:")), f"reading {text}"
    network = opened(model, listener)
    if network.header is None:
        raise not_harmonic(text)
    example = zeros_of(input_sizes, network.model) if input_sizes else example_input
    times = _times(network, latency, input_sizes, example_input, device, listener) if latency else None
    with listener.busy(what):
        name = short_name(text if file is None else str(file))
        found = report_of(network.model, network.header, name, path=where, example_input=example, latency=times)
        if path is not None:
            write_report(found, path, force)
            listener.wrote(path)
    return Reported(found, None if path is None else str(path))


def _times(
    network: Network, batch: int, sizes: Sizes, example_input: Any, device: str | None, listener: Listener
) -> Benchmark:
    return benchmark(network, example_input, input_sizes=sizes, batches=(batch,), device=device, listener=listener)
