"""The channel axis: a layer's weight is the product of two matrices of a low rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...kernels.projection import from_groups, to_groups
from ...kernels.ranks import Pair, full_rank, low_rank, low_rank_of_channels, product
from ...layers.harmonic import is_harmonic_layer, to_harmonic
from ...layers.low_rank import SPARSE
from ...layers.ranked import empty_ranked, groups_of, is_ranked, is_transposed, matrices_of, pair_for, to_ranked
from ...network.exchange import exchange
from ...network.layers import LayerInfo, weighted_layers
from ..axes import Axis, Check, Expected, Kept, LayerCost, WeightShape
from ..space.check import kernel_difference
from .ranks import Rank, RankSetting, pair_size, rank_of

# The product may be this much farther from the weight than the nearest one, relative to the weight: rounding errors of
# the matrices, in units of their dtype's epsilon.
_ROUNDING = 16.0
# A search tries ranks with which the two matrices have these shares of the values of the weight.
_SHARES = (0.8, 0.6, 0.45, 0.33, 0.24, 0.16)


class ChannelAxis(Axis):
    """The ranks of all convolutions and linear layers; used only with a setting."""

    name: ClassVar[str] = "channels"
    budget_units: ClassVar[frozenset[str]] = frozenset({"params", "macs", "latency"})
    refits: ClassVar[bool] = True
    readable: ClassVar[bool] = True
    needs_setting: ClassVar[bool] = True

    def applies(self, layer: LayerInfo) -> bool:
        """Return True: the axis is for convolutions and linear layers of every kernel size."""
        return True

    def whole(self, layer: LayerInfo, setting: Any = None) -> Rank:
        """Return the full rank."""
        return rank_of(layer, None)

    def plan(
        self, layers: Sequence[LayerInfo], setting: Any, named: Collection[str], notes: dict[str, str]
    ) -> dict[str, Kept]:
        """Return the rank of each layer whose rank is reduced; empty without a setting."""
        return {**cast(RankSetting, setting).planned(layers, named, notes)} if setting is not None else {}

    def choices(self, whole: Kept) -> tuple[Kept, ...]:
        """Return the full rank, and the ranks with which the matrices have some shares of the weight's values."""
        own = cast(Rank, whole)
        if own.matrix is None:
            return (whole,)
        one = pair_size(*own.matrix, 1, own.kernel_second)
        most = full_rank(*own.matrix, own.kernel_second)
        ranks = (int(share * prod(own.matrix) / one) for share in _SHARES)
        return (whole, *(replace(own, rank=rank) for rank in dict.fromkeys(ranks) if 1 <= rank < most))

    def allows(self, kept: Kept, others: Sequence[Kept]) -> bool:
        """Return whether two matrices of this rank are smaller than the weight with the kept frequencies."""
        own = cast(Rank, kept)
        if own.rank is None or own.matrix is None:
            return True
        rows, channels, frequencies = own.matrix
        for other in others:
            frequencies = other.part_of(frequencies)
        return pair_size(rows, channels, frequencies, own.rank, own.kernel_second) < rows * channels * frequencies

    def shared(self, kept: Sequence[Kept]) -> Rank:
        """Return the largest rank."""
        own = cast("Sequence[Rank]", kept)
        return next((one for one in own if one.whole), max(own, key=lambda one: one.rank or 0))

    def from_json(self, data: Any, kernel_size: tuple[int, ...]) -> Rank:
        """Read the result of `Rank.to_json`."""
        rank, groups = data["rank"], data.get("groups", 1)
        for number in (groups, *(() if rank is None else (rank,))):
            if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 1 << 31:
                raise ValueError(f"its rank {number!r:.40} is out of range")
        second, transposed = data.get("kernel_second", False), data.get("transposed", False)
        if not isinstance(second, bool) or not isinstance(transposed, bool) or len(data) > 4:
            raise ValueError("its rank is not valid")
        return Rank(rank, second, groups, transposed)

    def cost(self, shape: WeightShape, kept: Kept, cost: LayerCost) -> LayerCost:
        """Return the cost: two matrices instead of one. The factored form computes one layer after the other."""
        own = cast(Rank, kept)
        if own.rank is None:
            return cost
        channels = shape.in_channels // own.groups
        rows = shape.weights // (shape.kernel_positions * shape.in_channels)
        frequencies = cost.kept_parameters // (rows * own.groups * channels)
        parameters = own.groups * pair_size(rows, channels, frequencies, own.rank, own.kernel_second)
        factored = cost.factored_macs
        if shape.positions is not None and shape.splittable:
            first, second = (1, shape.kernel_positions) if own.kernel_second else (shape.kernel_positions, 1)
            first_macs = own.groups * own.rank * channels * first
            second_macs = own.groups * own.rank * rows * second
            before, after = shape.positions * shape.stride, shape.positions
            if own.transposed:  # its positions are those of the input
                before, after = shape.positions, shape.positions * shape.stride
            both = (before, shape.positions) if own.kernel_second else (shape.positions, after)
            factored = both[0] * first_macs + both[1] * second_macs
            if shape.factorable and not own.kernel_second and SPARSE * frequencies <= shape.kernel_positions:
                # The first layer is a factored convolution: fixed filters, then a product with the first matrix.
                filters = (cost.factored_macs or 0) - shape.positions * cost.kept_parameters
                factored = shape.positions * parameters + filters
        return replace(
            cost,
            kept_parameters=parameters,
            kept_bytes=cost.kept_bytes * parameters // max(cost.kept_parameters, 1),
            merge_macs=cost.merge_macs + own.groups * own.rank * rows * channels * frequencies,
            factored_macs=factored,
        )

    def project(self, kernel: Tensor, kept: Kept) -> Tensor:
        """Return the kernel of this rank that is nearest to ``kernel``."""
        return self.projector(kernel)(kept)

    def projector(self, kernel: Tensor) -> Callable[[Kept], Tensor]:
        """Return a function that computes the kernel of a rank that is nearest to ``kernel``."""
        stored = kernel.flatten(2) if kernel.dim() > 2 else kernel[..., None]

        @cache
        def pair_of(groups: int, transposed: bool, kernel_second: bool) -> Pair:
            """Return the pair of full rank. Its first rows and columns are the nearest pair of a lower rank."""
            matrices_GON = to_groups(stored, groups, transposed)
            sizes = (matrices_GON.shape[1], matrices_GON.shape[2] // stored.shape[2], stored.shape[2])
            nearest = low_rank_of_channels if kernel_second else low_rank
            return nearest(matrices_GON, stored.shape[2], full_rank(*sizes, kernel_second))

        def nearest_of(kept: Kept) -> Tensor:
            own = cast(Rank, kept)
            if own.rank is None:
                return kernel
            pair = pair_of(own.groups, own.transposed, own.kernel_second)
            product_GON = product(pair.first_GRIF[:, : own.rank], pair.second_GORF[:, :, : own.rank])
            return from_groups(product_GON, stored.shape[2], own.transposed).reshape(kernel.shape)

        return nearest_of

    def convert(self, model: nn.Module, kept: Mapping[str, Kept], values: bool = True) -> nn.Module:
        """Return a copy of the network in which the weights of the named layers have a low rank."""
        layers = weighted_layers(model)
        fill = {
            layers[name]: partial(to_ranked, layers[name], own.rank, own.kernel_second, values=values)
            for name, own in cast("Mapping[str, Rank]", kept).items()
            if own.rank is not None
        }
        return exchange(model, fill, empty_ranked)

    def read(self, layer: nn.Module) -> Rank | None:
        """Return the rank of a layer of low rank; None for any other layer."""
        if not is_ranked(layer):
            return None
        return Rank(layer.rank, layer.kernel_second, groups_of(layer), is_transposed(layer))

    def tensors(self, kept: Kept, kernel_size: tuple[int, ...]) -> Mapping[str, Expected | None]:
        """Return the shapes of the two matrices; they replace the coefficients."""
        own = cast(Rank, kept)
        if own.rank is None:
            return {}
        out = (None, own.rank, None) if own.kernel_second else (None, own.rank)
        text = f"be a matrix of rank {own.rank}"
        return {
            "coefficients": None,
            "coefficients_in": Expected((None, None, None), text),
            "coefficients_out": Expected(out, text),
        }

    def check(self, original: nn.Module, converted: nn.Module, kept: Kept | None, as_calibrated: bool | None) -> Check:
        """Check that the product of the two matrices is the nearest one to the original weight."""
        count, total, difference = kernel_difference(original, converted)
        problem = None
        if not is_ranked(converted) or (kept is not None and self.read(converted) != kept):
            problem = "its rank is not the one of the plan"
        elif as_calibrated is not None:
            problem = None if as_calibrated else "its coefficients are not what calibration wrote"
        elif not _nearest(original, converted):
            problem = f"the product of its matrices is not the nearest one of rank {converted.rank} to its weight"
        return Check(count, total, difference, problem)


def _nearest(original: nn.Module, converted: Any) -> bool:
    """Return whether a product is as near to the original's coefficients as the nearest one, up to rounding."""
    if is_harmonic_layer(converted) and not is_harmonic_layer(original):
        original = to_harmonic(original, converted.frequencies, converted.basis_spec)
    exact_GON, own_GON = matrices_of(original), converted.pair.product_GON.detach().to("cpu", torch.float64)
    best_GON = pair_for(original, converted.rank, converted.kernel_second).product_GON
    least, error = (float((exact_GON.cpu() - one.cpu()).norm()) for one in (best_GON, own_GON))
    rounding = _ROUNDING * torch.finfo(converted.coefficients_in.dtype).eps * float(exact_GON.norm())
    return error <= least + rounding
