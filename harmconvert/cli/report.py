"""harmconvert report"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import images, inputs, options, pages, training_options, types

if TYPE_CHECKING:
    from ..report.tradeoff import Tradeoff
    from ..storage.checkpoint import Network

OF_A_NETWORK = ("filters", "spectrum", "tradeoff")
OF_A_CHECKPOINT = ("errors", "training", "layers")


def tradeoff_options(command: Any) -> Any:
    """What only the trade-off heeds."""
    for option in (
        images.calibration_data_options,
        training_options.evaluation_options,
        click.option(
            "--include",
            multiple=True,
            metavar="PATTERN",
            help="tradeoff: convert only layers whose name matches, as convert does; repeatable.",
        ),
    ):
        command = option(command)
    return command


@click.command(name="report")
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--figure",
    type=click.Choice(OF_A_NETWORK + OF_A_CHECKPOINT),
    help="Instead of the page, one figure. Of any network: filters, the DCT filters and what lambda keeps of them; "
    "spectrum, which frequencies each layer uses; tradeoff, error against parameters as lambda varies. Of a harmonic "
    "checkpoint: errors, of each kernel and output before and after calibration; training, loss and top-1 by epoch; "
    "layers, what share of its frequencies each keeps.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Of a report .html (default: NAME-report.html) or .json; of a figure .png (default: NAME-FIGURE.png) or .svg.",
)
@options.force
@click.option(
    "--kernel-size",
    type=types.KernelSize(),
    help="filters, spectrum: of this kernel only, such as 7x7; default: the most common one, or all.",
)
@click.option(
    "--latency",
    type=types.Count(min=1),
    metavar="BATCH",
    help="Time the forms here, in turns, on so many examples in a forward, for the page to show.",
)
@tradeoff_options
@options.device
@options.input_size
@options.network_options
@options.loudness
@options.common
def command(
    source: str,
    figure: str | None,
    output: str | None,
    force: bool,
    kernel_size: tuple[int, ...] | None,
    latency: int | None,
    input_size: Any,
    as_json: bool,
    **given: Any,
) -> None:
    """Write a page about the harmonic checkpoint SOURCE, or with --figure one figure.

    The page needs nothing but itself: what was done and what it costs, layer by layer, as far as the file tells;
    with -o FILE.json its data. Figures are the paper's 2, 3 and 4, from any network, and the page's own charts, with
    their numbers beside them as .csv. The trade-off tests on --dataset or --data-dir, as evaluate does, and draws the
    calibrated cuts, too, where --calibrate says on which images.

    \b
    Example:
      harmconvert report resnet50-harmonic-progressive.safetensors -o report.html
      harmconvert report resnet50-harmonic-progressive.safetensors --latency 1
      harmconvert report resnet50 --figure filters -o filters.svg
      harmconvert report resnet50 --figure spectrum
      harmconvert report resnet50-harmonic-progressive.safetensors --figure errors
      harmconvert report sample:resnet_mnist5k --figure tradeoff --dataset sample:mnist5k --calibrate sample:mnist5k
    """
    from ..arguments import check_figure, check_harmonic
    from ..errors import UsageError

    if figure != "tradeoff" and latency is None and given["device"] is not None:
        raise UsageError("--device is of use only with --figure tradeoff or --latency")
    if figure is None:
        _page(source, given, output, force, kernel_size, latency, input_size, as_json)
        return
    if latency:
        raise UsageError("--latency is of use only without --figure")
    if input_size and figure != "tradeoff":
        raise UsageError("--input-size is of use only without --figure, or with --figure tradeoff")
    given["input_size"] = input_size
    if figure != "tradeoff":
        options.only_with(tradeoff_options, "--figure tradeoff")
    if figure not in ("filters", "spectrum") and kernel_size is not None:
        raise UsageError("--kernel-size is of use only with --figure filters or spectrum")
    image, numbers = check_figure(source, figure, output, force)
    if figure == "tradeoff":
        inputs.check_run(given)
        images.check_calibration(given, (), images.calibration_data_options)
    inputs.check()
    if figure in OF_A_CHECKPOINT:
        check_harmonic(source)
    from ..report import tables
    from ..report.tradeoff import Tradeoff
    from ..report.writing import drawing, write_figure

    drawing()
    shown, found = _figure(figure, source, kernel_size, given)
    rows = write_figure(found, image, numbers, force)
    if as_json:
        written = {"output": str(image), "numbers": str(numbers)}
        options.print_json({"figure": figure, "source": shown, **written, "rows": rows})
        return
    console = options.console()
    if isinstance(found, Tradeoff):
        console.print(tables.tradeoff_table(found))
    console.print(f"wrote {image} and {numbers}", markup=False)


def _figure(figure: str, source: str, kernel_size: tuple[int, ...] | None, given: dict[str, Any]) -> tuple[str, Any]:
    """The source that it is of, and what the figure shows."""
    from ..report import sheets
    from ..report.filters import filter_bank
    from ..report.spectrum import spectrum

    if figure in OF_A_CHECKPOINT:
        report = pages.report_on(source, (), given)
        if figure == "errors" and report.calibration is None:
            options.say("note: it was not calibrated: these are errors of the kernels alone")
        makers = {"errors": sheets.error_sheet, "training": sheets.training_sheet, "layers": sheets.layer_strip}
        return str(report.source or source), makers[figure](report)
    # Filters are those of a kernel size, whatever the weights: there is nothing to fetch.
    form = "dense" if figure == "tradeoff" else "harmonic"
    network = options.opened(source, given, pretrained=figure != "filters", form=form)
    shown = str(network.source)
    if figure == "filters":
        return shown, filter_bank(network.model, kernel_size)
    if figure == "tradeoff":
        return shown, _tradeoff(network, given)
    found = spectrum(network.model, kernel_size)
    for skip in found.skipped:
        options.say(f"note: left out {skip.name} ({skip.kind}): {skip.why}")
    return shown, found


def _page(
    source: str,
    given: dict[str, Any],
    output: str | None,
    force: bool,
    kernel_size: tuple[int, ...] | None,
    latency: int | None,
    input_size: Any,
    as_json: bool,
) -> None:
    """Write the page, or its data."""
    from ..arguments import check_report, may_be_harmonic
    from ..errors import UsageError

    inputs.check()
    if not may_be_harmonic(source):
        raise UsageError(
            f"which figure? give --figure {', '.join(OF_A_NETWORK[:-1])} or {OF_A_NETWORK[-1]}; without it the page of "
            f"a harmonic checkpoint is written, and {source} is none: make one with: harmconvert convert {source}"
        )
    options.only_with(tradeoff_options, "--figure tradeoff")
    if kernel_size is not None:
        raise UsageError("--kernel-size is of use only with --figure filters or spectrum")
    path = check_report(source, output, force)
    from ..report.page import write_report

    report = pages.report_on(source, input_size, given, latency)
    write_report(report, path, force)
    if as_json:
        options.print_json({"output": str(path), **report.to_json()})
        return
    options.console().print(f"wrote {path}", markup=False)


def _tradeoff(network: Network, given: dict[str, Any]) -> Tradeoff:
    """Read the images, and test every cut on them."""
    import torch

    from ..data.variety import Variety
    from ..pipeline.calibrating import calibration_batches, warn_of
    from ..pipeline.devices import machine_on
    from ..pipeline.testing import evaluation_loading, note_unread
    from ..report.tradeoff import tradeoff
    from ..training.evaluation import evaluate
    from .listening import CommandLine

    if network.header is not None and not network.header.plan.whole:
        options.say("note: this checkpoint is cut already: it is what 'uncut' means here")
    listener, machine = CommandLine(), machine_on(given["device"])
    model = network.model.to(machine.device)
    loading, config = evaluation_loading(
        training_options.data_request(given),
        model,
        machine,
        batch_size=given["batch_size"],
        workers=given["workers"],
        preprocessing=training_options.image_overrides(given),
        listener=listener,
    )
    settings = images.calibration_settings(given)
    batches = calibration_batches(
        images.calibration_request(given),
        model,
        settings,
        batch_size=given["calibration_batch_size"],
        sizes=[tuple(config["input_size"])],
        preprocessing=images.preprocessing_overrides(given),
        listener=listener,
    )
    variety = Variety()
    with options.progress() as progress:
        found = tradeoff(
            model,
            lambda converted, uncut: evaluate(converted, loading.epoch(0), uncut, variety=None if uncut else variety),
            example_input=torch.zeros(1, *config["input_size"], device=machine.device),
            include=given["include"],
            calibration=batches,
            settings=settings,
            progress=progress,
        )
    warn_of(variety.remark(), listener)
    note_unread(loading, found.uncut.evaluation, listener)
    return found
