"""The training loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import nn

from ..data.loading import Batch, Batches
from ..errors import Argument, CheckError, InputError, Message, UsageError, counted, shortened
from ..network.distributed import any_rank, gathered, rank, world_size
from ..network.state import tensors_of
from .batch_norm import frozen, over_all_processes
from .evaluation import Evaluation
from .interrupts import SignalError, asked_to_stop
from .learner import Learner, Machine
from .recipe import Recipe
from .state import Keeper, Position


@dataclass(frozen=True)
class Told:
    """The progress of a run: means over the epoch so far, and images per second of all processes."""

    epoch: int
    step: int
    steps: int | None
    loss: float
    accuracy: float
    images_per_second: float


def train(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    test: Callable[[nn.Module], Evaluation] | None = None,
    teacher: nn.Module | None = None,
    machine: Machine | None = None,
    keeper: Keeper | None = None,
    resume: Path | None = None,
    progress: Callable[[Told], None] = lambda told: None,
    epoch_done: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
) -> tuple[Mapping[str, Any], ...]:
    """Train ``model`` in place by a recipe; return a row of metrics for each epoch.

    Args:
        model: a classifier in the form to train; it ends on ``machine.device``, in eval mode.
        test: evaluates the network (its moving average, if the recipe has one) after each epoch. Its result selects
            nothing.
        teacher: the network for the recipe's ``distill``, on the same device.
        keeper: saves the state.
        resume: a state to continue from.
        progress: called with the running means, after each step on a CPU and less often on a GPU.
        epoch_done: called by every process after each epoch, with all rows so far.

    Raises:
        CheckError: the loss or a weight is no longer finite; the last saved state is from before that.
        SignalError: SIGINT or SIGTERM arrived; the state is saved.
        InputError: labels are missing or beyond the network's classes.
        UsageError: the settings do not fit together.
        OutsideError: the state cannot be written.
    """
    machine, keeper = machine or Machine(), keeper or Keeper()
    _check(recipe, batches, teacher)
    _seed(recipe.seed + rank())
    learner = Learner(model, recipe, machine, batches.steps, teacher)
    position = Position()
    if resume is not None:
        position, content = keeper.load(resume)
        learner.load(content)

    def save() -> None:
        _check_finite(learner, position, keeper)
        keeper.save(position, learner.content)

    with asked_to_stop() as request:
        for epoch in range(position.epoch, recipe.epochs):
            start, seen = time.perf_counter(), position.sums[2]
            unreadable: list[str] = []
            with frozen(model, recipe.keeps_batch_norm), over_all_processes() if machine.sync_bn else nullcontext():
                for step, batch in _common_batches(batches, epoch, position.step):
                    unreadable += batch.problems
                    learner.step(batch, epoch, step)
                    due = keeper.due(step + 1)
                    if not (due or learner.look_now(step)):
                        continue
                    sums, signal = learner.look(request)
                    position = Position(epoch, step + 1, _added(position.sums, sums), position.rows)
                    loss, correct, images = position.sums
                    if not np.isfinite(loss):
                        raise CheckError(_not_finite(learner, position, keeper, "the loss"))
                    if due or signal:
                        save()
                    if signal:
                        raise SignalError(_stopped(position, keeper, signal), signal)
                    speed = (images - seen) / max(time.perf_counter() - start, 1e-9)
                    progress(Told(epoch, step + 1, batches.steps, loss / images, correct / images, speed))
            if world_size() > 1 and not machine.sync_bn:
                distribute_bn(model, world_size(), reduce=True)
            if unreadable := sorted({name for names in gathered(unreadable) for name in names}):
                keeper.say(
                    f"note: {counted(len(unreadable), 'image')} could not be read; other images replaced them: "
                    f"{shortened(unreadable, 3)}"
                )
            sums, signal = learner.look(request)
            position = replace(position, sums=_added(position.sums, sums))
            row = _row(learner, epoch, position, keeper, time.perf_counter() - start, test)
            position = Position(epoch + 1, 0, rows=(*position.rows, row))
            save()
            epoch_done(position.rows)
            if signal and epoch + 1 < recipe.epochs:
                raise SignalError(_stopped(position, keeper, signal), signal)
    learner.finish()
    return position.rows


def _check(recipe: Recipe, batches: Batches, teacher: nn.Module | None) -> None:
    if recipe.distill and teacher is None:
        raise UsageError("distillation needs the uncut network: name it with ", Argument("teacher", "SOURCE"))
    parts = world_size() * recipe.grad_accum_steps
    if recipe.batch_size % parts:
        shares = f"{counted(world_size(), 'process')} x {counted(recipe.grad_accum_steps, 'part')}"
        raise UsageError(
            f"a batch of {counted(recipe.batch_size, 'image')} cannot be shared out evenly over {shares}: give a ",
            Argument("batch_size"),
            f" that {parts} divides",
        )
    if batches.steps == 0:
        raise InputError("the data set is smaller than one batch: give a smaller ", Argument("batch_size"))


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def _common_batches(batches: Batches, epoch: int, first_step: int) -> Iterator[tuple[int, Batch]]:
    """Yield numbered batches while every process has one: streams may end at different times."""
    remaining = iter(batches.epoch(epoch, first_step))
    step = first_step
    while True:
        batch = next(remaining, None)
        if batches.order is None and world_size() > 1 and any_rank(batch is None):
            return
        if batch is None:
            return
        yield step, batch
        step += 1


def _added(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _row(
    learner: Learner,
    epoch: int,
    position: Position,
    keeper: Keeper,
    seconds: float,
    test: Callable[[nn.Module], Evaluation] | None,
) -> dict[str, Any]:
    loss, correct, images = position.sums
    if not np.isfinite(loss):
        raise CheckError(_not_finite(learner, position, keeper, "the loss"))
    if not images:
        raise InputError("the epoch has no batch: the data set is smaller than a batch, or the stream is empty")
    row: dict[str, Any] = {"epoch": epoch + 1, "lr": learner.lr(), "loss": loss / images, "accuracy": correct / images}
    row |= {"images": int(images), "seconds": round(seconds, 3)}
    if test is not None:
        tested = test(learner.evaluated())
        row |= {"test_top1": tested.top1, "test_top5": tested.top5, "test_loss": tested.loss}
        row |= {"test_agreement": tested.agreement, "test_divergence": tested.divergence}
    return row


def _check_finite(learner: Learner, position: Position, keeper: Keeper) -> None:
    # The loss is from before the step: it may be finite although the weights are not. Such weights must not be saved.
    for name, tensor in tensors_of(learner.model).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckError(_not_finite(learner, position, keeper, name))


def _not_finite(learner: Learner, position: Position, keeper: Keeper, what: str) -> Message:
    where = f"epoch {position.epoch + 1}, step {position.step} (learning rate {learner.lr():g})"
    kept = f"; the last good state is in {keeper.path}" if keeper.path and keeper.path.exists() else ""
    lower, clip = Argument("lr"), Argument("clip_grad", 1)
    return Message(f"{what} is no longer finite in {where}: lower ", lower, ", or give ", clip, kept)


def _stopped(position: Position, keeper: Keeper, signal: int) -> Message:
    done = f"after {counted(position.epoch, 'epoch')} and {counted(position.step, 'step')}"
    if keeper.path is None:
        return Message(f"interrupted {done}; no state is kept")
    return Message(f"interrupted {done}; go on with the same command and ", Argument("resume", keeper.path))
