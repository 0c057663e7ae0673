"""finetune(): a harmonic checkpoint in, a fine-tuned one out, with what the network does at every stage."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_harmonic, check_run_outputs, not_harmonic
from ..data.datasets import Data, DataRequest
from ..data.preprocessing import preprocessing_record
from ..errors import Argument, HarmconvertError, Message, UsageError, counted
from ..network.distributed import joined, on_first_rank
from ..network.exchange import exchange
from ..network.state import weights_sha256
from ..sources.opening import check_rebuilds, open_original
from ..sources.request import SourceRequest
from ..storage.checkpoint import Network, write_checkpoint
from ..storage.header import Header
from ..storage.precision import in_float32
from ..storage.source import Source
from ..training.recipe import Recipe
from ..training.trainer import MachineSettings, number_of_classes
from .devices import machine_on, workers_for
from .finetuning import FineTuning, Setting, new_classifier, run_finetuning
from .inputs import image_config
from .listener import SILENT, Listener
from .networks import Openable, is_given, known_source, opened, own, text_of
from .runs import data_identity, kept, recipe_for, state_file_for, told
from .testing import opened_data


def finetune(
    model: Openable,
    data: str | Path | DataRequest,
    output: str | Path | None = None,
    *,
    recipe: str | Recipe = "finetune",
    teacher: str | Path | nn.Module | None = None,
    num_classes: int | None = None,
    calibration_images: int = 256,
    preprocessing: Mapping[str, Any] | None = None,
    machine: MachineSettings | None = None,
    workers: int | None = None,
    save_every: int | None = None,
    resume: str | Path | None = None,
    log: str | None = None,
    force: bool = False,
    command: Mapping[str, Any] | None = None,
    listener: Listener = SILENT,
    **changes: Any,
) -> FineTuning:
    """Fine-tune a harmonic network: the paper's 5 epochs, unless a recipe or changes to it say otherwise.

    Says what the network does uncut, cut, calibrated and fine-tuned. A cut that was not calibrated is calibrated first.

    >>> import harmconvert as hc
    >>> layers = nn.Conv2d(1, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    >>> network = nn.Sequential(*layers)
    >>> digits = {"input_size": (1, 28, 28), "preprocess": "none"}
    >>> cut = hc.convert(network, 2)
    >>> tuned = finetune(cut, "sample:mnist5k", preprocessing=digits, epochs=1, crop="none")
    >>> [stage.name for stage in tuned.stages if stage.evaluation]
    ['before', 'fine-tuned']

    Args:
        model: the path of a harmonic checkpoint, a request or a harmonic network; a given network is not changed.
        data: a folder with a folder for each class, ``sample:NAME`` or a timm data set.
        output: the .safetensors file to write; None writes nothing, and keeps no state to resume from.
        recipe: the name of a recipe, or a `Recipe`. changes: its fields, such as ``epochs`` or ``lr``.
        teacher: the uncut network, its source or a file of its weights; default: what the checkpoint was converted
            from.
        num_classes: gives the network a new classifier, for data of other classes.
        calibration_images: training images, labels unseen, to calibrate on; 0 leaves calibration out.
        preprocessing: of images, in timm's words, where it is not the network's own (`harmconvert.data.preprocessing`).
        machine: where and how to run; default: a GPU where there is one.
        workers: processes that load images; default: one for each core.
        save_every: steps after which the state is saved, beside after each epoch.
        resume: a saved state to go on from; all else as when the run was begun.
        log: ``"tensorboard"`` writes events beside the output.
        force: replace files that are there.
        command: name and words of the command that runs this, for the file to record.
        listener: is told what happens.

    Raises:
        UsageError: no harmonic network, outputs that exist, settings that do not fit together.
        InputError: images or a network that cannot be used. CheckError: the loss is no longer finite.
        OutsideError: a disk, a network or a package fails. SignalError: the user ended the run; its state is saved.
    """
    target = None if output is None else str(output)
    if target is not None:
        check_run_outputs(target, resume, force)
    if not is_given(model):
        check_harmonic(text_of(model))
    with joined(), ExitStack() as held:
        cut = _opened(model, num_classes, teacher, listener)
        run = _run(cut, data, recipe, changes, resume, listener)
        config = image_config(cut.model, preprocessing or {}, listener)
        setting = Setting(
            config, machine or machine_on(), workers_for(workers, run.dataset),
            state_file=state_file_for(target, resume, save_every, _identity(cut, run, config), force, listener),
            resume=None if resume is None else Path(resume), say=listener.say,
        )  # fmt: skip
        held.enter_context(setting.state_file.lock())
        with told(setting, run.recipe.epochs, target, log, listener) as telling:
            done = run_finetuning(
                cut.model,
                cut.header,
                run.data,
                run.recipe,
                telling,
                original=cut.original,
                why_no_original=cut.why,
                calibration_images=calibration_images,
            )
        if target is None:
            return done
        made_by = None if command is None else {**command, "source": text_of(model)}
        with kept(setting.state_file):
            header = on_first_rank(
                lambda: write_checkpoint(
                    done.model,
                    target,
                    header=cut.header,
                    source=cut.source,
                    history=done.history(cut.header.history, made_by),
                    preprocessing=preprocessing_record(config),
                    force=force,
                )
            )
        setting.state_file.remove()
        listener.wrote(target)
    return replace(done, output=target, header=header)


@dataclass(frozen=True)
class _Cut:
    """A harmonic network, and its uncut one where that is known, or ``why`` it is not."""

    model: nn.Module
    header: Header
    source: Source | None
    original: nn.Module | None
    why: Message
    new_classes: bool = False


def _opened(
    model: Openable, num_classes: int | None, teacher: str | Path | nn.Module | None, listener: Listener
) -> _Cut:
    """The network to fine-tune, in float32, with a new classifier where one is asked for."""
    network = own(opened(model, listener, intact=True), model)
    if network.header is None:
        raise not_harmonic(text_of(model))
    in_float32(network.model)
    source, trusted = known_source(network), isinstance(model, SourceRequest) and (model.trust_code or bool(model.code))
    if num_classes is None:
        original, why = _uncut(network, teacher, trusted, listener)
        return _Cut(network.model, network.header, source, original, why)
    made = new_classifier(network.model, num_classes, network.source)
    if source is not None:
        check_rebuilds(made, network.model, trusted)
        source = made
    lacks = f"the uncut network has not the new classifier of {counted(num_classes, 'class')}"
    return _Cut(network.model, network.header, source, None, Message(lacks), new_classes=True)


def _uncut(
    network: Network, teacher: str | Path | nn.Module | None, trust_code: bool, listener: Listener
) -> tuple[nn.Module | None, Message]:
    """The uncut network of a checkpoint, or None and why it is not known."""
    assert network.header is not None
    if isinstance(teacher, nn.Module):
        original = exchange(teacher, {})
    else:
        try:
            with listener.busy("loading the uncut network"):
                original = open_original(network.header, None if teacher is None else str(teacher), trust_code)
        except HarmconvertError as error:
            if teacher is not None:
                raise
            return None, error.message
    theirs, ours = number_of_classes(original), number_of_classes(network.model)
    if theirs == ours:
        return original, Message()
    why = f"the uncut network has {counted(theirs or 0, 'class')}, this one {ours}"
    if teacher is not None:
        named = type(teacher).__name__ if isinstance(teacher, nn.Module) else teacher
        raise UsageError(Argument("teacher", named), f": {why}")
    return None, Message(why)


@dataclass(frozen=True)
class _Run:
    """What to train on, and how; ``dataset`` is the name of the data."""

    dataset: str
    data: Data
    recipe: Recipe


def _run(
    cut: _Cut,
    data: str | Path | DataRequest,
    recipe: str | Recipe,
    changes: Mapping[str, Any],
    resume: str | Path | None,
    listener: Listener,
) -> _Run:
    """Open the data and settle the recipe, which the listener is told, and what a user should know of them."""
    first = recipe_for(recipe, changes, resume)
    request = replace(DataRequest.parse(data), seed=first.seed)
    found = opened_data(request, ("train", "test"), listener)
    if not found.labelled and changes.get("distill") is None and not first.distill and resume is None:
        uncut = "note: these images have no labels, so the uncut network teaches ("
        listener.say(Message(uncut, Argument("distill"), ")"))
        changes = {**changes, "distill": 1.0}
    settled = recipe_for(recipe, changes, resume)
    name = (Argument("teacher", "SOURCE"),)
    if settled.distill and cut.original is None:
        why = cut.why or "there is none"
        raise UsageError(Argument("distill"), " needs the uncut network: ", why, "; name it with ", *name)
    if cut.original is None:
        known = any(isinstance(part, Argument) and part.name == "teacher" for part in cut.why.parts)
        remedy = () if known or cut.new_classes else ("; name it with ", *name)
        unknown = "): neither are its accuracy and that of a cut"
        listener.say(Message("note: the uncut network is not known (", cut.why, unknown, *remedy))
    listener.say(str(settled))
    return _Run(request.dataset, found, settled)


def _identity(cut: _Cut, run: _Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    identity = {
        "recipe": run.recipe.to_json(),
        "data": data_identity(run.data, run.dataset, config),
        "plan": cut.header.plan.to_json(),
        "weights": weights_sha256(cut.model),
    }
    if run.recipe.distill and cut.original is not None:
        identity["teacher"] = weights_sha256(cut.original)
    return identity
