"""harmconvert finetune"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import inputs, options, pages, training_options, training_progress, types
from .recording import record_of_command

if TYPE_CHECKING:
    from torch import nn

    from ..data.datasets import Data
    from ..pipeline.finetuning import Setting
    from ..storage.checkpoint import Header, Network, Source
    from ..training import Recipe


@click.command(name="finetune", cls=types.OptionalValues)
@click.argument("source", type=inputs.SourceText())
@training_options.image_options
@training_options.holdout
@training_options.recipe_options
@click.option(
    "--train-only",
    type=click.Choice(["all", "coefficients"]),
    help="What to train; coefficients: those of harmonic layers, all else stays.",
)
@click.option(
    "--num-classes",
    type=types.Count(min=1),
    help="Give the network a new classifier, for data of other classes (reset_classifier() as timm's networks have, or "
    "the last layer of what torchvision calls fc, classifier, heads or head).",
)
@click.option(
    "--distill",
    type=types.FiniteRange(0, 1),
    is_flag=False,
    flag_value=1.0,
    help="Share of the loss that follows the uncut network's logits; --distill alone: all of it, no labels needed. "
    "Default: 0, or 1 where the images have no labels.",
)
@click.option("--distill-temperature", "temperature", type=types.FiniteRange(), help="By which logits are softened.")
@click.option(
    "--teacher",
    type=inputs.SourceText(),
    help="The uncut network, or a file of its weights; default: what the checkpoint was converted from.",
)
@click.option(
    "--calibration-images",
    type=types.Count(min=0),
    default=256,
    show_default=True,
    help="Training images, labels unseen, to calibrate on first where convert has not; 0: do not.",
)
@click.option("-o", "--output", metavar="FILE", help="Default: NAME-finetuned.safetensors.")
@pages.option
@options.force
@training_options.run_options
@options.trust_code
@options.loudness
@options.common
def command(
    source: str,
    output: str | None,
    report: str | None,
    force: bool,
    teacher: str | None,
    num_classes: int | None,
    calibration_images: int,
    trust_code: bool,
    code: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Fine-tune the harmonic checkpoint SOURCE: the paper's 5 epochs, unless options say otherwise.

    Ends with a harmonic checkpoint and what the network was worth uncut, cut, calibrated and fine-tuned. Batches are of
    all processes together: `torchrun --nproc-per-node N -m harmconvert finetune ...` comes to the same.

    \b
    Example:
      harmconvert finetune resnet50-harmonic-progressive.safetensors --data-dir imagenet/
      harmconvert finetune cut.safetensors --data-dir photographs/ --distill      # no labels needed
      harmconvert finetune cut.safetensors --dataset sample:mnist5k --hflip 0 --scale 0.7 1
    """
    output, given = output or default_output(source), {**given, "trust_code": trust_code}
    inputs.check_outputs(output, given, force)
    page = pages.checked(output, report, force)
    inputs.check_run(given)
    from ..arguments import check_harmonic

    check_harmonic(source)
    from contextlib import ExitStack

    from ..data.preprocessing import record_of
    from ..network.distributed import joined, rank
    from ..pipeline.finetuning import finetune
    from ..report import tables
    from ..storage.checkpoint import write_checkpoint

    with joined(), ExitStack() as held:
        job = prepare(source, output, force, given, teacher, num_classes, trust_code, code)
        held.enter_context(job.setting.keeper.alone())
        record = training_options.recorder(output, given["log"])
        with training_progress.progress(job.recipe.epochs) as (told, epoch_done, tested):

            def after_epoch(rows: Any) -> None:
                record(rows)
                epoch_done(rows[-1])

            setting = replace(job.setting, told=told, tested=tested, epoch_done=after_epoch)
            done = finetune(
                job.model,
                job.header,
                job.data,
                job.recipe,
                setting,
                original=job.original,
                why_no_original=job.why_no_original,
                calibration_images=calibration_images,
            )
        if rank() > 0:
            return
        with training_options.kept(setting.keeper):
            header = write_checkpoint(
                done.model,
                output,
                header=job.header,
                source=job.source,
                history=done.history(job.header.history, record_of_command(source, done.recipe.to_json())),
                preprocessing=record_of(setting.preprocessing),
                force=force,
            )
        setting.keeper.remove()
        if page:
            pages.write_page(done.model, header, output, page, force)
    console = options.console(quiet=as_json)
    console.print(tables.stages_table(done.stages))
    console.print(f"wrote {output} ({tables.file_size(output)})", markup=False)
    if page:
        console.print(f"wrote {page}", markup=False)
    if as_json:
        options.print_json({"output": output, **done.record()} | ({"report": str(page)} if page else {}))


@dataclass(frozen=True)
class Job:
    """A harmonic checkpoint, its uncut network where that can be had, and what to train on, how and with what."""

    model: nn.Module
    header: Header
    source: Source | None
    original: nn.Module | None
    why_no_original: str
    data: Data
    recipe: Recipe
    setting: Setting


def prepare(
    source: str,
    output: str,
    force: bool,
    given: dict[str, Any],
    teacher: str | None,
    num_classes: int | None,
    trust_code: bool,
    code: str | None,
) -> Job:
    """Load all that a fine-tuning needs.

    Raises:
        UsageError: SOURCE is no harmonic checkpoint; InputError, OutsideError: something cannot be read or had.
    """
    from ..errors import UsageError, counted
    from ..network.state import weights_sha256
    from ..pipeline.finetuning import Setting, new_classifier
    from ..sources.opening import check_rebuilds

    network, header = _opened(source, trust_code, code)
    recorded = network.source
    trust_code = trust_code or code is not None
    original, why = None, ""
    if num_classes is not None:
        recorded = new_classifier(network.model, num_classes, recorded)
        check_rebuilds(recorded, network.model, trust_code)
        why = f"the uncut network has not the new classifier of {counted(num_classes, 'class')}"
    else:
        original, why = _uncut(network.model, header, teacher, trust_code)
    data = training_options.data_from(given, training_options.seed_from(given), ("train", "test"))
    wanted = {"train_only": given["train_only"], "distill": given["distill"], "temperature": given["temperature"]}
    if not data.labelled and wanted["distill"] is None and not given["resume"]:
        options.say("note: these images have no labels, so the uncut network teaches (--distill)")
        wanted["distill"] = 1.0
    recipe = training_options.recipe_from("finetune", given, **wanted)
    if recipe.distill and original is None:
        raise UsageError(f"--distill needs the uncut network: {why or 'there is none'}; name it with --teacher SOURCE")
    if original is None:
        remedy = "" if "--teacher" in why or num_classes is not None else "; name it with --teacher SOURCE"
        options.say(f"note: the uncut network is not known ({why}): neither are its accuracy and that of a cut{remedy}")
    options.say(str(recipe))
    preprocessing = training_options.preprocessing_from(given, network.model)
    identity = {
        "recipe": recipe.to_json(),
        "data": training_options.data_identity(given, data, preprocessing),
        "plan": header.plan.to_json(),
        "weights": weights_sha256(network.model),
    }
    if recipe.distill and original is not None:
        identity["teacher"] = weights_sha256(original)
    setting = Setting(
        preprocessing,
        training_options.machine_from(given),
        training_options.workers_from(given),
        keeper=training_options.keeper_from(given, output, identity, force),
        resume=Path(given["resume"]) if given["resume"] else None,
        say=options.say,
    )
    return Job(network.model, header, recorded, original, why, data, recipe, setting)


def _opened(source: str, trust_code: bool, code: str | None) -> tuple[Network, Header]:
    """The harmonic checkpoint to fine-tune, in float32, and its header."""
    from ..arguments import not_harmonic
    from ..storage.precision import in_float32

    network = options.opened(source, {"trust_code": trust_code, "code": code}, intact=True)
    if network.header is None:
        raise not_harmonic(source)
    in_float32(network.model)
    return network, network.header


def _uncut(model: nn.Module, header: Header, teacher: str | None, trust_code: bool) -> tuple[nn.Module | None, str]:
    """The uncut network of a checkpoint, or None and why it is not known."""
    from ..errors import HarmconvertError, UsageError, counted
    from ..sources.opening import open_original
    from ..training.learner import number_of_classes

    try:
        with options.busy("loading the uncut network"):
            original = open_original(header, teacher, trust_code)
    except HarmconvertError as error:
        if teacher is not None:
            raise
        return None, str(error)
    theirs, ours = number_of_classes(original), number_of_classes(model)
    if theirs == ours:
        return original, ""
    why = f"the uncut network has {counted(theirs or 0, 'class')}, this one {ours}"
    if teacher is not None:
        raise UsageError(f"--teacher {teacher}: {why}")
    return None, why


def default_output(source: str) -> str:
    """Where the fine-tuned checkpoint goes unless told: NAME-finetuned.safetensors, here."""
    return f"{Path(source.removeprefix('reference:')).stem}-finetuned.safetensors"
