"""The recipe: all settings that determine the result of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..data.joint import JointTransform
from ..data.preprocessing import Transform, padded_crop_transform, sample_transform, training_transform
from ..documents import check, count, finite, pair
from ..errors import InputError, UsageError, counted

CROPS = ("resized", "padded", "none")
PRECISIONS = ("float32", "bfloat16", "float16")
TRAINABLE = ("all", "coefficients")

# The values that a file may contain for a field of each type.
_SHAPES: dict[str, Any] = {
    "str": str, "int": count, "float": finite, "bool": bool, "str | None": (str, None), "float | None": (finite, None),
    "tuple[int, ...]": [count], "tuple[float, float]": pair,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the paper's fine-tuning of converted networks (sec. 5.2).

    ``batch_size``: images in one optimiser step, over all processes. ``opt``, ``sched`` and their arguments are timm's
    (timm's ``sgd`` has Nesterov momentum, ``momentum`` does not). ``crop``: ``resized`` (random area and aspect, as for
    ImageNet), ``padded`` (by ``padding`` pixels, then a random crop, as for CIFAR) or ``none``. ``amp``: precision of
    the forward pass. ``loss``: of the outputs and targets (empty: that of the kind of data). ``distill``: share (0 to
    1) of the loss that compares with the teacher's outputs; logits are softened by ``temperature``; 1 needs no targets.
    ``ema``: decay of a moving average of the weights (0: no average); the average is then the result.
    ``grad_accum_steps``: number of parts into which the images of a step are divided. ``freeze_bn``: batch norms keep
    their statistics and weights. ``train_only``: ``coefficients`` trains only harmonic coefficients.
    """

    name: str = "finetune"
    epochs: int = 5
    batch_size: int = 256
    opt: str = "momentum"
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    sched: str = "none"
    warmup_epochs: int = 0
    decay_epochs: float = 30
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    min_lr: float = 0.0
    crop: str = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    clip_grad: float | None = None
    ema: float = 0.0
    amp: str = "float32"
    grad_accum_steps: int = 1
    freeze_bn: bool = False
    train_only: str = "all"
    loss: str = ""
    distill: float = 0.0
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} (={getattr(self, name)}) must be at least 1")
        for name, known in (("crop", CROPS), ("amp", PRECISIONS), ("train_only", TRAINABLE)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} (={getattr(self, name)!r}) must be one of {', '.join(known)}")
        for name in ("distill", "hflip", "vflip", "reprob", "smoothing", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} (={getattr(self, name)}) must be from 0 to 1")
        for name in ("scale", "ratio"):
            least, greatest = getattr(self, name)
            if not 0 <= least <= greatest or greatest == 0 or (name == "ratio" and least == 0):
                raise UsageError(f"{name} (={least:g} {greatest:g}) must be two numbers above 0, the smaller one first")
        if self.lr < 0 or self.temperature <= 0:
            raise UsageError(f"lr (={self.lr}) must not be negative, temperature (={self.temperature}) must be above 0")
        if self.distill and (self.mixup or self.cutmix) and self.distill == 1:
            raise UsageError("mixup and cutmix mix labels, but distill=1 uses no labels: leave them out")

    def __str__(self) -> str:
        default = RECIPES.get(self.name, Recipe())
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if self._differs(default, f.name)]
        schedule = "constant" if self.sched == "none" else self.sched
        return (
            f"{self.name}: {counted(self.epochs, 'epoch')}, {self.opt}, lr {self.lr:g} ({schedule}), "
            f"weight decay {self.weight_decay:g}, batch {self.batch_size}, seed {self.seed}"
            + (f"; changed: {', '.join(changed)}" if changed else "")
        )

    @property
    def keeps_batch_norm(self) -> bool:
        """Return whether batch norms keep their statistics; with ``train_only="coefficients"`` they do, too."""
        return self.freeze_bn or self.train_only == "coefficients"

    def _differs(self, other: Recipe, name: str) -> bool:
        if self.sched in ("none", "constant") and name.startswith("decay_"):
            return False
        return name not in ("name", "seed") and getattr(self, name) != getattr(other, name)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict; inverse of `from_json`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """Return the recipe that `to_json` wrote.

        Raises:
            InputError: the data is not a recipe, or it has settings that this version does not know.
        """
        try:
            if not isinstance(data, Mapping):
                raise ValueError("it must be a mapping of settings")
            check(data, {field.name: _SHAPES[str(field.type)] for field in fields(cls)}, "its settings")
            if unknown := set(data) - {field.name for field in fields(cls)}:
                raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}: update harmconvert")
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return cls(**settings)
        except ValueError as error:  # UsageError is a ValueError
            raise InputError(f"cannot read the recipe: {error}") from error

    def transform(self, config: Mapping[str, Any]) -> Transform | JointTransform:
        """Return the transform of training images; ``config`` comes from `harmconvert.data.preprocessing`.

        Pictures with masks are cropped and mirrored with them, pictures with boxes or target pictures are mirrored.
        """
        if config.get("prepared"):
            return sample_transform(config)
        if "task" in config:
            scale = self.scale if self.crop == "resized" else None
            return JointTransform(config, scale=scale, ratio=self.ratio, hflip=self.hflip, vflip=self.vflip)
        if self.crop == "padded":
            return padded_crop_transform(config, self.padding, self.hflip, self.vflip)
        return training_transform(
            config,
            no_aug=self.crop == "none",
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            vflip=self.vflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.aa,
            re_prob=self.reprob,
        )


_SGD = Recipe(lr=0.1, sched="step")

# The recipes of the paper: for converted networks (sec. 5.2), for ImageNet networks (sec. 5.1: a tenth of the learning
# rate every 30 of 90 epochs), and for WRNs (Zagoruyko and Komodakis: a fifth at 60, 120 and 160 of 200 epochs).
RECIPES = {
    "finetune": Recipe(),
    "imagenet-resnet": replace(_SGD, name="imagenet-resnet", epochs=90),
    "cifar-wrn": replace(
        _SGD,
        name="cifar-wrn",
        epochs=200,
        batch_size=128,
        opt="sgd",
        weight_decay=5e-4,
        sched="multistep",
        decay_milestones=(60, 120, 160),
        decay_rate=0.2,
        crop="padded",
    ),
}


def recipe_named(name: str, **changes: Any) -> Recipe:
    """Return a recipe by its name, with changes (None changes nothing); the schedule scales with the epochs.

    With ``distill=1`` (no labels), batch norms are frozen unless ``freeze_bn`` is given. The teacher's batch norms are
    frozen, too, and the statistics of a few images differ much from those in the teacher.

    >>> recipe_named("cifar-wrn", epochs=20).decay_milestones
    (6, 12, 16)
    >>> recipe_named("finetune", distill=1).freeze_bn
    True

    Raises:
        UsageError: there is no recipe of that name, or a setting is invalid.
    """
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}: use one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    changes = {key: value for key, value in changes.items() if value is not None}
    changes.setdefault("freeze_bn", changes.get("distill", recipe.distill) == 1 or recipe.freeze_bn)
    stretch = max(changes.get("epochs", recipe.epochs), 1) / recipe.epochs
    stretched = replace(
        recipe,
        decay_epochs=recipe.decay_epochs * stretch,
        decay_milestones=tuple(round(milestone * stretch) for milestone in recipe.decay_milestones),
    )
    return replace(stretched, **changes)
