"""One training step: forward, loss, backward, optimiser, schedule, moving average."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data.loading import Batch
from ..data.pictures import CLASSES
from ..errors import Argument, InputError, UsageError, first_line
from ..layers.harmonic import coefficients_to_channels_last
from ..metrics.measuring import samples_in
from ..metrics.outputs import main_output
from ..network.distributed import sum_over_ranks, world_size
from ..network.layers import converted_layers, stored_names
from ..network.state import fill, tensors_of
from ..network.values import images_to_channels_last, map_tensors
from ..storage.weights import load_exactly
from .coded_rows import CodedRows
from .interrupts import SIGNALS, StopRequest
from .losses import CROSS_ENTROPY, Loss
from .objective import Objective
from .recipe import Recipe

# Reading the losses makes a GPU wait. So on a GPU, losses and signals are read only after this many steps.
STEPS_BETWEEN_READS = 10


@dataclass(frozen=True)
class MachineSettings:
    """Settings for the machine. They change the result of a run only by rounding."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    channels_last: bool = True
    compile: bool = False
    sync_bn: bool = True


@dataclass(frozen=True)
class TrainingTask:
    """The kind of the data that is trained on, and its loss."""

    kind: str = CLASSES
    loss: Loss = CROSS_ENTROPY


CLASSIFICATION = TrainingTask()


class Trainer:
    """The network in training, and all that has state in training: optimiser, schedule, scaler, moving average."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        machine: MachineSettings,
        steps: int | None,
        teacher: nn.Module | None,
        coded: CodedRows | None = None,
        task: TrainingTask = CLASSIFICATION,
    ) -> None:
        self.model, self.recipe, self.machine, self.coded = model, recipe, machine, coded
        model.to(machine.device)
        if machine.channels_last:
            model.to(memory_format=torch.channels_last)
            coefficients_to_channels_last(model)
        choose_parameters(model, recipe)
        self.objective = Objective(recipe, teacher, number_of_classes(model) or 1 << 31, task.loss, task.kind)
        self.optimizer, self.scheduler = _optimizer_and_scheduler(model, recipe, steps)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=recipe.amp == "float16")
        self.ema = ModelEmaV3(model, recipe.ema) if recipe.ema else None
        self.updates = 0
        self.steps = steps
        self.sums = torch.zeros(3, dtype=torch.float64, device=machine.device)
        self.network = self._compiled_and_distributed()

    def _compiled_and_distributed(self) -> nn.Module:
        network = cast(nn.Module, torch.compile(self.model)) if self.machine.compile else self.model
        if world_size() == 1:
            return network
        ids = [self.machine.device.index or 0] if self.machine.device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch deprecate broadcast_buffers
            # A network may have parts that never run. Buffers are already equal, or they are averaged after the epoch.
            return nn.parallel.DistributedDataParallel(
                network, device_ids=ids, broadcast_buffers=False, find_unused_parameters=True
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for forward passes in the recipe's precision."""
        return autocast(self.recipe.amp, self.machine.device)

    def step(self, batch: Batch, epoch: int, step: int) -> None:
        """Do one optimiser step on a batch, divided into ``grad_accum_steps`` parts."""
        self._set_learning_rate(epoch, step)
        inputs, targets = (self._on_device(part) for part in (batch.inputs, batch.targets))
        if self.machine.channels_last:
            inputs = images_to_channels_last(inputs)
        inputs, targets = self.objective.prepare(inputs, targets)
        parts = _parts(inputs, targets, self.recipe.grad_accum_steps)
        total = samples_in(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (part, target) in enumerate(parts):
            last = number == len(parts) - 1
            network = cast(Any, self.network)
            with network.no_sync() if world_size() > 1 and not last else nullcontext():
                with self.autocast():
                    loss, output = self.objective(network, part, target)
                self.scaler.scale(loss * (samples_in(part) / total)).backward()
            self._add_to_sums(loss, output, target, samples_in(part))
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.coded is not None:
            self.coded.project()
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.updates)

    @torch.no_grad()
    def _add_to_sums(self, loss: Tensor, output: object, targets: Any, count: int) -> None:
        correct = loss.new_zeros(())
        logits = main_output(output)
        if self.objective.classifies and isinstance(logits, Tensor) and logits.dim() == 2:
            labels = targets if targets.dim() == 1 else targets.argmax(1)
            correct = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack(
            [loss.detach().double() * count, correct.double(), loss.new_tensor(count, dtype=torch.float64)]
        )

    def _on_device(self, value: Any) -> Any:
        device = self.machine.device
        return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)

    def _set_learning_rate(self, epoch: int, step: int) -> None:
        if self.scheduler is None:
            return
        if self.steps is None:
            self.scheduler.step(epoch)
        else:
            self.scheduler.step_update(epoch * self.steps + step)

    def should_read_sums(self, step: int) -> bool:
        """Return whether to call `read_sums` after this step."""
        return self.machine.device.type == "cpu" or (step + 1) % STEPS_BETWEEN_READS == 0

    def read_sums(self, request: StopRequest) -> tuple[tuple[float, ...], int]:
        """Return the sums since the last call (loss x images, correct images, images), and the signal that arrived.

        Both are over all processes. The signal is 0 if no process received one.
        """
        received = torch.tensor([request.signal == number for number in SIGNALS], dtype=torch.float64)
        shared = torch.cat([self.sums.cpu(), received])
        sum_over_ranks([shared])
        self.sums.zero_()
        *sums, _, _ = shared.tolist()
        return tuple(sums), max(number * int(count > 0) for number, count in zip(SIGNALS, shared[-2:], strict=True))

    def result_network(self) -> nn.Module:
        """Return the network that is the result of the training: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def lr(self) -> float:
        """Return the learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def finish(self) -> None:
        """Copy the moving average, if there is one, into the network; put it in eval mode."""
        if self.ema is not None:
            fill(self.model, tensors_of(self.ema.module))
        self.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load_state_dict` restores."""
        return {
            "model": tensors_of(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": tensors_of(self.ema.module) if self.ema is not None else None,
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            InputError: the state does not fit this network.
        """
        try:
            load_exactly(self.model, state["model"], "it")
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                load_exactly(self.ema.module, state["ema"], "its moving average")
            self.updates = int(state["updates"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(f"the training state does not fit this network: {first_line(error)}") from error


def _parts(inputs: Any, targets: Any, count: int) -> list[tuple[Any, Any]]:
    """Divide a batch into ``count`` parts; inputs of other forms than a tensor or a list of images are one part."""
    if count == 1 or not isinstance(inputs, Tensor | list):
        return [(inputs, targets)]
    size = -(-len(inputs) // count)
    rows = [slice(start, start + size) for start in range(0, len(inputs), size)]
    return [(inputs[part], None if targets is None else targets[part]) for part in rows]


def autocast(amp: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for forward passes in a precision of `Recipe.amp`."""
    return nullcontext() if amp == "float32" else torch.autocast(device.type, getattr(torch, amp))


def _optimizer_and_scheduler(model: nn.Module, recipe: Recipe, steps: int | None) -> tuple[torch.optim.Optimizer, Any]:
    # timm's "none" has no warm-up, and timm before 1.0.31 has no "constant". A step schedule without decay is the same.
    constant = recipe.sched == "constant" or (recipe.sched == "none" and recipe.warmup_epochs > 0)
    try:
        optimizer = create_optimizer_v2(
            [p for p in model.parameters() if p.requires_grad],
            recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            "step" if constant else recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            decay_epochs=recipe.decay_epochs,
            decay_milestones=list(recipe.decay_milestones),
            decay_rate=1.0 if constant else recipe.decay_rate,
            min_lr=recipe.min_lr,
            step_on_epochs=steps is None,
            updates_per_epoch=steps or 0,
        )
        if scheduler is None and recipe.sched != "none":  # timm before 1.0.31 ignores an unknown schedule
            raise ValueError(f"Unknown scheduler {recipe.sched!r}.")
    except (AssertionError, ValueError, KeyError, TypeError, ImportError) as error:
        opt, sched = Argument("opt"), Argument("sched")
        raise UsageError("timm does not accept ", opt, " or ", sched, f": {first_line(error)}") from error
    return optimizer, scheduler


def choose_parameters(model: nn.Module, recipe: Recipe) -> None:
    """Turn off the gradients of all parameters that the recipe does not train.

    Raises:
        UsageError: the recipe trains no parameter of this network.
    """
    if recipe.train_only == "coefficients":
        chosen = {
            id(layer._parameters[name]) for layer in converted_layers(model).values() for name in stored_names(layer)
        }
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    if recipe.freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problem = f"this {type(model).__name__} has no parameter to train"
        raise UsageError(problem, ": change ", Argument("train_only"), " or ", Argument("freeze_bn"))


def number_of_classes(model: nn.Module) -> int | None:
    """Return a classifier's number of classes: ``num_classes``, or its last linear layer's width; None without both."""
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes > 0:
        return classes
    last = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    return last[-1] if last else None
