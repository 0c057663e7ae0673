"""harmconvert verify"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, next_step, options, types


@click.command(name="verify")
@click.argument("original", type=inputs.SourceText())
@click.argument("converted", type=inputs.SourceText())
@click.option(
    "--tolerance",
    type=types.FiniteRange(min=0),
    help="Accept this relative difference of the outputs; default: 1e-12 for float64 weights, 1e-5 for float32.",
)
@click.option(
    "--as-planned",
    is_flag=True,
    help="Accept a cut network if each kernel is the projection that the plan describes.",
)
@options.input_size
@options.network_options
@options.verbosity
@options.common
def command(
    original: str,
    converted: str,
    tolerance: float | None,
    as_planned: bool,
    input_size: Any,
    as_json: bool,
    **network_options: Any,
) -> int:
    """Compare the network ORIGINAL with CONVERTED: a harmonic checkpoint, or a dense export.

    The exit code is 0 if both compute the same within the tolerance, and 1 if they do not. A cut network differs from
    its original: give --tolerance or --as-planned for it.

    \b
    Example:
      harmconvert verify resnet50 resnet50-harmonic-full.safetensors
      harmconvert verify resnet50 resnet50-harmonic-progressive.safetensors --as-planned
    """
    inputs.check()
    from ..arguments import may_be_harmonic
    from ..pipeline.inputs import verification_inputs
    from ..pipeline.verify import verify
    from ..report import tables
    from ..sources.opening import open_counterpart

    network = options.opened(original, network_options, form="harmonic")
    with options.busy(f"loading {converted}"):
        other = open_counterpart(converted, network)
    examples = verification_inputs(input_size, network.source)
    with options.progress() as progress:
        check = verify(network.model, other, **examples, tolerance=tolerance, progress=progress)
    passed = check.ok or (as_planned and check.as_planned)
    console = options.console(quiet=as_json)
    console.print(tables.verification_table(check))
    for line in (*check.notes, check.verdict):
        console.print(line, markup=False)
    if as_json:
        options.print_json({"passed": passed, **check.to_json()})
    if not passed:
        advice = "; --as-planned accepts a cut" if check.as_planned and any(layer.cut for layer in check.layers) else ""
        options.say(f"harmconvert: check failed: {check.verdict}{advice}", urgent=True)
    elif may_be_harmonic(converted):
        next_step.suggest(console, *next_step.to_export(converted, original, network_options["code"]))
    return 0 if passed else 1
