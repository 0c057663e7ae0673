"""harmconvert convert"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import images, inputs, listening, next_step, options, outputs, pages, types
from .advice import adapted
from .groups import Grouped
from .recipe import recipe
from .recording import command_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from ..arguments import Budget
    from ..pipeline.convert import Conversion
    from ..pipeline.convert_to_file import ConvertedFile


def budget_options(command: Any) -> Any:
    """Add the options of the search for a plan (--budget, --max-drop)."""
    command = click.option(
        "--search-figure",
        metavar="FILE",
        help="budget: draw all plans of the search, as .png or .svg, and write a .csv beside it.",
    )(command)
    command = click.option(
        "--probes",
        hidden=True,
        metavar="FILE",
        help="budget: file for the scores of layers, which a search with another budget reads again; default: "
        "NAME-harmonic.probes.json beside the output.",
    )(command)
    command = click.option(
        "--frequencies",
        type=click.Choice(["lambda", "best"]),
        default="lambda",
        show_default=True,
        help="budget: lambda keeps the lowest frequencies of each layer; best also tries those that its output needs "
        "most on the images (without images, the strongest). Use best for audio networks, or for kernels with "
        "different resolution per axis. It needs up to three times as many probes.",
    )(command)
    command = click.option(
        "--latency-batch",
        hidden=True,
        type=types.Count(min=1),
        default=1,
        show_default=True,
        help="budget latency=: images in the forward pass that is measured.",
    )(command)
    command = click.option(
        "--axes",
        multiple=True,
        type=click.Choice(["space", "channels"]),
        help="budget: on what the search chooses: space (the frequencies of kernels), channels (the ranks of weights); "
        "repeatable. Default: both.",
    )(command)
    return click.option(
        "--trials",
        type=types.Count(min=0),
        default=8,
        show_default=True,
        help="budget: number of whole plans to try on the network; 0: use the scores of single layers alone.",
    )(command)


labelled_option = click.option(
    "--labelled",
    metavar="DATA",
    help="max-drop: measure the loss on this data, if it is other data than that of --data. Half of the test images "
    "choose the size, the other half measure the loss.",
)


@click.command(name="convert", cls=Grouped)
@click.argument("source", type=inputs.SourceText())
@recipe
@click.option(
    "--lambda",
    "lam",
    metavar="LAMBDA",
    help="What to keep: full (exact), progressive (by feature map size, as in the paper), a number (levels of a 3x3 "
    "kernel, scaled for other kernels), or 'PATTERN=N,PATTERN=N' (exactly these levels). Default: full; for a network "
    "that is already harmonic: what it has.",
)
@click.option(
    "--rank",
    metavar="RANK",
    help="Give the weights of convolutions and linear layers a low rank: a share of the full rank such as 0.5, or a "
    "whole number. Or 'PATTERN=R,PATTERN=R': only these layers. It saves multiply-adds in every runtime. Give "
    "--data as well, and fine-tune afterwards. The input layer, depthwise layers and the classifier stay whole "
    "unless a pattern names them.",
)
@click.option(
    "--bits",
    metavar="N",
    help="Quantise the weights of all layers, recurrent ones and embeddings among them, to N bits per weight on "
    "average, for a small entropy coded file: 2 to 4 are common. Or 'PATTERN=N,PATTERN=N': only these layers, each "
    "with N bits. Or auto with --max-drop: the fewest bits. Give --data as well: without images, the same quality "
    "needs two to three times as many bits.",
)
@click.option(
    "--budget",
    multiple=True,
    metavar="UNIT=SIZE",
    help="Instead of a lambda, a limit for the whole network: a share (params=60%, bytes=60%, macs=60% of the factored "
    "form, latency=60%) or an amount (params=5M, bytes=10MB, macs=1G, latency=5ms). Latency is measured on this "
    "machine, each layer in its faster form. A search finds the plan with the smallest error within the limit. It uses "
    "the images of --data; without them, the energy that is kept.",
)
@click.option(
    "--max-drop",
    type=types.FiniteRange(min=0),
    metavar="POINTS",
    help="Instead of a lambda: find the smallest network that loses at most POINTS of top-1, or of --metric in its own "
    "unit, on --data.",
)
@options.metric
@labelled_option
@budget_options
@click.option("--save-plan", metavar="FILE", help="Write the plan as JSON. You can edit it and use it with --plan.")
@click.option(
    "--plan",
    "plan_file",
    type=inputs.InputFile(),
    help="Instead of a lambda, follow the plan in this file: JSON, or a harmonic checkpoint.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Convert only layers whose name matches, and cut them even if the policy keeps them whole; repeatable.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Do not convert layers whose name matches; repeatable."
)
@options.basis
@click.option(
    "--normalization",
    hidden=True,
    type=click.Choice(["ortho", "l1"]),
    default="ortho",
    show_default=True,
    help="Scale of the basis filters. Use l1 only to match the paper's ImageNet networks.",
)
@options.dtype
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-harmonic-LAMBDA.safetensors.")
@pages.option
@options.force
@images.calibration_options
@options.input_size
@options.device
@options.network_options
@options.verbosity
@options.common
def command(
    source: str,
    lam: str | None,
    rank: str | None,
    bits: str | None,
    plan_file: str | None,
    budget: tuple[str, ...],
    max_drop: float | None,
    metric: str | None,
    labelled: str | None,
    search_figure: str | None,
    trials: int,
    axes: tuple[str, ...],
    frequencies: str,
    probes: str | None,
    latency_batch: int,
    save_plan: str | None,
    output: str | None,
    report: str | None,
    force: bool,
    input_size: Any,
    as_json: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    basis: str,
    normalization: str,
    device: str | None,
    **values: Any,
) -> int:
    """Convert the network SOURCE to harmonic form, verify it, and write one .safetensors file.

    SOURCE: a timm name, torchvision:NAME, transformers:NAME_OR_FOLDER, smp:ARCH/ENCODER, diffusers:NAME_OR_FOLDER,
    hf-hub:USER/REPO, local-dir:PATH, sample:NAME, FILE.py:FACTORY, package.module:factory, a harmonic checkpoint, or
    reference:FILE. The last is a checkpoint of the paper's own code
    (matej-ulicny/harmonic-networks). If its ResNet has a pooling layer after the stem, give --model-kwargs pool=max or
    pool=avg.

    \b
    Example:
      harmconvert convert resnet50 --lambda progressive
      harmconvert convert resnet50 --lambda 2 --data photographs/
      harmconvert convert resnet50 --rank 0.5 --data photographs/
      harmconvert convert resnet50 --bits 3 --data photographs/
      harmconvert convert resnet50 --budget params=60% --data photographs/
      harmconvert convert sample:resnet_mnist5k --lambda 'stage3.*=2' -o cut.safetensors
      harmconvert convert reference:model_best.pth.tar
    """
    from ..arguments import parse_bits, parse_rank, stays_as_it_is
    from ..files import default_name

    policy, parsed_budget = _parse_policy(plan_file, lam, budget, max_drop, labelled or values["data"])
    inputs.check()
    images.check_calibration(values, input_size)
    if max_drop is not None:
        inputs.check_labelled(labelled or values["data"], values["data_dir"])
    parsed_bits = None if bits is None else parse_bits(bits)
    parsed_rank = None if rank is None else parse_rank(rank)
    choices = (lam, rank, bits, plan_file, budget, max_drop is not None, include, exclude, values["data"])
    default_output = default_name(source, _kept_text(lam, plan_file, parsed_budget, max_drop), bits, rank)
    unchanged = stays_as_it_is(source, choices, basis, normalization, values["dtype"])
    if unchanged and not source.startswith(("hf-hub:", "hf_hub:")):  # what a repository holds is not known yet
        default_output = default_output.replace("-harmonic-full", "-harmonic")
    output = output or default_output
    page, figure = outputs.check(source, output, save_plan, report, search_figure, force)
    probes = outputs.check_probes(
        probes, output, source, bool((parsed_budget or max_drop is not None) and values["data"])
    )
    options.begin(source)
    calibrated, tested = images.conversion_requests(values, labelled, max_drop is not None)
    from ..pipeline.convert_to_file import convert_to_file
    from ..search.records import SearchSettings

    file = convert_to_file(
        options.request(source, values),
        output,
        policy,
        plan=plan_file,
        budget=budget[0] if budget else None,
        max_drop=max_drop,
        metric=metric,
        labelled=tested,
        include=include,
        exclude=exclude,
        basis=basis,
        normalization=normalization,
        rank=parsed_rank,
        bits=parsed_bits,
        dtype=values["dtype"],
        calibration=calibrated,
        settings=images.calibration_settings(values),
        batch_size=values["calibration_batch_size"],
        search=SearchSettings(trials, probes, options.say, frequencies, axes or None),
        latency_batch=latency_batch,
        input_sizes=input_size,
        preprocessing=images.preprocessing_overrides(values),
        device=device,
        force=force,
        command=command_words(),
        listener=_ResultPrinter(source, options.console(quiet=as_json)),
    )
    _report_files(file, page, force, input_size, as_json)
    if file.conversion is None:
        return 0
    _write_figure_and_plan(file.conversion, figure, save_plan, force)
    chosen = any(choices[:-1]) or values["dtype"] != "float32"  # images alone say nothing of the size
    next_step.after_conversion(options.console(quiet=as_json), source, file, chosen, values)
    return images.verdict(file.conversion, output, values["allow_fallback"])


class _ResultPrinter(listening.CommandLine):
    """Print each result of a conversion as soon as it is known."""

    def __init__(self, source: str, console: Console) -> None:
        super().__init__(source)
        self.console = console

    def result(self, result: object) -> None:
        from ..pipeline.convert import Conversion
        from ..pipeline.convert_to_file import Rounding
        from ..pipeline.verification import Verification

        if isinstance(result, Conversion):
            for part in _parts(result):
                self.console.print(part, markup=not isinstance(part, str))  # the cells of tables are escaped
        elif isinstance(result, Verification):
            self.console.print(result.verdict, markup=False)
        elif isinstance(result, Rounding):
            difference = f"outputs differ by {result.difference:.1e} of the largest"
            self.console.print(f"rounded to {result.dtype}: {difference}", markup=False)

    def wrote(self, path: str | Path) -> None:
        options.set_interruption_note(lambda: f"{path} was written, and is complete")


def _parts(conversion: Conversion) -> Iterator[Any]:
    """Return the tables and lines that describe the conversion."""
    from ..report import coding_tables, tables

    if conversion.search:
        yield tables.search_table(conversion.search)
        yield from conversion.search.notes
    if conversion.drops:
        yield tables.drops_table(conversion.drops, "bytes" if conversion.coded else "parameters")
    yield tables.conversion_table(conversion)
    if (calibration := conversion.calibration) is not None:
        layers = tuple(replace(layer, why=layer.why and adapted(layer.why)) for layer in calibration.layers)
        why = calibration.incomparable and adapted(calibration.incomparable)
        adapted_calibration = replace(calibration, layers=layers, incomparable=why)
        yield tables.calibration_table(adapted_calibration)
        yield from tables.calibration_lines(adapted_calibration)
    if conversion.coded:
        yield coding_tables.coding_table(conversion)
        yield from coding_tables.coding_lines(conversion)
    yield from tables.cost_lines(conversion.cost)


def _report_files(file: ConvertedFile, page: Path | None, force: bool, sizes: Any, as_json: bool) -> None:
    """Write the page, and print which files were written."""
    from ..errors import Message
    from ..report import tables

    console = options.console(quiet=as_json)
    wrote = f"wrote {file.output} ({tables.file_size(file.output)})"
    if file.conversion is not None:
        console.print(wrote, markup=False)
    if page:
        pages.write_page(file.model, file.header, file.output, page, force, sizes)
    if file.conversion is None:
        console.print(f"{file.source} is already harmonic: written unchanged; to cut it, give --lambda", markup=False)
        console.print(file.verification.verdict, markup=False)
        console.print(wrote, markup=False)
    elif page:
        console.print(f"wrote {page}", markup=False)
    for name, evaluation in (file.held_out or {}).items():
        console.print(f"{name}, on held-out images: {evaluation}", markup=False)
    if file.conversion and file.conversion.advice:
        options.say(Message("warning: ", file.conversion.advice), urgent=True)
    if as_json:
        written = {"report": str(page)} if page and file.conversion else {}
        options.print_json(file.to_json() | written)


def _write_figure_and_plan(
    conversion: Conversion, figure: tuple[Path, Path] | None, save_plan: str | None, force: bool
) -> None:
    """Write the figure of the search and the plan, if the options ask for them."""
    from ..report.sheets import search_sheet
    from ..report.writing import write_figure

    if figure and conversion.search:
        write_figure(search_sheet(conversion.search), *figure, force)
    if save_plan:
        conversion.plan.save(save_plan, force)


def _kept_text(lam: str | None, plan_file: str | None, budget: Budget | None, max_drop: float | None) -> str:
    """Return the part of the default file name that says what is kept."""
    if budget is not None:
        return str(budget).replace("=", "").replace("%", "")
    return f"drop{max_drop:g}" if max_drop is not None else "plan" if plan_file else lam or "full"


def _parse_policy(
    plan_file: str | None, lam: str | None, budget: tuple[str, ...], max_drop: float | None, data: str | None
) -> tuple[Any, Budget | None]:
    """Return the lambda and the budget that the options name.

    Raises:
        UsageError: several options say what to keep, or one of them needs another one that is missing.
    """
    from ..arguments import Budget, parse_lambda
    from ..errors import UsageError

    if sum((plan_file is not None, lam is not None, bool(budget), max_drop is not None)) > 1 or len(budget) > 1:
        raise UsageError("--plan, --lambda, --budget and --max-drop each say what to keep: give one of them, once")
    if max_drop is not None and data is None:
        raise UsageError("--max-drop POINTS is measured on data: give --data DATA")
    if max_drop is None:
        options.only_with(labelled_option, "--max-drop POINTS")
    if not budget and max_drop is None:
        options.only_with(options.metric, "--max-drop POINTS")
        options.only_with(budget_options, "--budget")
    return None if lam is None else parse_lambda(lam), Budget.parse(budget[0]) if budget else None
