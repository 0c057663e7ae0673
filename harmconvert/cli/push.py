"""harmconvert push"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, next_step, options
from .listening import CommandLine
from .recording import command_words


@click.command(name="push")
@click.argument("checkpoint", type=inputs.InputFile())
@click.argument("repository", metavar="USER/REPO")
@click.option("--local", metavar="FOLDER", help="Write the same files to FOLDER, and send nothing: look at them first.")
@click.option(
    "--license",
    metavar="ID",
    help="Licence of the weights, as the hub names it (apache-2.0, mit, cc-by-nc-4.0); default: what the file records.",
)
@click.option("--private", is_flag=True, help="Make a new repository private; default: public.")
@click.option("--force", is_flag=True, help="Add a commit to a repository that exists, or replace FOLDER.")
@options.trust_code
@options.verbosity
@options.common
def command(
    checkpoint: str,
    repository: str,
    local: str | None,
    license: str | None,
    private: bool,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Publish the harmonic CHECKPOINT on the Hugging Face hub as USER/REPO.

    The repository gets the checkpoint, weights for stock timm, and a model card made from the record in the file. Log
    in first with `hf auth login`, or set HF_TOKEN. The source hf-hub:USER/REPO then names this network.

    \b
    Example:
      harmconvert push resnet50-harmonic-progressive.safetensors me/resnet50-small --local preview/
      harmconvert push resnet50-harmonic-progressive.safetensors me/resnet50-small
    """
    from ..arguments import check_hub_name

    inputs.check()
    check_hub_name(repository)
    options.begin(checkpoint)
    from ..report import push, tables

    pushed = push(
        options.request(checkpoint, values),
        repository,
        local=local,
        license=license,
        private=private,
        force=force,
        listener=CommandLine(checkpoint),
    )
    if as_json:
        options.print_json(pushed.to_json())
        return
    console = options.console()
    for name, size in pushed.files.items():
        console.print(f"  {name}: {tables.megabytes(size)}", markup=False)
    for note in pushed.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"wrote {pushed.place}" if local else f"published {pushed.place}", markup=False)
    if local:
        words = command_words(leave_out=("local",))["words"]
        next_step.suggest(console, "push", checkpoint, repository, *words)
