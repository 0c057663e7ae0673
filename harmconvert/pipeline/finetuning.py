"""Fine-tuning a converted network, with what every stage of it is worth: uncut, cut, calibrated, fine-tuned."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration import CalibrationSettings, calibrate
from ..data.datasets import Data
from ..data.loading import NO_LABEL, Batch, choose_images, evaluation_batches, training_batches
from ..data.preprocessing import color_mode, evaluation_transform
from ..data.variety import Variety
from ..documents import check
from ..errors import Argument, HarmconvertError, InputError, Message, UsageError, counted, first_line
from ..network.classifier import replace_classifier
from ..network.distributed import world_size
from ..storage.checkpoint import Header
from ..storage.history import CALIBRATION, STAGES
from ..storage.source import Source
from ..training.evaluation import Evaluation, evaluate
from ..training.loop import Callbacks, StepProgress, train
from ..training.recipe import Recipe
from ..training.state import StateFile, read_record
from ..training.trainer import MachineSettings, autocast, number_of_classes
from .convert import convert


@dataclass(frozen=True)
class Stage:
    """What the network was worth at one stage, or why that is not known."""

    name: str
    evaluation: Evaluation | None = None
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stage:
        """Read what `to_json` wrote."""
        found = dict(data["evaluation"]) if data["evaluation"] else None
        evaluation = Evaluation(**{**found, "unreadable": tuple(found["unreadable"])}) if found else None
        return cls(data["name"], evaluation, data["why"])


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuned network, its stages, a row of figures for each epoch, the recipe, and how it was calibrated; where
    it was written, the file, and the header of that."""

    model: nn.Module
    stages: tuple[Stage, ...]
    rows: tuple[Mapping[str, Any], ...]
    recipe: Recipe
    calibration: Mapping[str, Any] | None = None
    output: str | None = None
    header: Header | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict: where it was written (None: nowhere), and what the checkpoint says of the run."""
        return {"output": self.output, **self.record()}

    def history(self, before: Mapping[str, Any], command: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The history that the checkpoint is to record, from what was recorded before this run, with the command that
        ran it."""
        calibration = self.calibration or before.get("calibration")
        run = self.record() | ({"command": dict(command)} if command else {})
        # Training changed what calibration wrote: the record keeps what was done, not what came of each tensor.
        kept = {"calibration": {**calibration, "changed": {}}} if calibration else {}
        return {**before, **kept, "training": [*before.get("training", []), run]}

    def record(self) -> dict[str, Any]:
        """What the checkpoint says of this run."""
        return {
            "recipe": self.recipe.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
            "epochs": [dict(row) for row in self.rows],
        }


@dataclass(frozen=True)
class Setting:
    """What a run works with: pre-processing, machine, loading, where state is kept, whom to tell (``tested``: after
    each batch of test images, of so many, None: of a stream)."""

    preprocessing: Mapping[str, Any]
    machine: MachineSettings
    workers: int = 0
    evaluation_batch_size: int = 256
    state_file: StateFile = field(default_factory=StateFile)
    resume: Path | None = None
    say: Callable[[str], None] = lambda message: None
    told: Callable[[StepProgress], None] = lambda told: None
    tested: Callable[[int, int | None], None] = lambda done, steps: None
    epoch_done: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None

    @property
    def pin_memory(self) -> bool:
        """Whether batches travel to a GPU."""
        return self.machine.device.type == "cuda"


def run_finetuning(
    model: nn.Module,
    header: Header,
    data: Data,
    recipe: Recipe,
    setting: Setting,
    *,
    original: nn.Module | None = None,
    why_no_original: str = "",
    calibration_images: int = 256,
) -> FineTuning:
    """Fine-tune a harmonic network in place, after calibrating it where that has not been done and can be.

    Args:
        model, header: a harmonic checkpoint, loaded.
        original: the uncut network: compared with, calibrated to, and learnt from where the recipe distills.
        why_no_original: what to say of stages that need it where it is None.
        calibration_images: of the training set, without their labels; 0 leaves calibration out.

    Raises: as `harmconvert.training.train`; InputError also where the data's classes are not the network's.
    """
    if data.train is None or data.test is None:
        raise UsageError("fine-tuning needs images to train on and images to test on")
    if recipe.distill < 1:
        classifier, distill = Argument("num_classes", data.classes), Argument("distill")
        check_classes(
            data, model, "give it a new classifier with ", classifier, ", or leave labels aside with ", distill
        )
    device = setting.machine.device
    for network in (model, original):
        if network is not None:
            network.float().to(device)
    worth = evaluator(data, recipe, setting, original)
    if setting.resume is not None:
        stages, calibration = recorded_stages(setting.resume)
    else:
        first = _Stages(model, header, original, why_no_original, worth, setting)
        stages, calibration = first.stages(data, calibration_images, recipe.seed), first.calibration
    record = {"stages": [stage.to_json() for stage in stages], "calibration": calibration}
    record = json.loads(json.dumps(record))  # plain text: a state holds no object such as a `Message`
    state_file = replace(setting.state_file, record=record)
    rows = train(
        model,
        train_loading(data, recipe, setting),
        recipe,
        teacher=original if recipe.distill else None,
        machine=setting.machine,
        state_file=state_file,
        callbacks=Callbacks(worth, setting.told, setting.epoch_done),
    )
    stages.append(Stage("fine-tuned", worth(model)))
    return FineTuning(model, tuple(stages), rows, recipe, calibration)


def recorded_stages(path: Path) -> tuple[list[Stage], Mapping[str, Any] | None]:
    """The stages and the calibration of a fine-tuning that are kept with its state.

    Raises:
        InputError: the state cannot be read, or is of something else.
    """
    record = read_record(path)
    try:
        check(record, {"stages": STAGES, "calibration": (CALIBRATION, None)}, "record")
        return [Stage.from_json(stage) for stage in record["stages"]], record["calibration"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not the state of a fine-tuning: {first_line(error)}") from error


def train_loading(data: Data, recipe: Recipe, setting: Setting) -> Any:
    """Batches to train on, by a recipe."""
    assert data.train is not None
    return training_batches(
        data.train,
        recipe.transform(setting.preprocessing),
        color_mode(setting.preprocessing),
        recipe.batch_size,
        seed=recipe.seed,
        workers=setting.workers,
        pin_memory=setting.pin_memory,
    )


def evaluator(
    data: Data, recipe: Recipe, setting: Setting, original: nn.Module | None = None
) -> Callable[[nn.Module], Evaluation]:
    """A function that evaluates a network on the test images, beside the original where there is one."""
    assert data.test is not None
    config = setting.preprocessing
    loading = evaluation_batches(
        data.test,
        evaluation_transform(config),
        color_mode(config),
        setting.evaluation_batch_size,
        workers=setting.workers,
        pin_memory=setting.pin_memory,
    )

    def worth(network: nn.Module) -> Evaluation:
        other = None if network is original else original
        precision = partial(autocast, recipe.amp, setting.machine.device)
        batches: Iterable[Batch] = loading.epoch(0)
        if recipe.distill == 1 and data.classes not in (None, number_of_classes(network)):
            # Labels that are not looked at in training may be of anything.
            batches = (batch._replace(labels=torch.full_like(batch.labels, NO_LABEL)) for batch in batches)
        done = itertools.count(1)
        variety = Variety()
        found = evaluate(
            network,
            batches,
            other,
            autocast=precision,
            variety=variety,
            progress=lambda _: setting.tested(next(done), loading.steps),
        )
        if network is original and (remark := variety.warning()):
            setting.say(f"warning: uncut: {remark}")
        if note := loading.unread_note(found.images + len(found.unreadable)):
            setting.say(note)
        return found

    return worth


def check_classes(data: Data, model: nn.Module, *instead: str | Argument) -> None:
    """Raise InputError where the data's classes cannot be the network's, saying what to do ``instead``."""
    classes = number_of_classes(model)
    if data.classes is not None and classes is not None and data.classes != classes:
        what = f"the data has {counted(data.classes, 'class')}, the network {classes}"
        raise InputError(f"{what}: name its own data (", Argument("data"), "), or ", *instead)


def new_classifier(model: nn.Module, classes: int, source: Source) -> Source:
    """Give a network another classifier, untrained; returns the source that makes it with that.

    Raises:
        UsageError: the network has no classifier that can be replaced.
    """
    replace_classifier(model, classes)
    if source.scheme in ("torchvision", "code"):  # their makers need not know, or refuse it beside their weights
        return replace(source, classes=classes)
    return replace(source, arguments={**source.arguments, "num_classes": classes})


class _Stages:
    """The stages before training."""

    def __init__(
        self,
        model: nn.Module,
        header: Header,
        original: nn.Module | None,
        why_no_original: str,
        worth: Callable[[nn.Module], Evaluation],
        setting: Setting,
    ) -> None:
        self.model, self.header, self.original, self.worth, self.setting = model, header, original, worth, setting
        self.why_no_original = why_no_original
        self.calibration: Mapping[str, Any] | None = None

    def stages(self, data: Data, calibration_images: int, seed: int) -> list[Stage]:
        """The uncut network, the file that was given, and what calibration comes to. ``before`` is always the file; a
        file that is calibrated already is called that, and its plain cut is made again to compare it with."""
        uncut = Stage("uncut", why=self.why_no_original)
        if self.original is not None:
            uncut = self._stage("uncut", self.original)
        if "training" in self.header.history:  # trained before: what it is now is where this run starts
            return [uncut, self._stage("before", self.model)]
        if self.header.plan.whole:
            return [uncut, self._stage("before", self.model), Stage("calibrated", why="nothing is cut")]
        if self.header.calibrated:
            cut = Stage("cut", why=self.why_no_original)
            if self.original is not None:
                cut = self._stage("cut", convert(self.original, self.header.plan).model)
            return [uncut, cut, self._stage("before", self.model)]  # the file as it was given, as everywhere
        before = self._stage("before", self.model)
        return [uncut, before, self._calibrated(data, calibration_images, seed)]

    def _calibrated(self, data: Data, count: int, seed: int) -> Stage:
        if self.original is None:
            return Stage("calibrated", why=self.why_no_original)
        if count == 0:
            return Stage("calibrated", why=Message(Argument("calibration_images", 0)))
        assert data.train is not None
        config = self.setting.preprocessing
        images = choose_images(data.train, evaluation_transform(config), color_mode(config), count, seed)
        self.setting.say(f"calibrating on {counted(len(images), 'training image')}, without their labels")
        size = max(1, min(32, len(images) // (4 * world_size())))  # every process wants a share
        batches = tuple(batch.to(self.setting.machine.device) for batch in images.split(size))
        try:
            settings = CalibrationSettings(seed=seed, inputs=len(images))
            done = calibrate(self.original, self.model, self.header.plan, batches, settings)
        except HarmconvertError as error:
            return Stage("calibrated", why=error.message)
        self.calibration = done.to_json()
        return self._stage("calibrated", self.model)

    def _stage(self, name: str, network: nn.Module) -> Stage:
        with torch.no_grad():
            stage = Stage(name, self.worth(network))
        self.setting.say(f"{name}: {stage.evaluation}")
        return stage
