"""harmconvert finetune"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from . import inputs, next_step, options, pages, training_options, types
from .advice import adapted
from .listening import CommandLine
from .recipe import recipe
from .recording import command_words


@training_options.with_shown_defaults
@click.command(name="finetune", cls=types.OptionalValues)
@click.argument("source", type=inputs.SourceText())
@recipe
@training_options.image_options
@training_options.holdout
@training_options.recipe_options
@options.metric
@click.option(
    "--loss",
    metavar="NAME",
    help="cross-entropy (classes or pixels), l1, l2, detector (the losses of torchvision's detectors), distillation "
    "(from the outputs of the uncut network, without targets), or FILE.py:FUNCTION of (outputs, targets). Default: "
    "that of the kind of data.",
)
@click.option(
    "--train-only",
    type=click.Choice(["all", "coefficients"]),
    help="What to train; coefficients: only the coefficients of harmonic layers.",
)
@click.option(
    "--num-classes",
    type=types.Count(min=1),
    help="Give the network a new classifier, for data with other classes. timm's networks make it by "
    "reset_classifier(); in torchvision's, the last layer of fc, classifier, heads or head is replaced.",
)
@click.option(
    "--distill",
    type=types.FiniteRange(0, 1),
    is_flag=False,
    flag_value=1.0,
    help="Share of the loss that compares with the outputs of the uncut network; --distill alone: 1, which needs no "
    "labels. Default: 0; 1 if the images have no labels, or the checkpoint has low ranks.",
)
@click.option(
    "--distill-temperature",
    "temperature",
    type=types.FiniteRange(),
    help="Temperature that divides the logits for --distill.",
)
@click.option(
    "--teacher",
    type=inputs.SourceText(),
    help="The uncut network, or a file of its weights; default: the source of the checkpoint.",
)
@click.option(
    "--calibration-images",
    type=types.Count(min=0),
    default=256,
    show_default=True,
    help="Number of training images for calibration, without their labels, if convert did not calibrate the cut; 0: do "
    "not calibrate.",
)
@click.option(
    "--recode",
    is_flag=True,
    help="For a file whose weights are coded: train all weights and code them again. Without it, coded weights keep "
    "their integers; biases, norms and one scale for each output channel are trained, and the file keeps its size.",
)
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-finetuned.safetensors.")
@pages.option
@options.force
@training_options.run_options
@options.trust_code
@options.verbosity
@options.common
def command(
    source: str,
    output: str | None,
    report: str | None,
    force: bool,
    metric: str | None,
    loss: str | None,
    teacher: str | None,
    num_classes: int | None,
    calibration_images: int,
    recode: bool,
    trust_code: bool,
    code: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Fine-tune the harmonic checkpoint SOURCE: 5 epochs of SGD as in the paper, unless options say otherwise.

    Writes a harmonic checkpoint, and prints the accuracy of the network uncut, cut, calibrated and fine-tuned. Batch
    sizes count all processes together: `torchrun --nproc-per-node N -m harmconvert finetune ...` gives the same result.

    \b
    Example:
      harmconvert finetune resnet50-harmonic-progressive.safetensors --data imagenet/
      harmconvert finetune cut.safetensors --data photographs/ --distill      # no labels needed
      harmconvert finetune cut.safetensors --data sample:mnist5k --hflip 0 --scale 0.7 1
    """
    from ..arguments import check_harmonic, check_run_outputs

    output = output or default_output(source)
    check_run_outputs(output, values["resume"], force)
    page = pages.checked(output, report, force)
    inputs.check_run(values)
    check_harmonic(source)
    from ..pipeline.finetune import finetune
    from ..report import tables

    result = finetune(
        options.request(source, {"trust_code": trust_code, "code": code}),
        training_options.data_request(values),
        output,
        metric=metric,
        loss=loss,
        teacher=teacher,
        num_classes=num_classes,
        calibration_images=calibration_images,
        recode=recode,
        preprocessing=training_options.image_overrides({**values, "trust_code": trust_code}),
        force=force,
        command=command_words(leave_out=training_options.recipe_fields()),
        listener=CommandLine(),
        **training_options.run_arguments(values),
        **training_options.changes(values),
    )
    console = options.console(quiet=as_json)
    console.print(tables.stages_table([replace(stage, why=adapted(stage.why or "")) for stage in result.stages]))
    console.print(f"wrote {output} ({tables.file_size(output)})", markup=False)
    if page:
        assert result.header is not None
        pages.write_page(result.model, result.header, output, page, force)
        console.print(f"wrote {page}", markup=False)
    next_step.suggest(console, *next_step.to_export(output, code=code, trust_code=trust_code))
    if as_json:
        options.print_json(result.to_json() | ({"report": str(page)} if page else {}))


def default_output(source: str) -> str:
    """Return the default output: NAME-finetuned.safetensors, in the current folder."""
    return f"{Path(source.removeprefix('reference:')).stem}-finetuned.safetensors"
