"""finetune(): fine-tune a harmonic checkpoint, and evaluate it at each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_harmonic, check_run_outputs, not_harmonic
from ..codecs.table import CodecTable
from ..data.datasets import Data, DataRequest
from ..data.preprocessing import preprocessing_record
from ..errors import Argument, HarmconvertError, Message, UsageError, counted
from ..metrics import MetricLike, metric_of
from ..network.distributed import joined, on_first_rank
from ..network.exchange import exchange
from ..network.state import weights_sha256
from ..plan import Rank, coded_weights, with_coded_bits
from ..sources.opening import check_rebuilds, open_original
from ..sources.request import SourceRequest
from ..storage.checkpoint import Header, Network, write_checkpoint
from ..storage.precision import in_float32
from ..training.losses import DISTILLATION, loss_of
from ..training.recipe import Recipe
from ..training.trainer import MachineSettings, number_of_classes
from .devices import machine_on, workers_for
from .finetuning import CutNetwork, FineTuning, TrainingSetup, new_classifier, run_finetuning
from .inputs import image_config
from .listener import Listener
from .networks import Openable, is_given, known_source, opened, own, text_of
from .runs import data_identity, recipe_for, reporting, resume_hint, state_file_for
from .showing import listener_for
from .testing import metric_for, opened_data


def finetune(
    model: Openable,
    data: str | Path | DataRequest,
    output: str | Path | None = None,
    *,
    recipe: str | Recipe = "finetune",
    metric: MetricLike | None = None,
    loss: str | Callable[[Any, Any], Any] | None = None,
    teacher: str | Path | nn.Module | None = None,
    num_classes: int | None = None,
    calibration_images: int = 256,
    recode: bool = False,
    preprocessing: Mapping[str, Any] | None = None,
    machine: MachineSettings | None = None,
    workers: int | None = None,
    save_every: int | None = None,
    resume: str | Path | None = None,
    log: str | None = None,
    force: bool = False,
    command: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    listener: Listener | None = None,
    **changes: Any,
) -> FineTuning:
    """Fine-tune a harmonic network for the paper's 5 epochs, or as another recipe says.

    The result has the accuracy of the network uncut, cut, calibrated and fine-tuned. A cut that was not calibrated is
    calibrated first.

    >>> import harmconvert as hc
    >>> layers = nn.Conv2d(1, 8, 7, stride=4), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    >>> network = nn.Sequential(*layers)
    >>> digits = {"input_size": (1, 28, 28), "preprocess": "none"}
    >>> cut = hc.convert(network, 2)
    >>> tuned = finetune(cut, "sample:mnist5k", preprocessing=digits, epochs=1, crop="none")
    >>> [stage.name for stage in tuned.stages if stage.evaluation]
    ['before', 'fine-tuned']

    Args:
        model: the path of a harmonic checkpoint, a request, or a harmonic network object, which is not changed.
        data: a folder with a folder for each class, or of another kind (see the guide), ``sample:NAME`` or a timm data
            set.
        output: the .safetensors file to write; None: write no file, and save no state.
        recipe: the name of a recipe, or a `Recipe`.
        metric: what the network is tested with at each stage and after each epoch, as for `evaluate`; default: the
            accuracy of a classifier.
        loss: ``"cross-entropy"`` (of classes or pixels), ``"l1"``, ``"l2"``, ``"detector"`` (the losses that
            torchvision's detectors compute), ``"distillation"`` (from the outputs of the uncut network; no targets are
            needed), ``FILE.py:FUNCTION``, or a function of the outputs and targets of a batch that returns a scalar
            tensor; default: that of the kind of data.
        changes: fields of the recipe with other values, such as ``epochs`` or ``lr``.
        teacher: the uncut network, its source or a file of its weights; default: the source of the checkpoint.
        num_classes: give the network a new classifier, for data with other classes.
        calibration_images: number of training images, without labels, for the calibration; 0: do not calibrate.
        recode: code the weights again after training. Otherwise the coded weights of a network keep their integers,
            and only biases, norms and a scale for each output channel are trained.
        preprocessing: of images, with timm's names, if it is not the network's own (`harmconvert.data.preprocessing`).
        machine: where and how to run; default: a GPU if there is one.
        workers: processes that load images; default: one for each core.
        save_every: save the state after this many steps, too, not only after each epoch.
        resume: a saved state to continue from; all other arguments must be the same as in the first run.
        log: ``"tensorboard"`` writes events beside the output.
        force: replace existing files.
        command: name and options of the running command, for the history of the file.
        progress: show progress bars; None: in an interactive session (a Python prompt, IPython, a notebook).
        listener: receives messages and progress instead; without it, the logger ``harmconvert`` gets them.

    Raises:
        UsageError: the network is not harmonic, an output exists, or settings contradict each other.
        InputError: the images or the network are unusable.
        CheckError: the loss is no longer finite.
        OutsideError: the disk, the internet or a package is not available.
        SignalError: the user stopped the run; its state is saved.
    """
    listener = listener_for(listener, progress)
    target = None if output is None else str(output)
    if target is not None:
        check_run_outputs(target, resume, force)
    if not is_given(model):
        check_harmonic(text_of(model))
    chosen = None if metric is None else metric_of(metric)
    changes = _with_loss(loss, changes)
    with joined():
        cut = _open_cut(model, num_classes, teacher, listener)
        if recode and not cut.header.codecs.coded:
            what = " codes the weights again, but those of this network are not coded: code them with "
            raise UsageError(Argument("recode"), what, Argument("bits", "N"), " of a conversion")
        run = _prepare_run(cut, data, recipe, changes, resume, listener)
        if chosen is not None and chosen.needs_uncut and cut.original is None:
            problem = f"{chosen.name} compares with the uncut network: "
            raise UsageError(problem, cut.why, "; name it with ", Argument("teacher", "SOURCE"))
        config = image_config(cut.model, preprocessing or {}, listener, task=run.data.task, prepared=run.data.prepared)
        setup = TrainingSetup(
            config, machine or machine_on(), workers_for(workers, run.dataset), data=run.name,
            metric=metric_for(chosen, run.data.task),
            loss=loss_of(loss if callable(loss) else run.recipe.loss, run.data.task),
            state_file=state_file_for(target, resume, save_every, _identity(cut, run, config, recode), force, listener),
            say=listener.say,
        )  # fmt: skip
        with setup.state_file.lock():
            with reporting(setup, run.recipe.epochs, target, log, listener) as reported:
                result = run_finetuning(cut, run.data, run.recipe, reported, calibration_images, recode)
            if target is None:
                return result
            made_by = None if command is None else {**command, "source": text_of(model)}
            result = _write(result, cut, target, setup, made_by, force)
        listener.wrote(target)
    return result


def _with_loss(loss: str | Callable[[Any, Any], Any] | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes of the recipe with the name of the loss, which must be the same when a run is resumed."""
    if loss is None:
        return dict(changes)
    if loss == DISTILLATION:
        return {"distill": 1.0, **changes}
    return {**changes, "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)}


def _write(
    result: FineTuning,
    cut: CutNetwork,
    target: str,
    setup: TrainingSetup,
    command: Mapping[str, Any] | None,
    force: bool,
) -> FineTuning:
    """Write the fine-tuned network, then remove the state of the run."""
    with resume_hint(setup.state_file):
        header = on_first_rank(
            lambda: write_checkpoint(
                result.model,
                target,
                header=_header_of(result, cut),
                source=cut.source,
                history=result.history(cut.header.history, command),
                preprocessing=preprocessing_record(setup.preprocessing),
                force=force,
            )
        )
    setup.state_file.remove()
    return replace(result, output=target, header=header)


def _header_of(result: FineTuning, cut: CutNetwork) -> Header:
    """Return the header for the fine-tuned network: its plan has the bits of its weights."""
    if not cut.header.codecs.coded:
        return cut.header
    plan = with_coded_bits(cut.header.plan, coded_weights(result.model, cut.header.plan), result.coded)
    return replace(cut.header, plan=plan, codecs=CodecTable(coded=result.coded))


def _open_cut(
    model: Openable, num_classes: int | None, teacher: str | Path | nn.Module | None, listener: Listener
) -> CutNetwork:
    """Open the network to fine-tune, in float32, and give it a new classifier if ``num_classes`` is set."""
    network = own(opened(model, listener, intact=True), model)
    if network.header is None:
        raise not_harmonic(text_of(model))
    in_float32(network.model)
    source, trusted = known_source(network), isinstance(model, SourceRequest) and (model.trust_code or bool(model.code))
    if num_classes is None:
        original, why = _uncut(network, teacher, trusted, listener)
        return CutNetwork(network.model, network.header, source, original, why)
    new_source = new_classifier(network.model, num_classes, network.source)
    if source is not None:
        check_rebuilds(new_source, network.model, trusted)
        source = new_source
    why = Message(f"the uncut network does not have the new classifier of {counted(num_classes, 'class')}")
    return CutNetwork(network.model, network.header, source, None, why, new_classes=True)


def _uncut(
    network: Network, teacher: str | Path | nn.Module | None, trust_code: bool, listener: Listener
) -> tuple[nn.Module | None, Message]:
    """Return the uncut network of a checkpoint, or None and the reason why it is not known."""
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
    original_classes, classes = number_of_classes(original), number_of_classes(network.model)
    if original_classes == classes:
        return original, Message()
    why = f"the uncut network has {counted(original_classes or 0, 'class')}, this one {classes}"
    if teacher is not None:
        name = type(teacher).__name__ if isinstance(teacher, nn.Module) else teacher
        raise UsageError(Argument("teacher", name), f": {why}")
    return None, Message(why)


# The largest norm of the gradients in training weights of low rank, unless the recipe says another one.
RANKED_CLIP = 1.0


@dataclass(frozen=True)
class _Run:
    """The data, the name of a data set (empty: a folder), the name of the data, and the recipe of a run."""

    dataset: str
    name: str
    data: Data
    recipe: Recipe


def _prepare_run(
    cut: CutNetwork,
    data: str | Path | DataRequest,
    recipe: str | Recipe,
    changes: Mapping[str, Any],
    resume: str | Path | None,
    listener: Listener,
) -> _Run:
    """Open the data and determine the recipe; send both, and notes about them, to the listener."""
    requested = recipe_for(recipe, changes, resume)
    request = replace(DataRequest.parse(data), seed=requested.seed)
    images = opened_data(request, ("train", "test"), listener)
    if not images.labelled and changes.get("distill") is None and not requested.distill and resume is None:
        note = "note: these images have no labels, so the uncut network teaches ("
        listener.say(Message(note, Argument("distill"), ")"))
        changes = {**changes, "distill": 1.0}
    if resume is None and cut.header.plan.on(Rank.axis):
        changes = _changes_for_ranks(cut, requested, changes, listener)
    final = recipe_for(recipe, changes, resume)
    teacher = Argument("teacher", "SOURCE")
    if final.distill and cut.original is None:
        why = cut.why or "there is none"
        raise UsageError(Argument("distill"), " needs the uncut network: ", why, "; name it with ", teacher)
    if cut.original is None:
        named = any(isinstance(part, Argument) and part.name == "teacher" for part in cut.why.parts)
        remedy = () if named or cut.new_classes else ("; name it with ", teacher)
        effect = "), so its accuracy and that of a cut are not known"
        listener.say(Message("note: the uncut network is not known (", cut.why, effect, *remedy))
    listener.say(str(final))
    return _Run(request.dataset, request.name, images, final)


def _changes_for_ranks(
    cut: CutNetwork, requested: Recipe, changes: Mapping[str, Any], listener: Listener
) -> Mapping[str, Any]:
    """Return the changes of the recipe with the defaults for weights of low rank.

    The uncut network teaches. The two matrices of a weight amplify each other's gradients, so these are clipped.
    """
    if changes.get("clip_grad") is None and requested.clip_grad is None:
        changes = {**changes, "clip_grad": RANKED_CLIP}
    if changes.get("distill") is None and not requested.distill and cut.original is not None:
        note = "note: for weights of low rank, the uncut network teaches ("
        listener.say(Message(note, Argument("distill"), " 0 trains on the labels)"))
        changes = {**changes, "distill": 1.0}
    return changes


def _identity(cut: CutNetwork, run: _Run, config: Mapping[str, Any], recode: bool) -> dict[str, Any]:
    """Return what must be the same when a run is resumed."""
    identity: dict[str, Any] = {
        "recipe": run.recipe.to_json(),
        "data": data_identity(run.data, run.dataset, config),
        "plan": cut.header.plan.to_json(),
        "weights": weights_sha256(cut.model),
    }
    if run.recipe.distill and cut.original is not None:
        identity["teacher"] = weights_sha256(cut.original)
    if cut.header.codecs.coded:
        identity["recode"] = recode  # it says which parameters are trained
    return identity
