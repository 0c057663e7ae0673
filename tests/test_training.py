"""Training: the loop equals a slow reference; recipes, distillation, and settings that are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import harmconvert as hc
from harmconvert.data import Batch
from harmconvert.errors import CheckError, InputError, UsageError
from harmconvert.layers import HarmonicMixin
from harmconvert.training import (
    RECIPES,
    Callbacks,
    MachineSettings,
    Recipe,
    StateFile,
    distillation,
    recipe_named,
    train,
)

from . import oracle
from .networks import seeded

PLAIN = MachineSettings(channels_last=False)
RECIPE = Recipe(epochs=2, batch_size=8, lr=0.05)


class Given:
    """Fixed batches instead of a loader, the same in every epoch."""

    def __init__(self, batches: list[Batch], steps: int | None = -1) -> None:
        self.batches, self.sampler = batches, None
        self.steps = len(batches) if steps == -1 else steps

    def epoch(self, number: int, first_step: int = 0) -> Iterator[Batch]:
        yield from self.batches[first_step:]


def noise(count: int = 4, size: int = 8, classes: int = 3, dtype: torch.dtype = torch.float32) -> Given:
    """Return batches of noise with labels that a network can memorise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, size, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(classes, (count, size), generator=generator)
    return Given([Batch(x, y, []) for x, y in zip(images, labels, strict=True)])


def small(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    def make() -> nn.Module:
        first = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout))
        return nn.Sequential(first, nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))

    return seeded(make, dtype)


def bare() -> nn.Module:
    """Return a network without batch norm, so that batches can be split."""
    return seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.float64)


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the loop ---


def test_training_equals_gradient_descent_with_momentum_and_decay() -> None:
    batches = noise(dtype=torch.float64)
    ours, theirs = small(torch.float64), small(torch.float64).train()
    train(ours, batches, RECIPE, machine=PLAIN)
    order = iter(batches.batches * RECIPE.epochs)

    def loss() -> Tensor:
        batch = next(order)
        return functional.cross_entropy(theirs(batch.inputs), batch.targets)

    oracle.sgd(list(theirs.parameters()), loss, 8, RECIPE.lr, RECIPE.momentum, RECIPE.weight_decay)
    assert torch.allclose(values(ours), values(theirs), rtol=1e-10, atol=1e-12)
    assert torch.allclose(ours[0][1].running_var, theirs[0][1].running_var, rtol=1e-10)


def test_training_with_the_whole_basis_equals_training_of_the_plain_network() -> None:
    """The basis is orthonormal, so steps and decay of coefficients equal those of the kernel."""
    plain = small(torch.float64)
    harmonic = hc.convert(plain).model
    assert sum(isinstance(m, HarmonicMixin) for m in harmonic.modules()) == 2
    for network in (plain, harmonic):
        train(network, noise(dtype=torch.float64), RECIPE, machine=PLAIN)
    assert torch.allclose(values(hc.fuse(harmonic)), values(plain), rtol=1e-9, atol=1e-11)


def test_a_truncated_network_stays_truncated() -> None:
    harmonic = hc.convert(small(), {"1": 2}).model
    train(harmonic, noise(), RECIPE, machine=PLAIN)
    assert len(harmonic.get_submodule("1").frequencies) == 3
    assert harmonic.get_submodule("1").coefficients.shape == (6, 6, 3)


def test_rows_have_the_metrics_of_each_epoch() -> None:
    model, told, done = small(), [], []
    callbacks = Callbacks(progress=told.append, epoch_done=lambda rows: done.append(len(rows)))
    rows = train(model, noise(), RECIPE, machine=PLAIN, callbacks=callbacks)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert rows[0]["images"] == 32
    assert done == [1, 2]
    assert [(t.epoch, t.step) for t in told] == [(e, s) for e in (0, 1) for s in (1, 2, 3, 4)]
    assert not model.training


def test_a_step_in_several_parts_gives_the_same_result() -> None:
    whole, parts = bare(), bare()
    train(whole, noise(dtype=torch.float64), RECIPE, machine=PLAIN)
    train(parts, noise(dtype=torch.float64), replace(RECIPE, grad_accum_steps=4), machine=PLAIN)
    assert torch.allclose(values(whole), values(parts), rtol=1e-12)


def test_channels_last_changes_only_rounding() -> None:
    one, other = small(torch.float64), small(torch.float64)
    train(one, noise(dtype=torch.float64), RECIPE, machine=PLAIN)
    train(other, noise(dtype=torch.float64), RECIPE, machine=MachineSettings())
    assert torch.allclose(values(one), values(other), rtol=1e-9)


def test_frozen_batch_norms_keep_statistics_and_weights() -> None:
    model = small()
    before = copy.deepcopy(model[0][1].state_dict())
    train(model, noise(), replace(RECIPE, freeze_bn=True), machine=PLAIN)
    for key, tensor in model[0][1].state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert not torch.equal(model[1].weight, small()[1].weight)


def test_training_can_be_limited_to_coefficients() -> None:
    harmonic = hc.convert(small(), {"1": 2}).model
    before = copy.deepcopy(harmonic)
    train(harmonic, noise(), replace(RECIPE, train_only="coefficients"), machine=PLAIN)
    for (name, parameter), old in zip(harmonic.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old) != name.endswith("coefficients"), name
    for (name, buffer), old in zip(harmonic.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(buffer, old), f"{name} is no coefficient"


def test_the_moving_average_is_the_result() -> None:
    steps: list[Tensor] = []
    average, plain = bare(), bare()

    def seen(_: object) -> None:
        steps.append(values(plain))

    train(plain, noise(dtype=torch.float64), RECIPE, machine=PLAIN, callbacks=Callbacks(progress=seen))
    train(average, noise(dtype=torch.float64), replace(RECIPE, ema=0.5), machine=PLAIN)
    expected = steps[0]  # timm's moving average starts with the first step
    for step in steps[1:]:
        expected = 0.5 * expected + 0.5 * step
    assert torch.allclose(values(average), expected, rtol=1e-9)


def test_clipping_bounds_the_step() -> None:
    model = bare()
    clipped = replace(RECIPE, epochs=1, lr=1.0, weight_decay=0.0, momentum=0.0, clip_grad=1e-3)
    train(model, Given(noise(1, dtype=torch.float64).batches), clipped, machine=PLAIN)
    assert (values(model) - values(bare())).norm() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_training_works_in_half_precision(amp: str) -> None:
    model = small()
    rows = train(model, noise(), replace(RECIPE, amp=amp, epochs=6), machine=PLAIN)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert next(model.parameters()).dtype == torch.float32


def test_training_works_with_mixup_and_smoothing() -> None:
    model = small()
    rows = train(model, noise(), replace(RECIPE, mixup=0.2, cutmix=0.2, smoothing=0.1, epochs=8), machine=PLAIN)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_stream_of_unknown_length_can_be_trained_on() -> None:
    rows = train(small(), Given(noise().batches, steps=None), replace(RECIPE, sched="step"), machine=PLAIN)
    assert rows[0]["images"] == 32


@pytest.mark.slow
def test_a_compiled_network_is_trained_equally() -> None:
    one, other = small(torch.float64), small(torch.float64)
    train(one, noise(dtype=torch.float64), RECIPE, machine=PLAIN)
    train(other, noise(dtype=torch.float64), RECIPE, machine=MachineSettings(channels_last=False, compile=True))
    assert torch.allclose(values(one), values(other), rtol=1e-8)


# --- distillation ---


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_softened_divergence(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = oracle.softened_kl(student.numpy(), teacher.numpy(), temperature)
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_a_truncated_network_learns_from_the_uncut_network_without_labels() -> None:
    teacher = small()
    train(teacher, noise(), replace(RECIPE, epochs=10), machine=PLAIN)
    before = copy.deepcopy(teacher.state_dict())
    cut = hc.convert(teacher, {"1": 1}).model
    unlabelled = Given([batch._replace(targets=torch.full((8,), -1)) for batch in noise().batches])
    rows = train(cut, unlabelled, replace(RECIPE, distill=1.0, epochs=5), teacher=teacher, machine=PLAIN)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())


def test_labels_and_teacher_share_the_loss() -> None:
    model, teacher = bare(), seeded(bare, torch.float64, 5)
    recipe = replace(RECIPE, distill=0.25, epochs=1, lr=0.0)
    batch = noise(1, dtype=torch.float64).batches[0]
    (row,) = train(model, Given([batch]), recipe, teacher=teacher, machine=PLAIN)
    ours, theirs = model(batch.inputs), teacher(batch.inputs)
    expected = 0.75 * functional.cross_entropy(ours, batch.targets) + 0.25 * distillation(ours, theirs, 2.0)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


# --- recipes ---


def test_the_recipes_are_those_of_the_paper() -> None:
    fine, wrn, imagenet = RECIPES["finetune"], RECIPES["cifar-wrn"], RECIPES["imagenet-resnet"]
    assert (fine.epochs, fine.lr, fine.opt, fine.momentum) == (5, 0.001, "momentum", 0.9)
    assert (fine.weight_decay, fine.batch_size, fine.crop, fine.hflip) == (1e-4, 256, "resized", 0.5)
    assert (wrn.epochs, wrn.batch_size, wrn.lr, wrn.weight_decay, wrn.crop) == (200, 128, 0.1, 5e-4, "padded")
    assert (wrn.decay_milestones, wrn.decay_rate) == ((60, 120, 160), 0.2)
    assert (imagenet.epochs, imagenet.lr, imagenet.weight_decay, imagenet.batch_size) == (90, 0.1, 1e-4, 256)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar-wrn", [(0, 0.1), (58, 0.1), (60, 0.02), (120, 0.004), (160, 0.0008), (199, 0.0008)]),
        ("imagenet-resnet", [(0, 0.1), (29, 0.1), (30, 0.01), (60, 0.001), (89, 0.001)]),
        ("finetune", [(0, 0.001), (4, 0.001)]),
    ],
)
def test_the_learning_rates_are_those_of_the_paper(name: str, expected: list[tuple[int, float]]) -> None:
    recipe = replace(RECIPES[name], batch_size=8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    one = Given([Batch(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long), [])])
    rows = train(model, one, recipe, machine=PLAIN)
    for epoch, lr in expected:
        assert rows[epoch]["lr"] == pytest.approx(lr), epoch


def test_a_constant_learning_rate_may_have_a_warm_up() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    one = Given([Batch(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long), [])])
    recipe = replace(RECIPES["finetune"], batch_size=8, epochs=6, warmup_epochs=3)
    rates = [row["lr"] for row in train(model, one, recipe, machine=PLAIN)]
    assert rates[0] < rates[1] < rates[2] < rates[3]
    assert rates[3:] == pytest.approx([0.001] * 3)
    assert "decay_epochs" not in str(recipe_named("finetune", epochs=6))


def test_a_schedule_stretches_with_the_epochs() -> None:
    assert recipe_named("cifar-wrn", epochs=20).decay_milestones == (6, 12, 16)
    assert recipe_named("imagenet-resnet", epochs=9).decay_epochs == pytest.approx(3)
    assert recipe_named("cifar-wrn", epochs=20, decay_milestones=(1,)).decay_milestones == (1,)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_converted_to_json_and_back(name: str) -> None:
    recipe = RECIPES[name]
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_a_recipe_prints_what_was_changed() -> None:
    text = str(recipe_named("finetune", epochs=3, smoothing=0.1, seed=7))
    assert text.startswith("finetune: 3 epochs, momentum, lr 0.001 (constant), weight decay 0.0001, batch 256, seed 7")
    assert "smoothing=0.1" in text
    assert "mixup" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs \(=0\) must be at least 1"),
        ({"amp": "int8"}, "amp .* must be one of float32, bfloat16, float16"),
        ({"distill": 2.0}, r"distill \(=2.0\) must be from 0 to 1"),
        ({"lr": -1.0}, r"lr \(=-1.0\) must not be negative"),
        ({"distill": 1.0, "mixup": 0.2}, "mixup and cutmix mix labels, but distill=1 uses no labels"),
    ],
)
def test_invalid_recipes_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_named("finetune", **changes)


def test_unreadable_recipes_are_refused() -> None:
    with pytest.raises(InputError, match="unknown settings: warp"):
        Recipe.from_json({"warp": 9})
    with pytest.raises(InputError, match="cannot read the recipe: its settings: epochs: -1 should be a count"):
        Recipe.from_json({"epochs": -1})
    with pytest.raises(UsageError, match="there is no recipe 'magic': use one of finetune"):
        recipe_named("magic")


# --- what goes wrong ---


def test_a_loss_that_is_not_finite_stops_the_run_and_the_message_says_where(tmp_path: Path) -> None:
    batches = noise()
    batches.batches[2].inputs[0, 0, 0, 0] = float("nan")
    state_file = StateFile(tmp_path / "run.state.pth", every=1)
    with pytest.raises(
        CheckError,
        match=r"no longer finite in epoch 1, step 3 .*lower lr, or give clip_grad=1.*run.state",
    ):
        train(small(), batches, RECIPE, machine=PLAIN, state_file=state_file)
    state = torch.load(tmp_path / "run.state.pth", weights_only=True)
    assert state["position"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """The loss is computed before the step: here it is finite, but the step makes the weights infinite."""
    state_file = StateFile(tmp_path / "run.state.pth", every=1)
    batches = noise(dtype=torch.float64)
    for batch in batches.batches:
        batch.inputs.mul_(1e3)
    with pytest.raises(CheckError, match=r"0.weight is no longer finite in epoch 1, step 1"):
        train(bare(), batches, replace(RECIPE, lr=1e308), machine=PLAIN, state_file=state_file)
    assert not (tmp_path / "run.state.pth").exists()


def test_labels_beyond_the_classes_stop_the_training() -> None:
    batches = noise()
    batches.batches[0].targets[3] = 5
    with pytest.raises(InputError, match="label 5 is beyond the 3 classes"):
        train(small(), batches, RECIPE, machine=PLAIN)


def test_images_without_labels_need_a_teacher() -> None:
    batches = noise()
    batches.batches[0].targets[3] = -1
    with pytest.raises(InputError, match=r"have no labels: give a folder for each class, or .*\(distill\)"):
        train(small(), batches, RECIPE, machine=PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": 0.5}, "distillation needs the uncut network: name it with teacher=SOURCE"),
        ({"grad_accum_steps": 3}, "a batch of 8 images cannot be divided evenly over 1 process x 3 parts"),
        ({"opt": "nonsense"}, "timm does not accept opt or sched"),
        ({"train_only": "coefficients"}, "has no parameter to train: change train_only or freeze_bn"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(small(), noise(), replace(RECIPE, **changes), machine=PLAIN)


def test_an_epoch_without_a_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="smaller than a batch, or the stream is empty"):
        train(small(), Given([], steps=None), RECIPE, machine=PLAIN)
