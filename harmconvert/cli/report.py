"""harmconvert report"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import options, training_options, types

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
    help="filters: the DCT filters and what lambda keeps of them; spectrum: which frequencies each layer uses; "
    "tradeoff: error against parameters as lambda varies.",
)
@click.option("-o", "--output", metavar="FILE", help=".png or .svg; default: NAME-FIGURE.png. The .csv lies beside it.")
@options.force
@click.option(
    "--kernel-size",
    type=types.KernelSize(),
    help="filters, spectrum: of this kernel only, such as 7x7; default: the most common one, or all.",
)
@tradeoff_options
@options.network_options
@options.common
def command(
    source: str,
    figure: str | None,
    output: str | None,
    force: bool,
    kernel_size: tuple[int, ...] | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Draw a figure of the network SOURCE, and write the numbers that it shows beside it as .csv.

    The paper's figures 2, 3 and 4, from your network. The trade-off tests on --dataset or --data-dir, as evaluate does,
    and draws the calibrated cuts, too, where --calibrate says on which images.

    \b
    Example:
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
        raise UsageError(f"which figure? give --figure {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")
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
