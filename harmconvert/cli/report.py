"""harmconvert report"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import options, pages, training_options, types

if TYPE_CHECKING:
    from ..report.filters import FilterBank
    from ..report.spectrum import Spectrum
    from ..report.tradeoff import Tradeoff
    from ..sources import Network

FIGURES = ("filters", "spectrum", "tradeoff")


def tradeoff_options(command: Any) -> Any:
    """What only the trade-off heeds."""
    for option in (
        options.device,
        options.calibration_data_options,
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
@click.argument("source")
@click.option(
    "--figure",
    type=click.Choice(FIGURES),
    help="Instead of the page, one figure. filters: the DCT filters and what lambda keeps of them; spectrum: which "
    "frequencies each layer uses; tradeoff: error against parameters as lambda varies.",
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
@tradeoff_options
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
    input_size: Any,
    as_json: bool,
    **given: Any,
) -> None:
    """Write a page about the harmonic checkpoint SOURCE, or with --figure one figure of any network.

    The page needs nothing but itself: what was done and what it costs, layer by layer, as far as the file tells;
    with -o FILE.json its data. Figures are the paper's 2, 3 and 4, from your network, with their numbers beside
    them as .csv. The trade-off tests on --dataset or --data-dir, as evaluate does, and draws the calibrated cuts, too,
    where --calibrate says on which images.

    \b
    Example:
      harmconvert report resnet50-harmonic-progressive.safetensors -o report.html
      harmconvert report resnet50 --figure filters -o filters.svg
      harmconvert report resnet50 --figure spectrum
      harmconvert report sample:resnet_mnist5k --figure tradeoff --dataset sample:mnist5k --calibrate sample:mnist5k
    """
    from ..errors import UsageError
    from ..report import tables
    from ..report.filters import filter_bank
    from ..report.spectrum import spectrum
    from ..report.tradeoff import Tradeoff
    from ..report.writing import check_figure, drawing, write_figure

    if figure is None:
        _page(source, given, output, force, kernel_size, input_size, as_json)
        return
    if input_size:
        raise UsageError("--input-size is of use only without --figure")
    if figure != "tradeoff":
        options.only_with(tradeoff_options, "--figure tradeoff")
    elif kernel_size is not None:
        raise UsageError("--kernel-size is of use only with --figure filters or spectrum")
    image, numbers = check_figure(source, figure, output, force)
    drawing()
    # Filters are those of a kernel size, whatever the weights: there is nothing to fetch.
    form = "dense" if figure == "tradeoff" else "harmonic"
    network = options.opened(source, given, pretrained=figure != "filters", form=form)
    found: FilterBank | Spectrum | Tradeoff
    if figure == "filters":
        found = filter_bank(network.model, kernel_size)
    elif figure == "spectrum":
        found = spectrum(network.model, kernel_size)
        for skip in found.skipped:
            options.say(f"note: left out {skip.name} ({skip.kind}): {skip.why}")
    else:
        found = _tradeoff(network, given)
    rows = write_figure(found, image, numbers, force)
    if as_json:
        written = {"output": str(image), "numbers": str(numbers)}
        options.print_json({"figure": figure, "source": str(network.source), **written, "rows": rows})
        return
    console = options.console()
    if isinstance(found, Tradeoff):
        console.print(tables.tradeoff_table(found))
    console.print(f"wrote {image} and {numbers}", markup=False)


def _page(
    source: str,
    given: dict[str, Any],
    output: str | None,
    force: bool,
    kernel_size: tuple[int, ...] | None,
    input_size: Any,
    as_json: bool,
) -> None:
    """Write the page, or its data."""
    from ..errors import UsageError
    from ..report.page import check_report, write_report
    from ..sources import is_harmonic_source

    if not is_harmonic_source(source):
        raise UsageError(
            f"which figure? give --figure {', '.join(FIGURES[:-1])} or {FIGURES[-1]}; without it the page of a "
            f"harmonic checkpoint is written, and {source} is none: make one with: harmconvert convert {source}"
        )
    options.only_with(tradeoff_options, "--figure tradeoff")
    if kernel_size is not None:
        raise UsageError("--kernel-size is of use only with --figure filters or spectrum")
    path = check_report(source, output, force)
    report = pages.report_on(source, input_size, given)
    write_report(report, path, force)
    if as_json:
        options.print_json({"output": str(path), **report.to_json()})
        return
    options.console().print(f"wrote {path}", markup=False)


def _tradeoff(network: Network, given: dict[str, Any]) -> Tradeoff:
    """Read the images, and test every cut on them."""
    import torch

    from ..evaluation import evaluate
    from ..report.tradeoff import tradeoff

    given |= {"no_channels_last": False, "torchcompile": False, "no_sync_bn": False}
    if network.header is not None and not network.header.plan.whole:
        options.say("note: this checkpoint is cut already: it is what 'uncut' means here")
    machine = training_options.machine_from(given)
    model = network.model.to(machine.device)
    loading, config = training_options.evaluation_loading(given, model, machine)
    images, settings = options.calibration(
        given, model, [tuple(config["input_size"])], own=options.calibration_data_options
    )
    with options.progress() as progress:
        found = tradeoff(
            model,
            lambda converted, uncut: evaluate(converted, loading.epoch(0), uncut),
            example_input=torch.zeros(1, *config["input_size"], device=machine.device),
            include=given["include"],
            calibration=images.batches if images else None,
            settings=settings,
            progress=progress,
        )
    if note := loading.unread(found.uncut.evaluation.images + len(found.uncut.evaluation.unreadable)):
        options.say(note)
    return found
