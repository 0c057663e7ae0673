"""harmconvert benchmark"""

from __future__ import annotations

from typing import Any

import click

from . import images, inputs, next_step, options, types
from .groups import Grouped
from .listening import CommandLine


@click.command(name="benchmark", cls=Grouped)
@click.argument("source", type=inputs.SourceText())
@click.option(
    "-b",
    "--batch-size",
    "batches",
    type=types.Count(min=1),
    multiple=True,
    default=(1, 16),
    show_default=True,
    help="Examples in one forward pass; repeatable.",
)
@click.option(
    "--threads", type=types.Count(min=1), multiple=True, help="Number of torch threads; repeatable. Default: all cores."
)
@click.option(
    "--form",
    "forms",
    type=click.Choice(["dense", "harmonic", "factored"]),
    multiple=True,
    default=("dense", "harmonic", "factored"),
    show_default=True,
    help="Forms to measure; repeatable.",
)
@click.option(
    "--layout",
    "layouts",
    type=click.Choice(["contiguous", "channels_last"]),
    multiple=True,
    default=("contiguous", "channels_last"),
    show_default=True,
    help="Memory layouts to measure; repeatable.",
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(["torch", "onnx", "openvino"]),
    multiple=True,
    default=("torch", "onnx", "openvino"),
    show_default=True,
    help="Where to measure, if it is installed; repeatable.",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["f32", "bf16", "int8"]),
    multiple=True,
    default=("f32", "bf16", "int8"),
    show_default=True,
    help="What to compute in, if the runtime and the processor can; repeatable.",
)
@click.option("--torchcompile", is_flag=True, help="Measure each form under torch.compile, too.")
@click.option(
    "--repeats", type=types.Count(min=3), default=9, show_default=True, help="Repeats of each measurement, in turns."
)
@click.option(
    "--max-drop",
    type=types.FiniteRange(min=0),
    default=1.0,
    show_default=True,
    help="With --data: the largest loss of low precision that the advice allows, in % of the images that are held "
    "back: those with another top-1.",
)
@click.option("--layers", is_flag=True, help="Print for each layer which form was chosen, and why.")
@options.input_size
@options.device
@options.metric
@images.comparison_options
@options.network_options
@options.verbosity
@options.common
def command(
    source: str,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    forms: tuple[str, ...],
    layouts: tuple[str, ...],
    runtimes: tuple[str, ...],
    precisions: tuple[str, ...],
    torchcompile: bool,
    metric: str | None,
    repeats: int,
    max_drop: float,
    layers: bool,
    input_size: Any,
    device: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure the forms of the network SOURCE on this machine, and say which one to deploy.

    \b
    Example:
      harmconvert benchmark resnet50-harmonic-2.safetensors -b 16
      harmconvert benchmark resnet50-harmonic-2.safetensors --torchcompile --threads 1 --threads 2 --json
    """
    inputs.check()
    images.check_calibration(values, input_size, images.comparison_options)
    from ..calibration import CalibrationSettings
    from ..errors import counted
    from ..pipeline.benchmark import benchmark
    from ..report import tables

    result = benchmark(
        options.request(source, values),
        input_sizes=input_size,
        batches=batches,
        threads=threads,
        forms=forms,
        layouts=layouts,
        compiled=torchcompile,
        repeats=repeats,
        runtimes=runtimes,
        precisions=precisions,
        data=images.calibration_request(values),
        max_drop=max_drop,
        metric=metric,
        settings=CalibrationSettings(seed=values["seed"], inputs=values["calibration_images"]),
        preprocessing=images.preprocessing_overrides(values),
        device=device,
        listener=CommandLine(),
    )
    if as_json:
        options.print_json(result.to_json())
        return
    console = options.console()
    console.print(tables.benchmark_rows(result))
    if layers:
        for (batch, count), chosen in result.factorings.items():
            console.print(tables.factored_layers(chosen, f"batch {batch}, {counted(count, 'thread')}"))
    made = [next_step.to_make(row, result.max_drop, source, values["data"]) for row in result.advised()]
    for line in (*result.advice(), *made, *(f"note: {note}" for note in result.notes)):
        console.print(line, markup=False, soft_wrap=True)
    next_step.after_benchmark(console, made)
