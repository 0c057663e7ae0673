"""harmconvert inspect"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, next_step, options


@click.command(name="inspect")
@click.argument("source", type=inputs.SourceText())
@click.option("--no-pretrained", is_flag=True, help="Do not download weights; show sizes and MACs only.")
@options.input_size
@options.network_options
@options.common
def command(source: str, no_pretrained: bool, input_size: Any, as_json: bool, **network_options: Any) -> None:
    """Show what a conversion of SOURCE could gain. Nothing is changed or written.

    \b
    Example:
      harmconvert inspect resnet50
      harmconvert inspect torchvision:resnet18 --no-pretrained --json
    """
    inputs.check()
    from ..errors import Message, OutsideError
    from ..pipeline.inputs import zeros_of
    from ..pipeline.inspect import inspect
    from ..report import tables

    try:
        network = options.opened(source, network_options, pretrained=not no_pretrained, form="dense")
        weights = not no_pretrained
    except OutsideError as error:
        options.say(Message("note: ", error.message, "; sizes and MACs only"))
        network, weights = options.opened(source, network_options, pretrained=False, form="dense"), False
    with options.busy(f"inspecting {source}"):
        inspection = inspect(network.model, zeros_of(input_size, network.model), energies=weights)
    if as_json:
        options.print_json({"source": str(network.source), **inspection.to_json()})
        return
    console = options.console()
    console.print(tables.inspection_layers(inspection))
    for line in tables.inspection_lines(inspection):
        console.print(line, markup=False)
    console.print(tables.inspection_policies(inspection))
    next_step.suggest(console, *next_step.to_convert(source, inspection.parameter_share))
