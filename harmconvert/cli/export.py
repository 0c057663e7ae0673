"""harmconvert export"""

from __future__ import annotations

from typing import Any

import click

from . import options


@click.command(name="export")
@click.argument("source")
@click.option(
    "--format",
    type=click.Choice(["dense", "timm"]),
    default="dense",
    show_default=True,
    help="dense: a plain state dict (.safetensors) for stock timm or torchvision; timm: a folder for local-dir:.",
)
@click.option("-o", "--output", required=True, metavar="PATH", help="File (dense) or folder (timm) to write.")
@options.force
@options.network_options
@options.loudness
@options.common
def command(source: str, format: str, output: str, force: bool, as_json: bool, **network_options: Any) -> None:
    """Write the network SOURCE with plain convolutions, for use without harmconvert.

    \b
    Example:
      harmconvert export resnet50-harmonic-progressive.safetensors -o resnet50-dense.safetensors
      harmconvert export resnet50-harmonic-progressive.safetensors --format timm -o resnet50/
    """
    from ..export import check_target, export
    from ..report import tables

    check_target(output, format, force)
    network = options.opened(source, network_options)
    export(network.model, output, format, force=force)
    if as_json:
        options.print_json({"output": output, "format": format, "source": str(network.source)})
    else:
        options.console().print(f"wrote {output} ({tables.file_size(output)})", markup=False)
