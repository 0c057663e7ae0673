"""The form of a layer of low rank for speed: two plain layers, one after the other."""

from __future__ import annotations

import copy
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.basis import Basis, Frequency
from ..kernels.projection import from_groups, project, reconstruct, to_groups
from ..kernels.ranks import product
from .factored import FACTORABLE, reason_not_factorable, replaced_method, to_factored
from .harmonic import HarmonicMixin, harmonic_class, is_harmonic_layer, parameter_like, to_dense
from .ranked import (
    RankedMixin,
    as_kernel,
    base_of,
    channels_of,
    empty_ranked_of,
    groups_of,
    is_ranked,
    is_transposed,
    sizes_of,
    to_full_rank,
)

# Classes whose forward is known to be one product with `weight`, so that two layers can compute it.
SPLITTABLE: tuple[type[nn.Module], ...] = (
    *FACTORABLE, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
_POINTWISE: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# A convolution to few channels is factored if it keeps at most one in so many frequencies.
SPARSE = 2
_HARMONIC_STATE = ("frequencies", "basis_spec", "_merged", "_packed")


class LowRank(nn.Module):
    """Two layers that compute a layer of low rank: one has its kernel, the other one is 1x1; or both are linear.

    Made by `to_low_rank`; `from_low_rank` is the inverse.

    ``spectrum``: frequencies, basis and fitted basis of a harmonic convolution, or None.
    """

    first: nn.Module
    second: nn.Module
    kernel_second: bool
    base: type[nn.Module]
    spectrum: tuple[tuple[Frequency, ...], Basis, Tensor | None] | None

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(input)))

    @property
    def weight(self) -> Tensor:
        """Return the merged weight of the layer, in its own shape."""
        groups = groups_of(self.first)
        layers = (self.first, self.second)
        factors = [_matrices(one, groups, is_transposed(one)) for one in layers]
        merged_GON = product(
            *(
                factor.unflatten(2, (channels, -1))
                for factor, channels in zip(factors, (sizes_of(self.first)[2], sizes_of(self.second)[2]), strict=True)
            )
        )
        kernel = self.second if self.kernel_second else self.first
        size = tuple(cast("tuple[int, ...]", getattr(kernel, "kernel_size", ())))
        stored = from_groups(merged_GON, max(1, cast(Tensor, kernel.weight)[0, 0].numel()), is_transposed(kernel))
        return stored.unflatten(2, size) if size else stored[..., 0]

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the layer."""
        return cast("Tensor | None", self.second.bias)


def reason_not_splittable(ranked: RankedMixin) -> str | None:
    """Return why a layer of low rank cannot become two plain layers, or None if it can."""
    base = base_of(ranked)
    if base not in SPLITTABLE:
        return f"{base.__name__} computes something else with its weight than one product"
    if replaced := replaced_method(ranked, base):
        return f"its method {replaced} is not the one of {base.__name__}"
    if ranked._forward_pre_hooks or ranked._forward_hooks:
        return "it has hooks"
    return None


def to_low_rank(ranked: RankedMixin, memo: dict[int, Any] | None = None, harmonic: bool = False) -> LowRank:
    """Return two layers that compute the same as a layer of low rank, which is not changed.

    >>> from .ranked import to_ranked
    >>> to_low_rank(to_ranked(nn.Linear(8, 8), 2))
    LowRank(
      (first): Linear(in_features=8, out_features=2, bias=False)
      (second): Linear(in_features=2, out_features=8, bias=True)
    )

    Args:
        memo: as for `copy.deepcopy`.
        harmonic: the layer with the kernel of a harmonic convolution is harmonic, too; else it is plain.
    """
    memo = {} if memo is None else memo
    low = memo.setdefault(id(ranked), empty_low_rank())
    nn.Module.__init__(low)
    pair, second = ranked.pair, ranked.kernel_second
    kernel_part, mixing_part = (ranked.coefficients_out, ranked.coefficients_in)[:: 1 if second else -1]
    kernel_GRN = (pair.second_GORF if second else pair.first_GRIF).flatten(2)
    coefficients = from_groups(kernel_GRN, kernel_part.shape[2] if kernel_part.dim() > 2 else 1, is_transposed(ranked))
    kernel = _kernel_layer(ranked, coefficients.detach(), kernel_part, memo, harmonic)
    mixing = _mixing_layer(ranked, mixing_part, memo)
    bias = kernel if second else mixing
    if (own := ranked._parameters.get("bias")) is not None:
        bias._parameters["bias"] = copy.deepcopy(own, memo)
    low.first, low.second = (mixing, kernel) if second else (kernel, mixing)
    low.kernel_second, low.base, low.spectrum = second, base_of(ranked), None
    if is_harmonic_layer(ranked):
        low.spectrum = ranked.frequencies, ranked.basis_spec, ranked.fitted_basis
    return cast(LowRank, low.train(ranked.training))


def from_low_rank(low: LowRank, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return the layer of low rank that two layers compute; inverse of `to_low_rank`."""
    memo = {} if memo is None else memo
    ranked = memo.setdefault(id(low), empty_ranked_of(low.base, low.spectrum is not None))
    kernel, mixing = (low.second, low.first) if low.kernel_second else (low.first, low.second)
    state = {k: v for k, v in cast(Any, kernel).__getstate__().items() if k not in ("_parameters", *_HARMONIC_STATE)}
    ranked.__dict__.update(copy.deepcopy(state, memo))
    for buffer in ("basis", "fitted_basis"):
        ranked._buffers.pop(buffer, None)
    _set_channels(ranked, channels_of(low.first)[0], channels_of(low.second)[1])
    matrices = []
    for layer in (low.first, low.second):
        values = _stored(layer, low.spectrum if layer is kernel else None)
        matrix_GON = to_groups(values, groups_of(kernel), is_transposed(layer))
        matrices.append(matrix_GON.unflatten(2, (-1, values.shape[2])).flatten(0, 1).contiguous())
    if not low.kernel_second:
        matrices[1] = matrices[1][..., 0]
    like = cast(nn.Parameter, mixing.weight)
    names = ("coefficients_in", "coefficients_out")
    ranked._parameters = {name: parameter_like(like, matrix) for name, matrix in zip(names, matrices, strict=True)}
    ranked._parameters["bias"] = copy.deepcopy(low.second._parameters.get("bias"), memo)
    if low.spectrum is not None:
        ranked.frequencies, ranked.basis_spec, fitted = low.spectrum
        ranked._merged = None
        ranked._non_persistent_buffers_set.add("basis")
        ranked._buffers["fitted_basis"] = fitted
        ranked._set_basis()
    return ranked


def empty_low_rank() -> LowRank:
    """Return a module without state; `to_low_rank` finds it in ``memo`` and fills it."""
    return LowRank.__new__(LowRank)


def _kernel_layer(
    ranked: RankedMixin, coefficients: Tensor, part: nn.Parameter, memo: dict[int, Any], harmonic: bool
) -> nn.Module:
    """Return the layer with the kernel: a copy of the original with other channels, without a bias."""
    own = is_harmonic_layer(ranked)
    base = cast(Any, base_of(ranked))
    cls = harmonic_class(base) if own and harmonic else base
    layer = cls.__new__(cls)
    left_out = ("_parameters",) if own and harmonic else ("_parameters", *_HARMONIC_STATE)
    state = {key: value for key, value in cast(Any, ranked).__getstate__().items() if key not in left_out}
    layer.__dict__.update(copy.deepcopy(state, memo))
    inner = groups_of(ranked) * ranked.rank
    inputs, outputs = channels_of(ranked)
    _set_channels(layer, *((inner, outputs) if ranked.kernel_second else (inputs, inner)))
    name = "coefficients" if own and harmonic else "weight"
    if own and not harmonic:
        for buffer in ("basis", "fitted_basis"):
            layer._buffers.pop(buffer, None)
        layer._non_persistent_buffers_set.discard("basis")
        coefficients = reconstruct(
            coefficients, cast(Tensor, ranked.kernels), cast("tuple[int, ...]", ranked.kernel_size)
        )
    elif not own:
        size = cast("tuple[int, ...]", getattr(ranked, "kernel_size", ()))
        coefficients = as_kernel(coefficients.flatten(1), len(size))
    layer._parameters = {name: _shared(part, coefficients, memo), "bias": None}
    return cast(nn.Module, layer)


def _mixing_layer(ranked: RankedMixin, part: nn.Parameter, memo: dict[int, Any]) -> nn.Module:
    """Return the layer without a kernel: linear, or a 1x1 convolution."""
    inner, groups = groups_of(ranked) * ranked.rank, groups_of(ranked)
    inputs, outputs = channels_of(ranked)
    channels = (inputs, inner) if ranked.kernel_second else (inner, outputs)
    dimensions = len(cast("tuple[int, ...]", getattr(ranked, "kernel_size", ())))
    matrix = part.detach().flatten(1)
    if not dimensions:
        layer: Any = nn.Linear(*channels, bias=False, device="meta")
    else:
        layer = cast(Any, _POINTWISE[dimensions])(*channels, 1, groups=groups, bias=False, device="meta")
        matrix = as_kernel(matrix, dimensions)
    layer.weight = _shared(part, matrix, memo)
    return cast(nn.Module, layer)


def _shared(part: nn.Parameter, values: Tensor, memo: dict[int, Any]) -> nn.Parameter:
    """Return a parameter with these values; layers that share ``part`` share it."""
    key = hash(("low rank", id(part), values.dim()))
    if key not in memo:
        memo[key] = parameter_like(part, values.detach().clone(memory_format=torch.contiguous_format))
    return cast(nn.Parameter, memo[key])


def _stored(layer: nn.Module, spectrum: Any) -> Tensor:
    """Return the parameter of one of the two layers as coefficients (O, I, F), in torch's order."""
    if is_harmonic_layer(layer):
        return layer.coefficients.detach()
    weight = cast(Tensor, layer.weight).detach()
    if spectrum is None:
        return weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    frequencies, basis, fitted = spectrum
    size = cast("tuple[int, ...]", layer.kernel_size)
    return project(weight, basis.kernels(size, frequencies) if fitted is None else fitted)


def _matrices(layer: nn.Module, groups: int, transposed: bool) -> Tensor:
    weight = cast(Tensor, layer.weight)
    return to_groups(weight.flatten(2) if weight.dim() > 2 else weight[..., None], groups, transposed)


def _set_channels(layer: nn.Module, inputs: int, outputs: int) -> None:
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    layer.__dict__.update(zip(names, (inputs, outputs), strict=True))


def reason_without_fast_form(layer: nn.Module) -> str | None:
    """Return why a converted layer has no form for speed (factored, or two layers), or None if it has one."""
    return reason_not_splittable(layer) if is_ranked(layer) else reason_not_factorable(cast(HarmonicMixin, layer))


def fast_form(layer: nn.Module, first_factored: bool | None = None) -> nn.Module:
    """Return the form for speed of one converted layer; see `reason_without_fast_form`.

    Args:
        first_factored: whether the first of the two layers of a low rank is a factored convolution; by default if
            `factors_first`.
    """
    if not is_ranked(layer):
        return to_factored(cast(HarmonicMixin, layer))
    first_factored = factors_first(layer) if first_factored is None else first_factored
    low = to_low_rank(layer, harmonic=first_factored)
    if first_factored:
        low.first = to_factored(cast(HarmonicMixin, low.first))
    return low


def can_factor_first(ranked: RankedMixin) -> bool:
    """Return whether the first of the two layers can be a factored convolution."""
    return not ranked.kernel_second and is_harmonic_layer(ranked) and not reason_not_factorable(ranked)


def factors_first(ranked: RankedMixin) -> bool:
    """Return whether the first of the two layers is probably faster factored: it has few frequencies."""
    size = prod(cast("tuple[int, ...]", getattr(ranked, "kernel_size", ())))
    return can_factor_first(ranked) and SPARSE * len(cast(HarmonicMixin, ranked).frequencies) <= size


def plain_form(layer: nn.Module) -> nn.Module:
    """Return the plain layer that computes the same as one converted layer."""
    full = to_full_rank(layer) if is_ranked(layer) else layer
    return to_dense(full) if is_harmonic_layer(full) else full
