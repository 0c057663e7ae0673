"""Fine-tune a converted network, and evaluate it at each stage: uncut, cut, calibrated, fine-tuned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration import CalibrationSettings, calibrate
from ..codecs.codec import Entry, codec_of
from ..codecs.packed import packed_entry
from ..data.datasets import Data
from ..data.loading import NO_LABEL, Batch, choose_inputs, evaluation_batches, input_batches, training_batches
from ..data.pictures import BOXES, CLASSES
from ..data.preprocessing import color_mode, sample_transform
from ..data.variety import Variety
from ..documents import check
from ..errors import Argument, HarmconvertError, InputError, Message, UsageError, counted, first_line
from ..metrics.metric import Metric
from ..network.classifier import detector_classes, replace_classifier
from ..network.distributed import world_size
from ..network.forms import dense_form
from ..network.state import tensors_of
from ..network.values import map_tensors
from ..plan import Bits
from ..plan.precision import round_vectors, suiting
from ..storage.checkpoint import Header
from ..storage.history import CALIBRATION, STAGES
from ..storage.source import Source
from ..training.coded_rows import CodedRows
from ..training.evaluation import Evaluation, evaluate
from ..training.loop import Callbacks, StepProgress, train
from ..training.losses import Loss, loss_of
from ..training.recipe import Recipe
from ..training.state import StateFile, read_record
from ..training.trainer import MachineSettings, TrainingTask, autocast, number_of_classes
from .convert import convert


@dataclass(frozen=True)
class Stage:
    """The evaluation of the network at one stage, or the reason why there is none."""

    name: str
    evaluation: Evaluation | None = None
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the stage as JSON values; `from_json` is the inverse."""
        return {**asdict(self), "evaluation": self.evaluation.to_json() if self.evaluation else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stage:
        """Return the stage that `to_json` wrote."""
        evaluation = Evaluation.from_json(data["evaluation"]) if data["evaluation"] else None
        return cls(data["name"], evaluation, data["why"])


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuned network, its stages, a row of metrics for each epoch, the recipe, and the calibration record.

    ``output`` is the file and ``header`` its header, if the network was written. ``coded`` has the entries of coded
    weights.
    """

    model: nn.Module
    stages: tuple[Stage, ...]
    rows: tuple[Mapping[str, Any], ...]
    recipe: Recipe
    calibration: Mapping[str, Any] | None = None
    output: str | None = None
    header: Header | None = None
    coded: Mapping[str, Entry] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the output and the record of this run as JSON values."""
        return {"output": self.output, **self.record()}

    def history(self, previous: Mapping[str, Any], command: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the history for the new checkpoint.

        Args:
            previous: the history of the checkpoint that this run started from.
            command: the record of the command that made this run.
        """
        calibration = self.calibration or previous.get("calibration")
        run = self.record() | ({"command": dict(command)} if command else {})
        # Training changed the tensors that calibration wrote, so their digests are not valid any more.
        calibrated = {"calibration": {**calibration, "changed": {}}} if calibration else {}
        return {**previous, **calibrated, "training": [*previous.get("training", []), run]}

    def record(self) -> dict[str, Any]:
        """Return the part of a checkpoint's history that describes this run."""
        return {
            "recipe": self.recipe.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
            "epochs": [dict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class TrainingSetup:
    """Pre-processing, machine, loading and state of a training, and the functions that receive its messages.

    ``metric`` is what the network is tested with (None: the accuracy of a classifier), ``loss`` with what it is trained
    (None: that of the kind of data), ``data`` the name of the data.
    ``on_step`` receives the running means, ``on_test_batch`` the number of tested batches and of all batches (None for
    a stream), ``epoch_done`` the rows of metrics so far.
    """

    preprocessing: Mapping[str, Any]
    machine: MachineSettings
    workers: int = 0
    evaluation_batch_size: int = 256
    metric: Metric | None = None
    loss: Loss | None = None
    data: str = ""
    state_file: StateFile = field(default_factory=StateFile)
    say: Callable[[str], None] = lambda message: None
    on_step: Callable[[StepProgress], None] = lambda progress: None
    on_test_batch: Callable[[int, int | None], None] = lambda done, steps: None
    epoch_done: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None

    @property
    def pin_memory(self) -> bool:
        """Whether batches are copied to a GPU."""
        return self.machine.device.type == "cuda"


@dataclass(frozen=True)
class CutNetwork:
    """A harmonic network to fine-tune, and the uncut network: None if it is not known, ``why`` has the reason.

    ``new_classes`` says that the network has a new classifier, which no uncut network has.
    """

    model: nn.Module
    header: Header
    source: Source | None
    original: nn.Module | None
    why: Message
    new_classes: bool = False


def run_finetuning(
    cut: CutNetwork,
    data: Data,
    recipe: Recipe,
    setup: TrainingSetup,
    calibration_images: int = 256,
    recode: bool = False,
) -> FineTuning:
    """Fine-tune a harmonic network in place; calibrate it first if it needs calibration and the uncut one is known.

    Args:
        calibration_images: number of training images, without labels, for the calibration; 0: do not calibrate.
        recode: train all values of coded weights and code them again, on as many training images. Otherwise coded
            weights keep their integers, and only get a scale for each row.

    Raises:
        UsageError: there are no images to train on or to test on.
        InputError: the classes of the data are not those of the network.
        HarmconvertError: see `harmconvert.training.train`.
    """
    if data.train is None or data.test is None:
        raise UsageError("fine-tuning needs images to train on and images to test on")
    model, original = cut.model, cut.original
    if recipe.distill < 1:
        classifier, distill = Argument("num_classes", data.classes), Argument("distill")
        check_classes(
            data, model, "give it a new classifier with ", classifier, ", or train without labels with ", distill
        )
    for network in (model, original):
        if network is not None:
            network.float().to(setup.machine.device)
    evaluation_of = evaluator(data, recipe, setup, original)
    if setup.state_file.resume and setup.state_file.path is not None:
        stages, calibration = recorded_stages(setup.state_file.path)
    else:
        first = _FirstStages(cut, evaluation_of, setup)
        stages, calibration = first.stages(data, calibration_images, recipe.seed), first.calibration
    record = {"stages": [stage.to_json() for stage in stages], "calibration": calibration}
    record = json.loads(json.dumps(record))  # plain values: a state must not hold objects such as a `Message`
    entries = cut.header.codecs.coded
    coded = CodedRows(model, entries) if entries and not recode else None
    packed = coded is not None and any(packed_entry(key, tensor) for key, tensor in tensors_of(model).items())
    rows = train(
        model, train_loading(data, recipe, setup), recipe, teacher=original if recipe.distill else None,
        machine=setup.machine, state_file=replace(setup.state_file, record=record),
        callbacks=Callbacks(evaluation_of, setup.on_step, setup.epoch_done), coded=coded,
        task=TrainingTask(data.task, setup.loss or loss_of(recipe.loss, data.task)),
    )  # fmt: skip
    entries = coded.entries() if coded else {}
    if coded and packed:
        round_vectors(model, suiting(_average_bits(entries)))
    stages.append(Stage("fine-tuned", evaluation_of(model)))
    if cut.header.codecs.coded and recode:
        model, entries, calibration = _coded_again(cut, data, recipe, setup, max(calibration_images, 64))
        stages.append(Stage("coded again", evaluation_of(model)))
    return FineTuning(model, tuple(stages), rows, recipe, calibration, coded=entries)


def _coded_again(
    cut: CutNetwork, data: Data, recipe: Recipe, setup: TrainingSetup, count: int
) -> tuple[nn.Module, Mapping[str, Entry], Mapping[str, Any]]:
    """Code the weights of the trained network with as many bits as before, on training images without labels."""
    entries = cut.header.codecs.coded
    bits = _average_bits(entries)
    batches = _calibration_batches(data, setup, count, recipe.seed)
    settings = CalibrationSettings(seed=recipe.seed, inputs=count)
    trained = dense_form(cut.model)
    conversion = convert(
        trained, cut.header.plan.without(Bits.axis), bits=bits, calibration=batches, settings=settings, progress=False
    )
    assert conversion.calibration is not None
    return conversion.model, conversion.coded, conversion.calibration.to_json()


def _average_bits(entries: Mapping[str, Entry]) -> float:
    return 8 * sum(codec_of(one).bytes(one) for one in entries.values()) / sum(prod(o.shape) for o in entries.values())


def _calibration_batches(data: Data, setup: TrainingSetup, count: int, seed: int) -> tuple[Any, ...]:
    """Return batches of training inputs, without their targets."""
    assert data.train is not None
    config = setup.preprocessing
    images = choose_inputs(data.train, sample_transform(config), color_mode(config), count, seed)
    what, targets = ("image", "labels") if data.task == CLASSES else ("sample", "targets")
    setup.say(f"calibrating on {counted(len(images), f'training {what}')}, without their {targets}")
    size = max(1, min(32, len(images) // (4 * world_size())))  # small enough that every process gets batches
    batches = input_batches(images, size, as_lists=data.task == BOXES)
    return tuple(map_tensors(lambda tensor: tensor.to(setup.machine.device), batch) for batch in batches)


def recorded_stages(path: Path) -> tuple[list[Stage], Mapping[str, Any] | None]:
    """Return the stages and the calibration record in the saved state of a fine-tuning.

    Raises:
        InputError: the state is unreadable, or is not that of a fine-tuning.
    """
    record = read_record(path)
    try:
        check(record, {"stages": STAGES, "calibration": (CALIBRATION, None)}, "record")
        return [Stage.from_json(stage) for stage in record["stages"]], record["calibration"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not the state of a fine-tuning: {first_line(error)}") from error


def train_loading(data: Data, recipe: Recipe, setup: TrainingSetup) -> Any:
    """Return the batches to train on, as the recipe says."""
    assert data.train is not None
    return training_batches(
        data.train,
        recipe.transform(setup.preprocessing),
        color_mode(setup.preprocessing),
        recipe.batch_size,
        seed=recipe.seed,
        workers=setup.workers,
        pin_memory=setup.pin_memory,
    )


def evaluator(
    data: Data, recipe: Recipe, setup: TrainingSetup, original: nn.Module | None = None
) -> Callable[[nn.Module], Evaluation]:
    """Return a function that evaluates a network on the test images, and compares it with the original if given."""
    assert data.test is not None
    config = setup.preprocessing
    loading = evaluation_batches(
        data.test,
        sample_transform(config),
        color_mode(config),
        setup.evaluation_batch_size,
        workers=setup.workers,
        pin_memory=setup.pin_memory,
    )

    def evaluation_of(network: nn.Module) -> Evaluation:
        compared = setup.metric is not None and setup.metric.needs_uncut
        other = None if network is original and not compared else original
        precision = partial(autocast, recipe.amp, setup.machine.device)
        batches: Iterable[Batch] = loading.epoch(0)
        if recipe.distill == 1 and data.classes not in (None, number_of_classes(network)):
            # Training uses no labels, so the labels may be of other classes than the network's.
            batches = (batch._replace(targets=torch.full_like(batch.targets, NO_LABEL)) for batch in batches)
        done = itertools.count(1)
        variety = Variety()
        evaluation = evaluate(
            network,
            batches,
            other,
            metric=setup.metric,
            data=setup.data,
            autocast=precision,
            variety=variety,
            progress=lambda _: setup.on_test_batch(next(done), loading.steps),
        )
        if network is original and (remark := variety.warning()):
            setup.say(f"warning: uncut: {remark}")
        if note := loading.unread_note(evaluation.images + len(evaluation.unreadable)):
            setup.say(note)
        return evaluation

    return evaluation_of


def check_classes(data: Data, model: nn.Module, *remedy: str | Argument) -> None:
    """Raise InputError if the data has another number of classes than the network; ``remedy`` ends the message."""
    if data.task == BOXES:
        _check_categories(data, model)
        return
    classes = number_of_classes(model)
    if data.classes is not None and classes is not None and data.classes != classes:
        what = f"the data has {counted(data.classes, 'class')}, the network {classes}"
        raise InputError(f"{what}: name data of the network's classes (", Argument("data"), "), or ", *remedy)


def _check_categories(data: Data, model: nn.Module) -> None:
    """Raise InputError if boxes have a category that a detector does not have."""
    classes, largest = detector_classes(model), data.largest_label
    if classes is not None and largest >= classes:
        raise InputError(
            f"category {largest} is beyond the {counted(classes, 'class')} of this network, of which 0 is the "
            "background: name data of the network's classes (", Argument("data"), ")",
        )  # fmt: skip


def new_classifier(model: nn.Module, classes: int, source: Source) -> Source:
    """Replace the classifier of a network by an untrained one; return the source that builds this network.

    Raises:
        UsageError: the network has no classifier that can be replaced.
    """
    replace_classifier(model, classes)
    # The functions of these schemes have no argument for the classes, or refuse it together with their weights.
    if source.scheme in ("torchvision", "code"):
        return replace(source, classes=classes)
    return replace(source, arguments={**source.arguments, "num_classes": classes})


class _FirstStages:
    """The stages before training."""

    def __init__(self, cut: CutNetwork, evaluation_of: Callable[[nn.Module], Evaluation], setup: TrainingSetup) -> None:
        self.cut, self.evaluation_of, self.setup = cut, evaluation_of, setup
        self.calibration: Mapping[str, Any] | None = None

    def stages(self, data: Data, calibration_images: int, seed: int) -> list[Stage]:
        """Evaluate the uncut network, the network of the file, and the calibrated network.

        The stage ``before`` is always the network of the file. If that is calibrated, its plain cut is made again for
        the stage ``cut``.
        """
        model, original, header = self.cut.model, self.cut.original, self.cut.header
        uncut = Stage("uncut", why=self.cut.why) if original is None else self._stage("uncut", original)
        if "training" in header.history or header.codecs.coded:
            return [uncut, self._stage("before", model)]
        if header.plan.whole:
            return [uncut, self._stage("before", model), Stage("calibrated", why="nothing is cut")]
        if header.calibrated:
            cut = Stage("cut", why=self.cut.why)
            if original is not None:
                cut = self._stage("cut", convert(original, header.plan, progress=False).model)
            return [uncut, cut, self._stage("before", model)]
        before = self._stage("before", model)
        return [uncut, before, self._calibrated(data, calibration_images, seed)]

    def _calibrated(self, data: Data, count: int, seed: int) -> Stage:
        model, original = self.cut.model, self.cut.original
        if original is None:
            return Stage("calibrated", why=self.cut.why)
        if count == 0:
            return Stage("calibrated", why=Message(Argument("calibration_images", 0)))
        batches = _calibration_batches(data, self.setup, count, seed)
        try:
            settings = CalibrationSettings(seed=seed, inputs=sum(map(len, batches)))
            calibration = calibrate(original, model, self.cut.header.plan, batches, settings)
        except HarmconvertError as error:
            return Stage("calibrated", why=error.message)
        self.calibration = calibration.to_json()
        return self._stage("calibrated", model)

    def _stage(self, name: str, network: nn.Module) -> Stage:
        with torch.no_grad():
            stage = Stage(name, self.evaluation_of(network))
        self.setup.say(f"{name}: {stage.evaluation}")
        return stage
