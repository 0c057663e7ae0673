"""harmconvert convert"""

from __future__ import annotations

from typing import Any

import click

from . import options


@click.command(name="convert")
@click.argument("source")
@click.option(
    "--lambda",
    "lam",
    default="full",
    show_default=True,
    metavar="LAMBDA",
    help="What to keep: full (exact), progressive (by map size, as the paper), a number meant for 3x3 kernels and "
    "scaled to others, or 'PATTERN=N,PATTERN=N' with literal levels.",
)
@click.option("--plan", "plan_file", metavar="FILE", help="Follow a plan saved as JSON instead of a lambda.")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Convert only layers whose name matches, and cut them even where the policy would spare them; repeatable.",
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave layers whose name matches as they are; repeatable."
)
@click.option(
    "--normalization",
    type=click.Choice(["ortho", "l1"]),
    default="ortho",
    show_default=True,
    help="Scale of the DCT filters; l1 only for parity with the paper's ImageNet networks.",
)
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-harmonic-LAMBDA.safetensors.")
@options.force
@options.input_size
@options.network_options
@options.common
def command(
    source: str,
    lam: str,
    plan_file: str | None,
    output: str | None,
    force: bool,
    input_size: Any,
    as_json: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    normalization: str,
    **network_options: Any,
) -> None:
    """Convert the network SOURCE to harmonic form, verify it, and write one .safetensors file.

    SOURCE: a timm name, torchvision:NAME, hf-hub:USER/REPO, local-dir:PATH, sample:NAME, FILE.py:FACTORY,
    package.module:factory, or a harmonic checkpoint.

    \b
    Example:
      harmconvert convert resnet50 --lambda progressive
      harmconvert convert sample:resnet_mnist5k --lambda 'stage3.*=2' -o cut.safetensors
    """
    from ..checkpoint import default_name, save
    from ..convert import convert
    from ..errors import CheckError, UsageError
    from ..files import check_output
    from ..plan import Plan, parse_lambda
    from ..report import tables
    from ..verify import verify

    if plan_file and lam != "full":
        raise UsageError("--plan and --lambda both say what to keep: give one of them")
    policy: Any = Plan.load(plan_file) if plan_file else parse_lambda(lam)
    output = output or default_name(source, "plan" if plan_file else lam)
    check_output(output, force)
    options.say(f"loading {source}")
    network = options.opened(source, network_options, form="dense")
    conversion = convert(
        network.model,
        policy,
        example_input=options.example_input(input_size, network.model),
        include=include,
        exclude=exclude,
        normalization=normalization,
    )
    console = options.console(quiet=as_json)
    console.print(tables.conversion_table(conversion))
    for line in tables.cost_lines(conversion.cost):
        console.print(line)
    if conversion.advice:
        options.say(f"note: {conversion.advice}")
    options.say("verifying")
    check = verify(network.model, conversion.model, options.verification_inputs(input_size, network.source))
    if not (check.ok or (check.as_planned and not conversion.plan.whole)):
        raise CheckError(f"{check.verdict}; nothing was written")
    save(conversion, output, source=network.source, force=force)
    console.print(check.verdict, markup=False)
    console.print(f"wrote {output} ({tables.file_size(output)})", markup=False)
    if as_json:
        options.print_json({"output": output, **conversion.to_json(), "verification": check.to_json()})
