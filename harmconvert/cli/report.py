"""harmconvert report"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..arguments import CHECKPOINT_FIGURES, NETWORK_FIGURES
from . import images, inputs, next_step, options, training_options, types
from .listening import CommandLine

if TYPE_CHECKING:
    from ..report import TradeoffSettings


def tradeoff_options(command: Any) -> Any:
    """Add the options that only the trade-off figure uses."""
    for option in (
        images.calibration_data_options,
        images.calibrate_option,
        training_options.evaluation_options,
        click.option(
            "--include",
            multiple=True,
            metavar="PATTERN",
            help="tradeoff: convert only layers whose name matches, as convert does; repeatable.",
        ),
        click.option(
            "--bits",
            type=types.Numbers(),
            default=(),
            help="tradeoff: code the network with these numbers of bits per weight, such as 2,3,4, instead of cutting "
            "it by several lambdas.",
        ),
    ):
        command = option(command)
    return command


@click.command(name="report")
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--figure",
    type=click.Choice(NETWORK_FIGURES + CHECKPOINT_FIGURES),
    help="Draw one figure instead of the page. For any network: filters (the DCT filters, and which of them lambda "
    "keeps), spectrum (the frequencies that each layer uses), tradeoff (error against parameters, for several "
    "lambdas; with --bits: against bytes). For a harmonic checkpoint: errors (of each kernel and output, before and "
    "after calibration), training (loss and top-1 of each epoch), layers (the share of frequencies that each layer "
    "keeps), bits (bits per coded weight and bytes of each layer), ranks (the spectrum of each layer of low rank, and "
    "the rank that it keeps).",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="A page: .html (default: NAME-report.html) or .json. A figure: .png (default: NAME-FIGURE.png) or .svg.",
)
@options.force
@click.option(
    "--kernel-size",
    type=types.KernelSize(),
    help="filters, spectrum: show this kernel size only, such as 7x7; default: the most common size, or all sizes.",
)
@click.option(
    "--latency",
    type=types.Count(min=1),
    metavar="BATCH",
    help="Measure the forms on this machine, in turns, with BATCH examples in a forward pass, for the page.",
)
@tradeoff_options
@options.device
@options.input_size
@options.network_options
@options.verbosity
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
    **values: Any,
) -> None:
    """Write a page about the harmonic checkpoint SOURCE, or with --figure one figure.

    The page is one file. It shows what was done and what the forms cost, layer by layer, as far as the checkpoint
    records it; -o FILE.json writes its data. The figures are 2, 3 and 4 of the paper, for any network, and the charts
    of the page. Each figure has a .csv with its numbers. The trade-off tests on --data, as evaluate does. With
    --calibrate, it also shows the calibrated cuts. With --bits, it shows error against bytes of a network that is coded
    with each of these numbers of bits, and the point of SOURCE if that is a coded checkpoint.

    \b
    Example:
      harmconvert report resnet50-harmonic-progressive.safetensors -o report.html
      harmconvert report resnet50-harmonic-progressive.safetensors --latency 1
      harmconvert report resnet50 --figure filters -o filters.svg
      harmconvert report resnet50 --figure spectrum
      harmconvert report resnet50-harmonic-progressive.safetensors --figure errors
      harmconvert report sample:resnet_mnist5k --figure tradeoff --data sample:mnist5k --calibrate sample:mnist5k
      harmconvert report sample:resnet_mnist5k --figure tradeoff --data sample:mnist5k --bits 1,2,3
    """
    from ..arguments import check_figure, check_harmonic
    from ..errors import UsageError

    if figure != "tradeoff" and latency is None and values["device"] is not None:
        raise UsageError("--device works only with --figure tradeoff or --latency")
    values["input_size"] = input_size
    if figure is None:
        _write_page(source, values, output, force, kernel_size, latency, as_json)
        return
    if latency:
        raise UsageError("--latency works only without --figure")
    if input_size and figure != "tradeoff":
        raise UsageError("--input-size works only without --figure, or with --figure tradeoff")
    if figure != "tradeoff":
        options.only_with(tradeoff_options, "--figure tradeoff")
    if figure not in ("filters", "spectrum") and kernel_size is not None:
        raise UsageError("--kernel-size works only with --figure filters or spectrum")
    check_figure(source, figure, output, force)
    if figure == "tradeoff":
        inputs.check_run(values)
        images.check_calibration(values, (), images.calibration_data_options, "--calibrate")
    inputs.check()
    if figure in CHECKPOINT_FIGURES:
        check_harmonic(source)
    from ..report import figure as draw
    from ..report import tables
    from ..report.tradeoff import Tradeoff

    result = draw(
        options.request(source, values),
        figure,
        output,
        kernel_size=kernel_size,
        tested=_tradeoff_settings(values) if figure == "tradeoff" else None,
        force=force,
        listener=CommandLine(),
    )
    if as_json:
        options.print_json(result.to_json())
        return
    console = options.console()
    if isinstance(result.shown, Tradeoff):
        console.print(tables.tradeoff_table(result.shown))
    console.print(f"wrote {result.output} and {result.numbers}", markup=False)


def _write_page(
    source: str,
    values: dict[str, Any],
    output: str | None,
    force: bool,
    kernel_size: tuple[int, ...] | None,
    latency: int | None,
    as_json: bool,
) -> None:
    """Write the page or its data."""
    from ..arguments import check_report, may_be_harmonic
    from ..errors import UsageError

    inputs.check()
    if not may_be_harmonic(source):
        raise UsageError(
            f"no figure is named: give --figure {', '.join(NETWORK_FIGURES[:-1])} or {NETWORK_FIGURES[-1]}; the page "
            f"needs a harmonic checkpoint, and {source} is not one: make one with: harmconvert convert {source}"
        )
    options.only_with(tradeoff_options, "--figure tradeoff")
    if kernel_size is not None:
        raise UsageError("--kernel-size works only with --figure filters or spectrum")
    path = check_report(source, output, force)
    from ..report import report

    result = report(
        options.request(source, values),
        path,
        latency=latency,
        input_sizes=values["input_size"],
        device=values["device"],
        force=force,
        listener=CommandLine(),
    )
    if as_json:
        options.print_json(result.to_json())
        return
    console = options.console()
    console.print(f"wrote {path}", markup=False)
    if latency is None:
        next_step.after_page(console, source)


def _tradeoff_settings(values: dict[str, Any]) -> TradeoffSettings:
    """Return the settings of a trade-off from the options."""
    from ..report import TradeoffSettings

    return TradeoffSettings(
        training_options.data_request(values),
        images.calibration_request(values),
        images.calibration_settings(values),
        values["include"],
        training_options.image_overrides(values),
        values["batch_size"],
        values["calibration_batch_size"],
        values["workers"],
        values["device"],
        values["bits"],
    )
