"""The precision axis: the coefficients of a layer are multiples of a step, and are entropy coded in the file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ...network.exchange import exchange
from ...network.layers import LayerInfo
from ..axes import Axis, Check, Kept, LayerCost, WeightShape
from ..space.check import kernel_difference
from .bits import MOST_BITS, Bits, BitsSetting

# A plan in a file has the bits that were written. A stream has some bytes of its own, so that a layer of few weights
# has many bits per weight.
_MOST_MEASURED = 4096


class PrecisionAxis(Axis):
    """The bits of all layers that a plan may contain; used only with a setting."""

    name: ClassVar[str] = "precision"
    budget_units: ClassVar[frozenset[str]] = frozenset()
    refits: ClassVar[bool] = True
    needs_setting: ClassVar[bool] = True
    matrices: ClassVar[bool] = True

    def applies(self, layer: LayerInfo) -> bool:
        """Return True: the axis is for all layers."""
        return True

    def whole(self, layer: LayerInfo, setting: Any = None) -> Bits:
        """Return the most bits that a layer can have. Without this axis, a layer stays in floating point."""
        return Bits(MOST_BITS)

    def plan(
        self, layers: Sequence[LayerInfo], setting: Any, named: Collection[str], notes: dict[str, str]
    ) -> dict[str, Kept]:
        """Return the bits of each layer; empty without a setting."""
        return cast(BitsSetting, setting).planned(layers) if setting is not None else {}

    def choices(self, whole: Kept) -> tuple[Kept, ...]:
        """Return the value itself: bits are chosen by the measured effect on the outputs, not by this search."""
        return (whole,)

    def shared(self, kept: Sequence[Kept]) -> Bits:
        """Return the largest number of bits."""
        return max(cast("Sequence[Bits]", kept), key=lambda one: one.bits)

    def from_json(self, data: Any, kernel_size: tuple[int, ...]) -> Bits:
        """Read the result of `Bits.to_json`."""
        bits, shared = data["bits"], data.get("shared", False)
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 <= bits <= _MOST_MEASURED:
            raise ValueError(f"{bits!r:.40} bits are out of range")
        if not isinstance(shared, bool) or len(data) > 2:
            raise ValueError("its bits are not a number")
        return Bits(float(bits), shared)

    def cost(self, shape: WeightShape, kept: Kept, cost: LayerCost) -> LayerCost:
        """Return the cost: the bytes are the bits of the kept parameters."""
        return replace(cost, kept_bytes=math.ceil(cast(Bits, kept).bits * cost.kept_parameters / 8))

    def project(self, kernel: Tensor, kept: Kept) -> Tensor:
        """Return the kernel itself: the steps depend on the whole network, not on one kernel."""
        return kernel

    def convert(self, model: nn.Module, kept: Mapping[str, Kept], values: bool = True) -> nn.Module:
        """Return a copy of the network; coding replaces the values later."""
        return exchange(model, {})

    def check(self, original: nn.Module, converted: nn.Module, kept: Kept | None, as_calibrated: bool | None) -> Check:
        """Compare the kernels. ``as_calibrated`` says whether the coefficients are those that were coded."""
        count, total, difference = kernel_difference(original, converted)
        changed = as_calibrated is False
        return Check(count, total, difference, "its weights are not those that were coded" if changed else None)
