"""harmconvert convert"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from . import images, inputs, options, outputs, pages, types
from .recording import record_of_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from ..arguments import Budget
    from ..pipeline.convert import Conversion
    from ..pipeline.verify import Verification
    from ..plan.plan import Plan
    from ..storage.checkpoint import Header, Network


def budget_options(command: Any) -> Any:
    """How a plan for --budget or --max-drop is searched for."""
    command = click.option(
        "--search-figure",
        metavar="FILE",
        help="budget: draw all plans that were seen, .png or .svg, and a .csv beside it.",
    )(command)
    command = click.option(
        "--probes",
        metavar="FILE",
        help="budget: where scores are kept, for another budget to start from; default: NAME-harmonic.probes.json "
        "beside the output.",
    )(command)
    command = click.option(
        "--frequencies",
        type=click.Choice(["lambda", "best"]),
        default="lambda",
        show_default=True,
        help="budget: keep the lowest of each layer's, or also try those that its output needs most on the images "
        "(without images, the strongest): for long kernels, and images with a direction; up to three times the probes.",
    )(command)
    command = click.option(
        "--latency-batch",
        type=types.Count(min=1),
        default=1,
        show_default=True,
        help="budget latency=: images in the forward that is timed.",
    )(command)
    return click.option(
        "--trials",
        type=types.Count(min=0),
        default=8,
        show_default=True,
        help="budget: whole plans tried on the network; 0 trusts the scores of single layers.",
    )(command)


@click.command(name="convert")
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--lambda",
    "lam",
    metavar="LAMBDA",
    help="What to keep: full (exact), progressive (by map size, as the paper), a number meant for 3x3 kernels and "
    "scaled to others, or 'PATTERN=N,PATTERN=N' with literal levels. Default: full; of a network that is harmonic "
    "already, what it has.",
)
@click.option(
    "--budget",
    multiple=True,
    metavar="UNIT=SIZE",
    help="Instead of a lambda: params=60%, bytes=60%, macs=60% (of the factored form) or latency=60% (measured here, "
    "each layer in its faster form) of the whole network, or an amount: params=5M, bytes=10MB, macs=1G, latency=5ms; "
    "the plan of least harm within it is searched for, on the images of --calibrate or by energy.",
)
@click.option(
    "--max-drop",
    type=types.FiniteRange(min=0),
    metavar="POINTS",
    help="Instead of a lambda: the smallest network that loses no more than so many points of top-1 on --labelled.",
)
@click.option(
    "--labelled",
    metavar="DATA",
    help="max-drop: a folder with a folder for each class, sample:mnist5k, or a timm data set; half of the test images "
    "choose, the other half say what was lost.",
)
@budget_options
@click.option("--save-plan", metavar="FILE", help="Write the plan as JSON, to edit and to follow with --plan.")
@click.option(
    "--plan",
    "plan_file",
    type=inputs.InputFile(),
    help="Follow a plan instead of a lambda: JSON, or a harmonic checkpoint, whose plan it is.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Convert only layers whose name matches, and cut them even where the policy would spare them; repeatable.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave layers whose name matches as they are; repeatable."
)
@options.basis
@click.option(
    "--normalization",
    type=click.Choice(["ortho", "l1"]),
    default="ortho",
    show_default=True,
    help="Scale of the basis filters; l1 only for parity with the paper's ImageNet networks.",
)
@options.dtype
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-harmonic-LAMBDA.safetensors.")
@pages.option
@options.force
@images.calibration_options
@options.input_size
@options.device
@options.network_options
@options.loudness
@options.common
def command(
    source: str,
    lam: str | None,
    plan_file: str | None,
    budget: tuple[str, ...],
    max_drop: float | None,
    labelled: str | None,
    search_figure: str | None,
    trials: int,
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
    **more: Any,
) -> int:
    """Convert the network SOURCE to harmonic form, verify it, and write one .safetensors file.

    SOURCE: a timm name, torchvision:NAME, hf-hub:USER/REPO, local-dir:PATH, sample:NAME, FILE.py:FACTORY,
    package.module:factory, a harmonic checkpoint, or reference:FILE, a checkpoint of the reference implementation
    (matej-ulicny/harmonic-networks; --model-kwargs pool=max or pool=avg where its ResNet pools behind the stem).

    \b
    Example:
      harmconvert convert resnet50 --lambda progressive
      harmconvert convert resnet50 --lambda 2 --calibrate photographs/
      harmconvert convert resnet50 --budget params=60% --calibrate photographs/
      harmconvert convert sample:resnet_mnist5k --lambda 'stage3.*=2' -o cut.safetensors
      harmconvert convert reference:model_best.pth.tar
    """
    from ..files import default_name

    policy, asked = _what_to_keep(plan_file, lam, budget, max_drop, labelled)
    inputs.check()
    images.check_calibration(more, input_size)
    if labelled is not None:
        inputs.check_labelled(labelled, more["data_dir"])
    choices = (lam, plan_file, budget, labelled, include, exclude, more["data"])
    told = any(choices) or (basis, normalization, more["dtype"]) != ("dct", "ortho", "float32")
    as_it_is = not told and inputs.may_be_harmonic(source)
    named = default_name(source, _kept(lam, plan_file, asked, max_drop))
    output = output or (named.replace("-harmonic-full", "-harmonic") if as_it_is else named)
    page, figure = outputs.check(source, output, save_plan, report, search_figure, force)
    target = _Target(input_size, output, page, force, as_json, more["dtype"])
    probes = outputs.check_probes(probes, output, source, bool((asked or labelled) and more["data"]))
    options.begin(source)
    from ..network.distributed import joined, rank
    from ..pipeline.convert import convert
    from ..search.records import SearchSettings
    from .labelled import halves

    if plan_file:
        policy = _plan(plan_file)
    with joined():
        network = options.opened(source, more, begun=True, intact=True, form="harmonic" if as_it_is else "dense")
        if as_it_is and network.header:
            return _keep(network, source, target)
        images.declare_inputs(more, network.model, input_size)
        options.place(network.model, device, more["data"] or labelled)
        metric, judged = halves(labelled, network.model, more, input_size) if labelled else (None, None)
        found, settings = images.calibration(more, network.model, input_size)
        batches = found.batches if found else ()
        with options.progress("converting") as progress:
            conversion = convert(
                network.model,
                policy,
                example_input=options.example_input(input_size, network.model, latency_batch),
                include=include,
                exclude=exclude,
                basis=basis,
                normalization=normalization,
                budget=budget[0] if budget else None,
                max_drop=max_drop,
                metric=metric,
                search=SearchSettings(trials, probes, options.say, frequencies),
                calibration=batches or None,
                settings=settings,
                progress=progress,
            )
        with options.busy("testing on the images that chose nothing"):
            held_out = judged(network.model, conversion.model) if judged else None  # by all processes
        if rank() > 0:
            return 0  # the first process verifies and writes
        made_by = record_of_command(source if network.header else str(network.source))
        _finish(network, conversion, made_by, target, held_out, batches)
        _write_beside(conversion, figure, save_plan, force)
    return images.verdict(conversion, output, more["allow_fallback"])


class _Target(NamedTuple):
    """Which files a command writes, and what it prints at the end."""

    sizes: Any
    output: str
    page: Path | None
    force: bool
    as_json: bool
    dtype: str


def _write_beside(conversion: Conversion, figure: tuple[Path, Path] | None, save_plan: str | None, force: bool) -> None:
    """The figure of a search, and the plan, where they were asked for."""
    from ..report.sheets import search_sheet
    from ..report.writing import write_figure

    if figure and conversion.search:
        write_figure(search_sheet(conversion.search), *figure, force)
    if save_plan:
        conversion.plan.save(save_plan, force)


def _plan(file: str) -> Plan:
    """The plan of a JSON file, or of a harmonic checkpoint."""
    from ..plan.plan import Plan
    from ..storage.checkpoint import is_harmonic, read_header

    return read_header(file).plan if is_harmonic(file) else Plan.load(file)


def _kept(lam: str | None, plan_file: str | None, asked: Budget | None, max_drop: float | None) -> str:
    """What a file is called after that keeps this."""
    if asked is not None:
        return str(asked).replace("=", "").replace("%", "")
    return f"drop{max_drop:g}" if max_drop is not None else "plan" if plan_file else lam or "full"


def _what_to_keep(
    plan_file: str | None, lam: str | None, budget: tuple[str, ...], max_drop: float | None, labelled: str | None
) -> tuple[Any, Budget | None]:
    """The lambda and the budget that the options name; raises UsageError where what to keep is said twice, or in
    half."""
    from ..arguments import Budget, parse_lambda
    from ..errors import UsageError

    if sum((plan_file is not None, lam is not None, bool(budget), max_drop is not None)) > 1 or len(budget) > 1:
        raise UsageError("--plan, --lambda, --budget and --max-drop each say what to keep: give one of them, once")
    if (max_drop is None) != (labelled is None):
        raise UsageError("--max-drop POINTS is measured on --labelled DATA: give both")
    if not budget and max_drop is None:
        options.only_with(budget_options, "--budget")
    return parse_lambda(lam if lam is not None else "full"), Budget.parse(budget[0]) if budget else None


def _keep(network: Network, source: str, target: _Target) -> int:
    """Write a network that is harmonic already as it is; the file takes its place once it is compared with it."""
    from ..errors import CheckError
    from ..files import write_file
    from ..network.distributed import rank
    from ..network.forms import dense_form
    from ..pipeline.saving import save
    from ..pipeline.verify import verify
    from ..report import tables
    from ..storage.checkpoint import read_checkpoint

    sizes, output, page, force, as_json, _ = target
    if rank() > 0:
        return 0
    inputs = options.verification_inputs(sizes, network.source)
    recorded = network.header.history if network.header else {}
    history = {"command": record_of_command(source)} if not recorded else None
    written: list[tuple[Header, Verification]] = []

    def write(staging: Path) -> None:
        file = staging.with_name("network.safetensors")  # the target may be called otherwise, behind a link
        header = save(network, file, history=history, force=True)
        loaded = read_checkpoint(file, model=dense_form(network.model))
        check = verify(network.model, loaded, **inputs)
        if not check.ok:
            raise CheckError(f"{output}, read back: {check.verdict}; nothing was written")
        file.replace(staging)
        written.append((header, check))

    write_file(output, write, force)
    ((header, check),) = written
    if page:
        pages.write_page(network.model, header, output, page, force, sizes)
    if as_json:
        options.print_json({"output": output, "plan": header.plan.to_json(), "verification": check.to_json()})
        return 0
    console = options.console()
    console.print(f"{network.source} is harmonic already: written as it is; --lambda says what to cut", markup=False)
    console.print(check.verdict, markup=False)
    console.print(f"wrote {output} ({tables.file_size(output)})", markup=False)
    return 0


def _finish(
    network: Network,
    conversion: Conversion,
    made_by: dict[str, Any],
    target: _Target,
    held_out: Any,
    images: Sequence[Tensor],
) -> None:
    """Show what was done, verify it, write it."""
    from ..errors import CheckError
    from ..pipeline.precision import in_fewer_bits
    from ..pipeline.saving import save
    from ..pipeline.verify import verify
    from ..report import tables

    sizes, output, page, force, as_json, dtype = target
    console = options.console(quiet=as_json)
    if conversion.search:
        console.print(tables.search_table(conversion.search))
        for note in conversion.search.notes:
            console.print(note, markup=False)
    if conversion.drops:
        console.print(tables.drops_table(conversion.drops))
    console.print(tables.conversion_table(conversion))
    if conversion.calibration:
        console.print(tables.calibration_table(conversion.calibration))
        for line in tables.calibration_lines(conversion.calibration):
            console.print(line, markup=False)
    for line in tables.cost_lines(conversion.cost):
        console.print(line)
    options.say("verifying")
    with options.progress() as progress:
        inputs = options.verification_inputs(sizes, network.source, images)
        check = verify(network.model, conversion, **inputs, progress=progress)
    if not (check.ok or (check.as_planned and not conversion.plan.whole)):
        raise CheckError(f"{check.verdict}; nothing was written")
    console.print(check.verdict, markup=False)
    if dtype != "float32":
        conversion, difference = in_fewer_bits(conversion, dtype, inputs["inputs"])
        console.print(f"rounded to {dtype}: outputs differ by {difference:.1e} of the largest", markup=False)
    judged = {name: found.to_json() for name, found in held_out.items()} if held_out else None
    history = {"command": made_by} | ({"held_out": judged} if judged else {})
    header = save(conversion, output, source=network.source, history=history, force=force)
    options.keep(lambda: f"{output} was written, and is whole")
    console.print(f"wrote {output} ({tables.file_size(output)})", markup=False)
    if page:
        pages.write_page(conversion.model, header, output, page, force, sizes)
        console.print(f"wrote {page}", markup=False)
    if held_out:
        for name, found in held_out.items():
            console.print(f"{name}, on the images that chose nothing: {found}", markup=False)
    if conversion.advice:
        options.say(f"warning: {conversion.advice}", urgent=True)
    if as_json:
        told = {"output": output, **conversion.to_json(), "verification": check.to_json()}
        options.print_json({**told, "held_out": judged} | ({"report": str(page)} if page else {}))
