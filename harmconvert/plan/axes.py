"""Axes: the independent ways in which a layer can keep less than its whole weight (space, channels, precision).

Each axis has its own folder beside this file, with a subclass of `Axis` that is registered in `plan/__init__.py`. The
folder contains the choices, mathematics, cost, JSON and checks of the axis. All other code asks a plan or `AXES` and
does not depend on the number of axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        """Return whether the layer keeps everything on this axis."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Return a short text that is unique among the values of one layer, for files of measured scores."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; inverse of `Axis.from_json`."""

    def part_of(self, total: int) -> int:
        """Return how many of ``total`` kernel positions are kept, for tables; ``total`` if the axis keeps them all."""
        return total

    @property
    def share(self) -> float | None:
        """Return about which share of the parameters is kept; None: a search tries all combinations with others."""
        return None

    @property
    def contexts(self) -> Mapping[str, str]:
        """Return texts, by tensor name, that digests must include: values alone do not determine the kernel."""
        return {}

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class WeightShape:
    """The facts about a layer's weight from which costs are computed.

    ``positions``: at how many positions the layer is computed, None if not known. ``factorable``: whether the class of
    the layer has a factored form. ``splittable``: whether a layer of low rank of this class can become two layers.
    ``stride``: the product of its strides.
    """

    weights: int
    kernel_size: tuple[int, ...]
    in_channels: int
    positions: int | None
    factorable: bool
    stride: int = 1
    splittable: bool = True

    @property
    def kernel_positions(self) -> int:
        """Return the number of weights of one kernel: 9 for 3x3, 1 for 1x1 and linear layers."""
        return prod(self.kernel_size)


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    ``parameters``, ``bytes``: number of weights in the original, and their bytes in a file. ``kept_parameters``,
    ``kept_bytes``: the same after conversion. ``constants``: float64 numbers that a file stores in addition.
    ``merge_macs``: multiply-adds to merge the kernel, once per forward. ``macs``: multiply-adds of the dense form per
    example. ``factored_macs``: those of the factored form, or of the dense form if there is no factored form. Both are
    None without a trace, and for layers that are no convolution or linear layer.
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
    """The result of checking one converted layer.

    ``kept``, ``total``: how many parts of the layer are kept, and of how many. ``error``: the largest difference of a
    weight, divided by the largest weight of the same filter. ``problem``: what is not as planned, or None.
    """

    kept: int
    total: int
    error: float
    problem: str | None


@dataclass(frozen=True)
class Expected:
    """The shape that a tensor in a file should have.

    ``shape``: lengths of the axes, None for any length. ``text``: the shape in words, used in a message after "should".
    """

    shape: tuple[int | None, ...]
    text: str

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape is as expected."""
        pairs = zip(shape, self.shape, strict=False)
        return len(shape) == len(self.shape) and all(expected in (None, length) for length, expected in pairs)


class Axis(ABC):
    """The interface of an axis; the folder `space` is an example.

    ``budget_units``: the units of a budget that this axis can reduce. ``refits``: whether calibration refits a layer
    that keeps less on this axis. ``readable``: whether `read` can tell from a converted module what it keeps.
    ``needs_setting``: layers have this axis only if the user gives a setting for it. ``matrices``: layers with several
    matrices, or whose inputs do not determine their weight, have this axis, too (`LayerInfo.matrices`).
    """

    name: ClassVar[str]
    budget_units: ClassVar[frozenset[str]]
    refits: ClassVar[bool] = False
    readable: ClassVar[bool] = False
    needs_setting: ClassVar[bool] = False
    matrices: ClassVar[bool] = False

    @abstractmethod
    def applies(self, layer: LayerInfo) -> bool:
        """Return whether a layer has this axis; see `has_axis`."""

    @abstractmethod
    def whole(self, layer: LayerInfo, setting: Any = None) -> Kept:
        """Return the value of a layer that keeps everything."""

    def plan(
        self, layers: Sequence[LayerInfo], setting: Any, named: Collection[str], notes: dict[str, str]
    ) -> dict[str, Kept]:
        """Return what each layer keeps under a policy, by layer name.

        Args:
            setting: the policy; None if the user gave none.
            named: names of the layers that the user named.
            notes: receives, by layer name, why a layer stays whole.
        """
        return {layer.name: self.whole(layer, setting) for layer in layers if self.applies(layer)}

    @abstractmethod
    def choices(self, whole: Kept) -> tuple[Kept, ...]:
        """Return the values among which a search may choose for a layer; the first is ``whole``."""

    def allows(self, kept: Kept, others: Sequence[Kept]) -> bool:
        """Return whether a layer may keep this together with what it keeps on the other axes."""
        return True

    @abstractmethod
    def shared(self, kept: Sequence[Kept]) -> Kept:
        """Return the value for layers that share a weight: it keeps everything that any of the layers keeps."""

    @abstractmethod
    def from_json(self, data: Any, kernel_size: tuple[int, ...]) -> Kept:
        """Read the result of `Kept.to_json`; raise ValueError, KeyError or UsageError if it is not valid."""

    def upgrade_json(self, layer: Mapping[str, Any], plan: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert the JSON of a layer from an older format version to this one."""
        return layer

    @abstractmethod
    def cost(self, shape: WeightShape, kept: Kept, cost: LayerCost) -> LayerCost:
        """Return the cost of a layer, given its cost after the earlier axes."""

    @abstractmethod
    def project(self, kernel: Tensor, kept: Kept) -> Tensor:
        """Return the kernel (O, I, *kernel_size) that is nearest to ``kernel`` among those that ``kept`` allows."""

    def projector(self, kernel: Tensor) -> Callable[[Kept], Tensor]:
        """Return `project` as a function of ``kept`` that computes once what several values share."""
        return partial(self.project, kernel)

    @abstractmethod
    def convert(self, model: nn.Module, kept: Mapping[str, Kept], values: bool = True) -> nn.Module:
        """Return a copy of a network in which each named layer keeps the given value.

        If ``values`` is False, the values of these layers are not computed, because they will be loaded.
        """

    def read(self, layer: nn.Module) -> Kept | None:
        """Return what a converted layer keeps; None if this cannot be read from the module."""
        return None

    def tensors(self, kept: Kept, kernel_size: tuple[int, ...]) -> Mapping[str, Expected | None]:
        """Return the shapes of the tensors that a file holds for a layer that keeps this, by tensor name.

        None: the file does not have this tensor of an earlier axis.
        """
        return {}

    @abstractmethod
    def check(self, original: nn.Module, converted: nn.Module, kept: Kept | None, as_calibrated: bool | None) -> Check:
        """Compare a converted layer with its original.

        ``as_calibrated``: whether the tensors are those that calibration wrote; None if calibration wrote none.
        """

    def facts(self, weight: Tensor, kept: Kept) -> Mapping[str, Any]:
        """Return facts about the original weight for JSON, for a report on a network whose original is not at hand."""
        return {}


# By name, in the order in which they are applied to a layer.
AXES: dict[str, Axis] = {}


def register(axis: Axis) -> None:
    """Add an axis. Axes are applied to a layer in the order of their registration."""
    AXES[axis.name] = axis


def has_axis(layer: LayerInfo, axis: str) -> bool:
    """Return whether a layer has an axis."""
    return (AXES[axis].matrices or not layer.matrices) and AXES[axis].applies(layer)


def kept_by(layer: nn.Module) -> tuple[Kept, ...]:
    """Return what a converted layer keeps, on each axis that can be read from it."""
    return tuple(kept for axis in AXES.values() if (kept := axis.read(layer)) is not None)


def last_cut(keeps: Sequence[Kept]) -> Kept | None:
    """Return the value of the last axis, in the order of `AXES`, that is not whole: this axis wrote the weight."""
    cut = [kept for kept in keeps if not kept.whole]
    return max(cut, key=lambda kept: list(AXES).index(kept.axis), default=None)


def projections(weight: Tensor, choices: Iterable[Sequence[Kept]]) -> Iterator[Tensor]:
    """Yield for each choice the weight, float64, that is nearest to ``weight`` among those that all its values allow.

    What a choice shares with the one before it is computed once.
    """
    root = _Projected(weight.detach().to(torch.float64))
    for choice in choices:
        node = root
        for kept in sorted(choice, key=lambda kept: list(AXES).index(kept.axis)):
            node = node.with_kept(kept)
        yield node.weight


class _Projected:
    """A weight, and the last of its projections along the next axis."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._projectors: dict[str, Callable[[Kept], Tensor]] = {}
        self._last: tuple[Kept, _Projected] | None = None

    def with_kept(self, kept: Kept) -> _Projected:
        if self._last is None or self._last[0] != kept:
            if kept.axis not in self._projectors:
                self._projectors[kept.axis] = AXES[kept.axis].projector(self.weight)
            self._last = kept, _Projected(self._projectors[kept.axis](kept))
        return self._last[1]
