"""Layers of low rank: any convolution or linear layer whose weight is the product of two matrices.

`RankedMixin` computes the parameter of a layer (the coefficients of a harmonic convolution, or the weight of a 1x1
convolution or a linear layer) from two smaller ones, and does not change the forward. `to_ranked` and `to_full_rank`
convert between the two. `LowRank` is the form for speed: two plain layers, one after the other.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.projection import from_groups, to_groups
from ..kernels.ranks import Pair, full_rank, low_rank, low_rank_of_channels, product
from .harmonic import (
    HarmonicMixin,
    base_class,
    copy_state,
    harmonic_class,
    is_harmonic_layer,
    parameter_like,
    reason_not_convertible,
    without_autocast,
)

_OWN_NAMES = ("coefficients_in", "coefficients_out")


class RankedMixin(nn.Module):
    """A layer whose weight has a low rank: the product of two matrices in each group of channels.

    ``coefficients_in`` (groups x rank, in / groups, F) maps the responses to ``rank`` numbers, ``coefficients_out``
    (out, rank) maps these to the outputs. If the second matrix has the kernel, their shapes are
    (groups x rank, in / groups, 1) and (out, rank, F). F is 1 for 1x1 convolutions and linear layers.
    """

    coefficients_in: nn.Parameter
    coefficients_out: nn.Parameter

    @property
    def rank(self) -> int:
        """Return the rank in each group."""
        return self.coefficients_out.shape[1]

    @property
    def kernel_second(self) -> bool:
        """Return whether the second matrix has the kernel."""
        return self.coefficients_out.dim() == 3

    @property
    def pair(self) -> Pair:
        """Return the two matrices, with one block for each group."""
        groups, out = groups_of(self), self.coefficients_out
        out_ORF = out if out.dim() == 3 else out[..., None]
        return Pair(self.coefficients_in.unflatten(0, (groups, -1)), out_ORF.unflatten(0, (groups, -1)))

    @torch.no_grad()
    def write(self, pair: Pair) -> None:
        """Set the two matrices, rounded to the dtype of the parameters."""
        self.coefficients_in.copy_(pair.first_GRIF.flatten(0, 1))
        self.coefficients_out.copy_(pair.second_GORF.flatten(0, 1).view_as(self.coefficients_out))

    def _product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the product in the shape of the parameter that it replaces, computed in this dtype or a better one."""
        pair, dtype = self.pair, torch.promote_types(self.coefficients_in.dtype, dtype)
        frequencies = max(pair.first_GRIF.shape[3], pair.second_GORF.shape[3])
        with without_autocast(self.coefficients_in.device.type):
            product_GON = product(pair.first_GRIF.to(dtype), pair.second_GORF.to(dtype))
        product_OIF = from_groups(product_GON, frequencies, is_transposed(self)).to(self.coefficients_in.dtype)
        if is_harmonic_layer(self):
            return product_OIF
        return as_kernel(product_OIF.flatten(1), _dimensions(self))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the matrices: the projection of a random layer with torch's default distribution."""
        full = to_full_rank(self)
        cast(Any, full).reset_parameters()
        self.write(pair_for(full, self.rank, self.kernel_second))
        if (bias := self._parameters.get("bias")) is not None:
            bias.copy_(cast(Tensor, full.bias))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created at run time, so pickle and copy need a function that creates it again.
        return empty_ranked_of, (base_of(self), is_harmonic_layer(self)), self.__getstate__()


class _RankedCoefficients(RankedMixin, HarmonicMixin):
    """The coefficients of a harmonic convolution are a product."""

    @property
    def coefficients(self) -> Tensor:  # type: ignore[override]
        return self._product()

    def _stored(self) -> Tensor:
        return self.coefficients_in


class _RankedWeight(RankedMixin):
    """The weight of a 1x1 convolution or a linear layer is a product."""

    @property
    def weight(self) -> Tensor:
        return self._product()


def is_ranked(layer: nn.Module) -> TypeGuard[RankedMixin]:
    """Return whether a layer has a low rank."""
    return isinstance(layer, RankedMixin)


@cache
def ranked_class(base: type[nn.Module], harmonic: bool) -> type[nn.Module]:
    """Return the subclass of a convolution or linear class whose weight has a low rank, always the same object."""
    mixin = _RankedCoefficients if harmonic else _RankedWeight
    name = f"Ranked{'Harmonic' if harmonic else ''}{base.__name__}"
    return type(name, (mixin, base), {"__module__": __name__, "convolution": base})


def reason_not_rankable(layer: nn.Module) -> str | None:
    """Return why a convolution or linear layer cannot have a low rank, or None if it can."""
    if is_ranked(layer):
        return "it has a low rank already: fuse() the network first"
    if is_harmonic_layer(layer):
        return None
    classes = (cls for cls in type(layer).__mro__ if not cls.__module__.startswith("torch."))
    own = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}.union(*map(vars, classes))
    if conflicts := own & {*_OWN_NAMES, "pair", "rank", "kernel_second"}:
        return f"it has an attribute {min(conflicts)!r} of its own, a name that the low rank needs: rename it"
    return reason_not_convertible(layer)


def to_ranked(
    layer: nn.Module, rank: int, kernel_second: bool = False, memo: dict[int, Any] | None = None, values: bool = True
) -> nn.Module:
    """Return the counterpart of a layer with a low rank, which is the nearest one; the layer is not changed.

    >>> to_ranked(nn.Linear(8, 8, bias=False), 2)
    RankedLinear(in_features=8, out_features=8, bias=False, rank=2)

    Args:
        layer: a harmonic convolution, a 1x1 convolution, or a linear layer.
        rank: from 1 to the full rank of each group.
        kernel_second: the second matrix has the kernel (`kernels.ranks`).
        memo: as for `copy.deepcopy`, for copying a network whose parts share objects.
        values: if False, the matrices are not computed: the caller fills them.

    Raises:
        UsageError: the layer cannot have a low rank, or the rank is out of range.
    """
    if reason := reason_not_rankable(layer):
        raise UsageError(f"cannot give this {type(layer).__name__} a low rank: {reason}")
    memo = {} if memo is None else memo
    ranked = memo.setdefault(id(layer), empty_ranked(layer))
    name = _parameter_name(layer)
    parameter = cast(nn.Parameter, layer._parameters[name])
    groups, rows, channels, frequencies = sizes_of(layer)
    most = full_rank(rows, channels, frequencies, kernel_second)
    if not 1 <= rank <= most:
        raise UsageError(f"rank {rank} of this {type(layer).__name__} is out of range: 1 to {most}")
    tie = hash(("rank", id(parameter), rank, kernel_second))
    if tie not in memo:
        if values:
            pair = pair_for(layer, rank, kernel_second)
        else:
            empty = parameter.detach().new_empty
            inner, outer = (1, frequencies) if kernel_second else (frequencies, 1)
            pair = Pair(empty(groups, rank, channels, inner), empty(groups, rows, rank, outer))
        second_ORF = pair.second_GORF.flatten(0, 1)
        made = pair.first_GRIF.flatten(0, 1), second_ORF if kernel_second else second_ORF[..., 0]
        memo[tie] = {
            own: parameter_like(parameter, value.to(parameter.dtype).contiguous())
            for own, value in zip(_OWN_NAMES, made, strict=True)
        }
    copy_state(layer, ranked, [name], memo[tie], memo)
    return cast(nn.Module, ranked)


def to_full_rank(ranked: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return the layer whose parameter is the product; inverse of `to_ranked`.

    >>> to_full_rank(to_ranked(nn.Conv2d(8, 8, 1), 2))
    Conv2d(8, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    if not is_ranked(ranked):
        raise UsageError(f"{type(ranked).__name__} has no low rank")
    memo = {} if memo is None else memo
    full = memo.setdefault(id(ranked), empty_full_rank(ranked))
    tie = hash(("product", id(ranked.coefficients_in), id(ranked.coefficients_out)))
    if tie not in memo:
        with torch.no_grad():
            memo[tie] = parameter_like(ranked.coefficients_in, ranked._product(torch.float64).detach().contiguous())
    copy_state(ranked, full, _OWN_NAMES, {_parameter_name(ranked): memo[tie]}, memo)
    return full


def pair_for(layer: nn.Module, rank: int, kernel_second: bool) -> Pair:
    """Return the nearest pair of matrices for the present weight of a layer, float64."""
    coefficients_GON = matrices_of(layer)
    nearest = low_rank_of_channels if kernel_second else low_rank
    return nearest(coefficients_GON, sizes_of(layer)[3], rank)


def matrices_of(layer: nn.Module) -> Tensor:
    """Return the coefficients of a layer, float64, (groups, rows, channels x frequencies)."""
    stored = cast(Tensor, getattr(layer, _parameter_name(layer))).detach()
    stored = stored.flatten(2) if stored.dim() > 2 else stored[..., None]
    return to_groups(stored.to(torch.float64), groups_of(layer), is_transposed(layer))


def sizes_of(layer: nn.Module) -> tuple[int, int, int, int]:
    """Return the groups, and the rows, channels and frequencies of each group of a layer's coefficients."""
    groups = groups_of(layer)
    frequencies = len(layer.frequencies) if is_harmonic_layer(layer) else 1
    inputs, outputs = channels_of(layer)
    return groups, outputs // groups, inputs // groups, frequencies


def as_kernel(matrix: Tensor, dimensions: int) -> Tensor:
    """Return a matrix as the weight of a 1x1 convolution with this number of dimensions, or of a linear layer (0)."""
    return matrix.reshape(*matrix.shape, *((1,) * dimensions))


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output channels of a convolution or linear layer."""
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    inputs, outputs = (cast(int, getattr(layer, name)) for name in names)
    return inputs, outputs


def groups_of(layer: nn.Module) -> int:
    """Return the number of groups of a layer; 1 for a linear layer."""
    return cast(int, getattr(layer, "groups", 1))


def empty_ranked(layer: nn.Module) -> Any:
    """Return a layer of low rank without state; `to_ranked` finds it in ``memo`` and fills it."""
    harmonic = is_harmonic_layer(layer)
    return empty_ranked_of(base_class(layer) if harmonic else type(layer), harmonic)


def empty_full_rank(ranked: nn.Module) -> Any:
    """Return a layer of full rank without state; `to_full_rank` finds it in ``memo`` and fills it."""
    base = base_of(ranked)
    cls = harmonic_class(cast(Any, base)) if is_harmonic_layer(ranked) else base
    return cls.__new__(cls)


def empty_ranked_of(base: type[nn.Module], harmonic: bool) -> Any:
    """Return a layer of low rank without state, for a class of layers."""
    cls = ranked_class(cast(Any, base), harmonic)
    return cls.__new__(cls)


def base_of(ranked: nn.Module) -> type[nn.Module]:
    """Return the convolution or linear class from which a layer of low rank was made."""
    return cast(Any, type(ranked)).convolution


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is a transposed convolution."""
    return bool(getattr(layer, "transposed", False))


def _parameter_name(layer: nn.Module) -> str:
    return "coefficients" if is_harmonic_layer(layer) else "weight"


def _dimensions(layer: nn.Module) -> int:
    return len(cast("tuple[int, ...]", getattr(layer, "kernel_size", ())))
