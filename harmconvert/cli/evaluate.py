"""harmconvert evaluate"""

from __future__ import annotations

from typing import Any

import click

from . import inputs, next_step, options, training_options, types
from .listening import CommandLine


@click.command(name="evaluate", cls=types.OptionalValues)
@click.argument("source", type=inputs.SourceText())
@training_options.evaluation_options
@options.metric
@options.input_size
@click.option(
    "--compare",
    type=inputs.SourceText(),
    help="A second network, such as the uncut one; measure the agreement with it.",
)
@click.option("--compare-checkpoint", "compare_weights", type=inputs.InputFile(), help="Weights of the second network.")
@click.option(
    "--amp",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    is_flag=False,
    flag_value="bfloat16",
    default="float32",
    help="Precision of the forward pass; --amp alone: bfloat16.",
)
@options.device
@options.network_options
@options.common
def command(
    source: str,
    compare: str | None,
    compare_weights: str | None,
    metric: str | None,
    amp: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure the network SOURCE on data: top-1 with its 95 % interval, top-5, loss, images/s; or another metric.

    \b
    Example:
      harmconvert evaluate resnet50-harmonic-progressive.safetensors --data imagenet/val
      harmconvert evaluate sample:resnet_mnist5k --data sample:mnist5k
    """
    inputs.check_run(values)
    from ..errors import UsageError
    from ..pipeline.evaluate import evaluate
    from ..report import tables
    from ..sources.opening import made_by_code

    if compare_weights and not compare:
        raise UsageError("--compare-checkpoint works only with --compare SOURCE")
    other = None
    if compare:
        other = options.request(compare, {"trust_code": values["trust_code"], "code": values["code"]})
        values["code"] = (
            values["code"] if made_by_code(source) else None
        )  # for a source without user code, it is for the second network
    result = evaluate(
        options.request(source, values),
        training_options.data_request(values),
        metric=metric,
        compare=other,
        compare_weights=compare_weights,
        batch_size=values["batch_size"],
        workers=values["workers"],
        amp=amp,
        preprocessing=training_options.image_overrides(values),
        device=values["device"],
        listener=CommandLine(),
    )
    if as_json:
        options.print_json(result.to_json())
        return
    console = options.console()
    for line in tables.evaluation_lines(result):
        console.print(line, markup=False)
    next_step.after_evaluation(console, source, {**values, "metric": metric})
