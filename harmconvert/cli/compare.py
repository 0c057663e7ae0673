"""harmconvert compare"""

from __future__ import annotations

from typing import Any

import click

from . import groups, images, inputs, options
from .listening import CommandLine


@click.command(name="compare")
@click.argument("sources", type=inputs.SourceText(), nargs=-1, required=True, metavar="A B [C ...]")
@click.option("--all-layers", is_flag=True, help="Also show layers that keep the same in all checkpoints.")
@options.metric
@click.option(
    "--data",
    "--labelled",
    "labelled",
    cls=groups.Renamed,
    metavar="DATA",
    help="Measure the networks on this data: a folder with a folder for each class, sample:mnist5k, or a timm data "
    "set. Default: show what the checkpoints record. (Also: --labelled.)",
)
@images.preprocessing_options
@options.input_size
@options.trust_code
@options.common
def command(
    sources: tuple[str, ...],
    all_layers: bool,
    metric: str | None,
    labelled: str | None,
    input_size: Any,
    trust_code: bool,
    code: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Show the harmonic checkpoints A, B, ... side by side: sizes, accuracies, and differences of the plans.

    \b
    Example:
      harmconvert compare resnet50-harmonic-2.safetensors resnet50-harmonic-progressive.safetensors
      harmconvert compare cut.safetensors cut-finetuned.safetensors --json
    """
    from ..arguments import check_harmonic
    from ..errors import UsageError

    if len(sources) < 2:
        raise UsageError("a comparison needs two checkpoints or more")
    inputs.check()
    if labelled is not None:
        inputs.check_labelled(labelled, None)
    else:
        options.only_with(images.preprocessing_options, "--data DATA")
    for source in sources:
        check_harmonic(source)
    from ..report import compare, comparison_table, differences_table
    from ..sources.opening import made_by_code

    requests = [
        options.request(source, {"trust_code": trust_code, "code": code if made_by_code(source) else None})
        for source in sources
    ]
    comparison = compare(
        *requests, all_layers=all_layers, input_sizes=input_size, metric=metric,
        data=images.labelled_request(labelled, {"data_dir": None}),
        preprocessing=images.preprocessing_overrides({**values, "trust_code": trust_code}), listener=CommandLine(),
    )  # fmt: skip
    if as_json:
        options.print_json(comparison.to_json())
        return
    console = options.console()
    console.print(comparison_table(comparison))
    if comparison.layers:
        if console.is_terminal:
            console.print()
        console.print(differences_table(comparison))
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False)
