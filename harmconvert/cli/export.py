"""harmconvert export"""

from __future__ import annotations

from typing import Any

import click

from . import images, inputs, next_step, options, types
from .groups import Grouped
from .listening import CommandLine


@click.command(name="export", cls=Grouped)
@click.argument("source", type=inputs.SourceText())
@click.option(
    "--format",
    type=click.Choice(["dense", "timm", "onnx", "openvino", "torch-export"]),
    default="dense",
    show_default=True,
    help="dense: a plain state dict (.safetensors) for stock timm or torchvision; timm: a folder for local-dir:PATH; "
    "onnx: one file for any batch size, compared in ONNX Runtime (pip install 'harmconvert[onnx]'); openvino: a .xml "
    "and a .bin file (pip install 'harmconvert[openvino]'); torch-export: a .pt2 program.",
)
@click.option(
    "--form",
    type=click.Choice(["dense", "factored"]),
    default="dense",
    show_default=True,
    help="onnx, openvino, torch-export: factored writes a cut convolution as a depthwise one and a 1x1, if that is "
    "faster in the runtime and precision of the file.",
)
@click.option(
    "--precision",
    type=click.Choice(["f32", "f16", "bf16", "int8"]),
    default="f32",
    show_default=True,
    help="openvino; for onnx f32 or int8. int8 needs --data.",
)
@click.option(
    "--max-drop",
    type=types.FiniteRange(min=0),
    default=1.0,
    show_default=True,
    help="The largest loss of low precision, in % of the images that are held back: those with another top-1. Layers "
    "stay in floating point until it is met.",
)
@options.dtype
@click.option("-o", "--output", required=True, metavar="PATH", help="File to write; for timm a folder.")
@options.force
@options.input_size
@images.comparison_options
@options.network_options
@options.verbosity
@options.common
def command(
    source: str,
    format: str,
    form: str,
    dtype: str,
    precision: str,
    max_drop: float,
    output: str,
    force: bool,
    input_size: Any,
    as_json: bool,
    **values: Any,
) -> None:
    """Write the network SOURCE with plain convolutions, for use without harmconvert.

    \b
    Example:
      harmconvert export resnet50-harmonic-progressive.safetensors -o resnet50-dense.safetensors
      harmconvert export resnet50-harmonic-progressive.safetensors --format timm -o resnet50/
      harmconvert export resnet50-harmonic-2.safetensors --format onnx --form factored -o resnet50.onnx
      harmconvert export resnet50 --format openvino --precision int8 --data photos/ -o resnet50.xml
    """
    from ..arguments import check_format

    check_format(output, format, force, dtype, form, precision, values["data"] is not None)
    inputs.check()
    images.check_calibration(values, input_size, images.comparison_options)
    options.begin(source)
    from ..calibration import CalibrationSettings
    from ..pipeline.export import export
    from ..report import tables

    exported = export(
        options.request(source, values),
        output,
        format,
        form=form,
        dtype=dtype,
        precision=precision,
        calibration=images.calibration_request(values),
        max_drop=max_drop,
        settings=CalibrationSettings(seed=values["seed"], inputs=values["calibration_images"]),
        preprocessing=images.preprocessing_overrides(values),
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
    next_step.after_export(console, source)
