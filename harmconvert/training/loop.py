"""The training loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import nn

from ..data.loading import Batch, Batches
from ..errors import Argument, CheckError, InputError, Message, UsageError, counted, shortened
from ..network.distributed import any_rank, gathered, rank, world_size
from ..network.state import tensors_of
from .batch_norm import global_batch_norm, train_mode
from .coded_rows import CodedRows
from .evaluation import Evaluation
from .interrupts import SignalError, StopRequest, watch_signals
from .recipe import Recipe
from .state import Position, StateFile
from .trainer import CLASSIFICATION, MachineSettings, Trainer, TrainingTask


@dataclass(frozen=True)
class StepProgress:
    """The progress of a run: means over the epoch so far, and images per second of all processes.

    ``accuracy`` is None if the targets are no labels.
    """

    epoch: int
    step: int
    steps: int | None
    loss: float
    accuracy: float | None
    images_per_second: float


@dataclass(frozen=True)
class Callbacks:
    """Functions that `train` calls.

    ``test`` evaluates the network after each epoch; the moving average, if the recipe has one. Training does not use
    the result. ``progress`` gets the running means, after each step on a CPU and less often on a GPU. ``epoch_done``
    gets the metrics of all epochs so far, in every process, after each epoch.
    """

    test: Callable[[nn.Module], Evaluation] | None = None
    progress: Callable[[StepProgress], None] = lambda progress: None
    epoch_done: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None


_NO_CALLBACKS = Callbacks()


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    machine: MachineSettings | None = None,
    state_file: StateFile | None = None,
    callbacks: Callbacks = _NO_CALLBACKS,
    coded: CodedRows | None = None,
    task: TrainingTask = CLASSIFICATION,
) -> tuple[Mapping[str, Any], ...]:
    """Train ``model`` in place by a recipe; return a row of metrics for each epoch.

    Args:
        model: a network in the form to train. After training, it is on ``machine.device``, in eval mode.
        teacher: the network for the recipe's ``distill``, on the same device.
        state_file: saves the state of the run; if its ``resume`` is set, the run continues from the saved state.
        coded: coded weights that keep their integers.
        task: the kind of the data, and the loss; default: classes, with cross-entropy.

    Raises:
        CheckError: the loss or a weight is no longer finite. The state that was saved before is kept.
        SignalError: SIGINT or SIGTERM arrived; the state is saved.
        InputError: labels are missing or beyond the network's classes.
        UsageError: the settings do not fit together.
        OutsideError: the state cannot be written.
    """
    machine, state_file = machine or MachineSettings(), state_file or StateFile()
    _check(recipe, batches, teacher)
    _seed(recipe.seed + rank())
    trainer = Trainer(model, recipe, machine, batches.steps, teacher, coded, task)
    position = Position()
    if state_file.resume:
        position, state = state_file.load()
        trainer.load_state_dict(state)
    with watch_signals() as request:
        run = _Run(trainer, batches, state_file, callbacks, request, position)
        while run.position.epoch < recipe.epochs:
            run.train_epoch()
    trainer.finish()
    return run.position.rows


def _check(recipe: Recipe, batches: Batches, teacher: nn.Module | None) -> None:
    if recipe.distill and teacher is None:
        raise UsageError("distillation needs the uncut network: name it with ", Argument("teacher", "SOURCE"))
    parts = world_size() * recipe.grad_accum_steps
    if recipe.batch_size % parts:
        shares = f"{counted(world_size(), 'process')} x {counted(recipe.grad_accum_steps, 'part')}"
        raise UsageError(
            f"a batch of {counted(recipe.batch_size, 'image')} cannot be divided evenly over {shares}: give a ",
            Argument("batch_size"),
            f" that is a multiple of {parts}",
        )
    if batches.steps == 0:
        raise InputError("the data set is smaller than one batch: give a smaller ", Argument("batch_size"))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


@dataclass
class _Run:
    trainer: Trainer
    batches: Batches
    state_file: StateFile
    callbacks: Callbacks
    request: StopRequest
    position: Position

    def train_epoch(self) -> None:
        """Run the steps that are left of the epoch; then test, save and report."""
        trainer, start = self.trainer, time.perf_counter()
        sync_bn = trainer.machine.sync_bn
        with (
            train_mode(trainer.model, trainer.recipe.keeps_batch_norm),
            global_batch_norm() if sync_bn else nullcontext(),
        ):
            unreadable = self._run_steps(start)
        if world_size() > 1 and not sync_bn:
            distribute_bn(trainer.model, world_size(), reduce=True)
        self._report_unreadable(unreadable)
        signal = self._add_sums(self.position.step)
        row = self._metrics(time.perf_counter() - start)
        self.position = Position(self.position.epoch + 1, rows=(*self.position.rows, row))
        self._save()
        self.callbacks.epoch_done(self.position.rows)
        if signal and self.position.epoch < trainer.recipe.epochs:
            raise SignalError(self._interrupted(), signal)

    def _run_steps(self, start: float) -> list[str]:
        """Return the names of the images that this process could not read."""
        epoch, images_before = self.position.epoch, self.position.sums[2]
        unreadable: list[str] = []
        for step, batch in _common_batches(self.batches, epoch, self.position.step):
            unreadable += batch.unreadable
            self.trainer.step(batch, epoch, step)
            save_is_due = self.state_file.is_due(step + 1)
            if not (save_is_due or self.trainer.should_read_sums(step)):
                continue
            signal = self._add_sums(step + 1)
            self._check_loss()
            if save_is_due or signal:
                self._save()
            if signal:
                raise SignalError(self._interrupted(), signal)
            loss, correct, images = self.position.sums
            speed = (images - images_before) / max(time.perf_counter() - start, 1e-9)
            self.callbacks.progress(
                StepProgress(epoch, step + 1, self.batches.steps, loss / images, self._accuracy(correct, images), speed)
            )
        return unreadable

    def _accuracy(self, correct: float, images: float) -> float | None:
        return correct / images if self.trainer.objective.classifies else None

    def _add_sums(self, step: int) -> int:
        """Add the trainer's sums to those of the epoch; return the signal that arrived (0: none)."""
        new, signal = self.trainer.read_sums(self.request)
        sums = tuple(a + b for a, b in zip(self.position.sums, new, strict=True))
        self.position = replace(self.position, step=step, sums=sums)
        return signal

    def _report_unreadable(self, own: list[str]) -> None:
        if unreadable := sorted({name for names in gathered(own) for name in names}):
            self.state_file.say(
                f"note: {counted(len(unreadable), 'image')} could not be read; other images replaced them: "
                f"{shortened(unreadable, 3)}"
            )

    def _metrics(self, seconds: float) -> dict[str, Any]:
        self._check_loss()
        loss, correct, images = self.position.sums
        if not images:
            raise InputError("the epoch has no batch: the data set is smaller than a batch, or the stream is empty")
        row: dict[str, Any] = {
            "epoch": self.position.epoch + 1,
            "lr": self.trainer.lr(),
            "loss": loss / images,
            "accuracy": self._accuracy(correct, images),
            "images": int(images),
            "seconds": round(seconds, 3),
        }
        if self.callbacks.test is not None:
            tested = self.callbacks.test(self.trainer.result_network())
            row |= {"test_top1": tested.top1, "test_top5": tested.top5, "test_loss": tested.loss}
            row |= {"test_agreement": tested.agreement, "test_divergence": tested.divergence}
            if tested.measurement is not None:
                row |= {f"test_{tested.measurement.title}": tested.measurement.value}
        return row

    def _save(self) -> None:
        # The loss is from before the step: it may be finite although the weights are not. Such weights must not be
        # saved.
        for name, tensor in tensors_of(self.trainer.model).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckError(self._not_finite(name))
        self.state_file.save(self.position, self.trainer.state_dict)

    def _check_loss(self) -> None:
        if not np.isfinite(self.position.sums[0]):
            raise CheckError(self._not_finite("the loss"))

    def _not_finite(self, what: str) -> Message:
        position, path = self.position, self.state_file.path
        where = f"epoch {position.epoch + 1}, step {position.step} (learning rate {self.trainer.lr():g})"
        saved = f"; the last good state is in {path}" if path and path.exists() else ""
        lower, clip = Argument("lr"), Argument("clip_grad", 1)
        return Message(f"{what} is no longer finite in {where}: lower ", lower, ", or give ", clip, saved)

    def _interrupted(self) -> Message:
        done = f"after {counted(self.position.epoch, 'epoch')} and {counted(self.position.step, 'step')}"
        if self.state_file.path is None:
            return Message(f"interrupted {done}; no state is saved")
        return Message(
            f"interrupted {done}; go on with the same command and ", Argument("resume", self.state_file.path)
        )


def _common_batches(batches: Batches, epoch: int, first_step: int) -> Iterator[tuple[int, Batch]]:
    """Yield numbered batches while every process has one: streams may end at different times."""
    remaining = iter(batches.epoch(epoch, first_step))
    step = first_step
    while True:
        batch = next(remaining, None)
        if batches.sampler is None and world_size() > 1 and any_rank(batch is None):
            return
        if batch is None:
            return
        yield step, batch
        step += 1
