"""harmconvert export"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, options
from .listening import CommandLine


@click.command(name="export")
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--format",
    type=click.Choice(["dense", "timm", "onnx", "torch-export"]),
    default="dense",
    show_default=True,
    help="dense: a plain state dict (.safetensors) for stock timm or torchvision; timm: a folder for local-dir:PATH; "
    "onnx: one file for any batch size, compared in ONNX Runtime (pip install 'harmconvert[onnx]'); torch-export: a "
    ".pt2 program.",
)
@click.option(
    "--form",
    type=click.Choice(["dense", "factored"]),
    default="dense",
    show_default=True,
    help="onnx, torch-export: factored writes a cut convolution as a depthwise one and a 1x1, if that is faster.",
)
@options.dtype
@click.option("-o", "--output", required=True, metavar="PATH", help="File to write; for timm a folder.")
@options.force
@options.input_size
@options.network_options
@options.verbosity
@options.common
def command(
    source: str,
    format: str,
    form: str,
    dtype: str,
    output: str,
    force: bool,
    input_size: Any,
    as_json: bool,
    **network_options: Any,
) -> None:
    """Write the network SOURCE with plain convolutions, for use without harmconvert.

    \b
    Example:
      harmconvert export resnet50-harmonic-progressive.safetensors -o resnet50-dense.safetensors
      harmconvert export resnet50-harmonic-progressive.safetensors --format timm -o resnet50/
      harmconvert export resnet50-harmonic-2.safetensors --format onnx --form factored -o resnet50.onnx
    """
    from ..arguments import check_format

    check_format(output, format, force, dtype, form)
    inputs.check()
    options.begin(source)
    from ..pipeline.export import export
    from ..report import tables

    exported = export(
        options.request(source, network_options),
        output,
        format,
        form=form,
        dtype=dtype,
        input_sizes=input_size,
        force=force,
        listener=CommandLine(source),
    )
    if as_json:
        options.print_json(exported.to_json())
        return
    console = options.console()
    for line in tables.export_lines(exported.check, dtype) if exported.check else ():
        console.print(line, markup=False)
    console.print(f"wrote {output} ({tables.file_size(output)})", markup=False)
