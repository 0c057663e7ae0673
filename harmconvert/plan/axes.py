"""Axes: the independent ways in which a layer keeps less than all of its weight (space, channels, precision).

Each axis has one home: a folder beside this file with a subclass of `Axis`, registered in `plan/__init__.py`. The home
owns the axis's choices, mathematics, cost, JSON and checks. All other code asks a plan or `AXES`, and does not know how
many axes there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..network.layers import LayerInfo


class Kept(ABC):
    """What one layer keeps on one axis: an immutable value that compares, prints and converts to JSON."""

    axis: ClassVar[str]

    @property
    @abstractmethod
    def whole(self) -> bool:
        """Whether the layer keeps everything on this axis."""

    @property
    @abstractmethod
    def key(self) -> str:
        """A short text that names this value and no other of the same layer, for files of measured scores."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; inverse of `Axis.from_json`."""

    def part_of(self, total: int) -> int:
        """How many of ``total`` positions of the kernel are kept, for the tables; an axis that keeps all: ``total``."""
        return total

    @property
    def contexts(self) -> Mapping[str, str]:
        """For tensors whose values mean nothing without this: tensor name to a text that their digests include."""
        return {}

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class WeightShape:
    """The shape of a layer's weight as a cost needs it: the number of weights, the kernel size, the input channels,
    the positions at which the layer is computed (None: not known), and whether it has a factored form."""

    weights: int
    kernel_size: tuple[int, ...]
    in_channels: int
    positions: int | None
    factorable: bool

    @property
    def kernel_positions(self) -> int:
        """Weights of one kernel: 9 for 3x3, 1 for 1x1 and linear layers."""
        return prod(self.kernel_size)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer: ``parameters`` of the original weight and ``kept_parameters`` in its place, their bytes
    as written, ``constants`` (numbers, float64) that the file holds beside them, and multiply-adds.

    ``macs`` are those of the dense form per example, ``factored_macs`` those of the factored form (of the dense form
    where there is none); None without a trace. ``merge_macs`` are needed once per forward to merge the kernel.
    """

    parameters: int
    kept_parameters: int
    bytes: int
    kept_bytes: int
    constants: int = 0
    merge_macs: int = 0
    macs: int | None = None
    factored_macs: int | None = None


@dataclass(frozen=True)
class Check:
    """The check of one layer: the amounts ``kept`` of ``total``, the largest difference of the kernel over the largest
    weight of the same filter, and what is not as planned (None: nothing)."""

    kept: int
    total: int
    error: float
    problem: str | None


@dataclass(frozen=True)
class Expected:
    """The shape that a tensor of a file should have: None for a length that may be any; ``text`` says it in a message
    after "should"."""

    shape: tuple[int | None, ...]
    text: str

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor has this shape."""
        pairs = zip(shape, self.shape, strict=False)
        return len(shape) == len(self.shape) and all(wanted in (None, length) for length, wanted in pairs)


class Axis(ABC):
    """One axis; see the package's `space` folder for an example.

    ``budget_units`` names the units of a budget that this axis can save, ``refits`` whether calibration refits a layer
    that keeps less on it, and ``readable`` whether a converted module says what it keeps (`read`).
    """

    name: ClassVar[str]
    budget_units: ClassVar[frozenset[str]]
    refits: ClassVar[bool] = False
    readable: ClassVar[bool] = False

    @abstractmethod
    def applies(self, layer: LayerInfo) -> bool:
        """Whether a layer has this axis."""

    @abstractmethod
    def whole(self, layer: LayerInfo, setting: Any = None) -> Kept:
        """What a layer keeps when it keeps everything."""

    def plan(
        self, layers: Sequence[LayerInfo], setting: Any, named: Collection[str], notes: dict[str, str]
    ) -> dict[str, Kept]:
        """What each layer keeps under a policy (``setting``, None where the user gave none), by name.

        ``named`` are layers that the user named; ``notes`` takes the reason why a layer stays whole.
        """
        return {layer.name: self.whole(layer, setting) for layer in layers if self.applies(layer)}

    @abstractmethod
    def choices(self, whole: Kept) -> tuple[Kept, ...]:
        """What a search may choose from for a layer that keeps ``whole``, that first."""

    @abstractmethod
    def shared(self, kept: Sequence[Kept]) -> Kept:
        """What layers that share a weight keep together: at least what each of them keeps."""

    @abstractmethod
    def from_json(self, data: Any, kernel_size: tuple[int, ...]) -> Kept:
        """Read what `Kept.to_json` wrote; raises ValueError, KeyError or UsageError where it is anything else."""

    def upgraded(self, layer: Mapping[str, Any], plan: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON of a layer, where it is of an older format version in the form of this one."""
        return layer

    @abstractmethod
    def cost(self, shape: WeightShape, kept: Kept, cost: LayerCost) -> LayerCost:
        """The cost of a layer, given the cost that the axes before this one leave."""

    @abstractmethod
    def project(self, kernel: Tensor, kept: Kept) -> Tensor:
        """The kernel (O, I, *kernel_size) nearest to ``kernel`` that a layer which keeps this can have."""

    @abstractmethod
    def convert(self, model: nn.Module, kept: Mapping[str, Kept], values: bool = True) -> nn.Module:
        """A copy of a network in which the named layers keep this; ``values`` False leaves their values to be loaded.

        ``model`` is not changed.
        """

    def read(self, layer: nn.Module) -> Kept | None:
        """What a converted layer says that it keeps; None where a module cannot say."""
        return None

    def tensors(self, kept: Kept, kernel_size: tuple[int, ...]) -> Mapping[str, Expected]:
        """Tensors that a file holds of such a layer, by name."""
        return {}

    @abstractmethod
    def check(self, original: nn.Module, converted: nn.Module, kept: Kept | None, as_calibrated: bool | None) -> Check:
        """Compare a converted layer with its original.

        ``as_calibrated`` says whether the tensors that calibration wrote are what it wrote (None: it wrote none).
        """

    def facts(self, weight: Tensor, kept: Kept) -> Mapping[str, Any]:
        """Facts about the original weight for a report that has no uncut network any more, JSON-able."""
        return {}


# In the order in which they are applied to a layer.
AXES: dict[str, Axis] = {}


def register(axis: Axis) -> None:
    """Make an axis known; axes are applied to a layer in the order of their registration."""
    AXES[axis.name] = axis


def kept_by(layer: nn.Module) -> tuple[Kept, ...]:
    """What a converted layer says that it keeps, on each axis."""
    return tuple(kept for axis in AXES.values() if (kept := axis.read(layer)) is not None)


def last_cut(keeps: Sequence[Kept]) -> Kept | None:
    """The last of some kept values, in the order of the axes, that is not whole: the axis that wrote the weight."""
    cut = [kept for kept in keeps if not kept.whole]
    return max(cut, key=lambda kept: list(AXES).index(kept.axis), default=None)


def projected(weight: Tensor, keeps: Sequence[Kept]) -> Tensor:
    """The weight nearest to ``weight`` that a layer which keeps all of this can have, in float64."""
    weight = weight.detach().to(torch.float64)
    for kept in sorted(keeps, key=lambda kept: list(AXES).index(kept.axis)):
        weight = AXES[kept.axis].project(weight, kept)
    return weight
