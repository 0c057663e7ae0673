"""The space axis: a kernel keeps some of its frequencies, the paper's compression (sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...errors import counted
from ...kernels.basis import all_frequencies, dct_basis, level_count, scaled_levels
from ...kernels.projection import project, reconstruct
from ...layers.harmonic import is_harmonic_layer, to_harmonic
from ...network.exchange import exchange
from ...network.layers import LayerInfo, convolutions, kernel_size
from ..axes import AXES, Axis, Check, Expected, Kept, LayerCost, WeightShape
from .check import check_kernel
from .cost import response_macs
from .frequencies import Frequencies, from_version_1
from .policies import Lambda, planned
from .policies import whole as whole_kernel

# A layer with fewer choices than this also gets the choices of the lambdas 0.5, 1.5 and 2.5.
FEW_CHOICES = 5
_DIGITS = 4  # significant digits of a mean |coefficient|: more cannot be seen in a figure


class SpaceAxis(Axis):
    """The frequencies of kernels larger than 1x1."""

    name: ClassVar[str] = "space"
    budget_units: ClassVar[frozenset[str]] = frozenset({"params", "bytes", "macs", "latency"})
    refits: ClassVar[bool] = True
    readable: ClassVar[bool] = True

    def applies(self, layer: LayerInfo) -> bool:
        """Return whether the layer has a kernel larger than 1x1."""
        return math.prod(layer.kernel_size) > 1

    def whole(self, layer: LayerInfo, setting: Any = None) -> Frequencies:
        """Return all frequencies of the layer's kernel."""
        return whole_kernel(layer, (setting or Lambda()).basis)

    def plan(
        self, layers: Sequence[LayerInfo], setting: Any, named: Collection[str], notes: dict[str, str]
    ) -> dict[str, Kept]:
        """Return what each layer keeps under a lambda policy."""
        own = [layer for layer in layers if self.applies(layer)]
        return {**planned(own, setting or Lambda(), named, notes)}

    def choices(self, whole: Kept) -> tuple[Kept, ...]:
        """Return all frequencies, those that the lambdas 1 to 5 keep (scaled with the kernel), and the zero frequency.

        So every plan with one lambda for all layers is among the choices. The first choice keeps all frequencies.
        """
        own = cast(Frequencies, whole)
        size, basis = own.kernel_size, own.basis
        count = level_count(size)
        levels = {1, count, *(scaled_levels(size, lam) for lam in range(1, 6))}
        if len(levels) < FEW_CHOICES:
            levels |= {min(math.ceil(halves * max(size) / 6), count) for halves in range(1, 6)}
        return tuple(Frequencies.below(size, number, basis) for number in sorted(levels, reverse=True))

    def shared(self, kept: Sequence[Kept]) -> Frequencies:
        """Return the frequencies that at least one of the layers keeps."""
        first, *_ = own = [cast(Frequencies, one) for one in kept]
        union = {frequency for one in own for frequency in one.frequencies}
        return replace(first, frequencies=tuple(f for f in all_frequencies(first.kernel_size) if f in union))

    def from_json(self, data: Any, kernel_size: tuple[int, ...]) -> Frequencies:
        """Read the result of `Frequencies.to_json`."""
        if not kernel_size:
            raise ValueError("it has no kernel, so it keeps no frequencies")
        return Frequencies.from_json(data, kernel_size)

    def upgrade_json(self, layer: Mapping[str, Any], plan: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert a layer of a plan of format version 1 to the current version."""
        old = not layer.keys() & AXES.keys() and math.prod(layer["kernel_size"]) > 1
        return from_version_1(layer, plan) if old else layer

    def cost(self, shape: WeightShape, kept: Kept, cost: LayerCost) -> LayerCost:
        """Return the cost: parameters and bytes are proportional to the number of kept frequencies.

        The factored form computes the responses of every input channel (axis by axis if the basis is separable), then a
        1x1 convolution over the kept responses.
        """
        own = cast(Frequencies, kept)
        count = len(own.frequencies)
        parameters = cost.kept_parameters // shape.kernel_positions * count
        factored = cost.factored_macs
        if not own.whole and shape.factorable and shape.positions is not None:
            one = response_macs(own.kernel_size, own.frequencies, separable=not own.basis.fitted)
            factored = shape.positions * (one * shape.in_channels + parameters)
        return replace(
            cost,
            kept_parameters=parameters,
            kept_bytes=cost.kept_bytes * parameters // max(cost.kept_parameters, 1),
            constants=cost.constants + (count * shape.kernel_positions if own.basis.fitted else 0),
            merge_macs=cost.merge_macs + parameters * shape.kernel_positions,
            factored_macs=factored,
        )

    def project(self, kernel: Tensor, kept: Kept) -> Tensor:
        """Return the combination of the kept basis kernels that is nearest to ``kernel``."""
        own = cast(Frequencies, kept)
        basis_FK = own.basis.kernels_for(kernel, own.frequencies)
        return reconstruct(project(kernel, basis_FK), basis_FK, own.kernel_size)

    def convert(self, model: nn.Module, kept: Mapping[str, Kept], values: bool = True) -> nn.Module:
        """Return a copy of the network in which the named convolutions are replaced by harmonic ones."""
        convs = convolutions(model)
        fill = {
            convs[name]: partial(to_harmonic, convs[name], own.frequencies, own.basis, values=values)
            for name, own in cast("Mapping[str, Frequencies]", kept).items()
        }
        return exchange(model, fill)

    def read(self, layer: nn.Module) -> Frequencies | None:
        """Return the frequencies of a harmonic convolution; None for any other layer."""
        if not is_harmonic_layer(layer):
            return None
        return Frequencies(kernel_size(layer), layer.frequencies, layer.basis_spec)

    def tensors(self, kept: Kept, kernel_size: tuple[int, ...]) -> Mapping[str, Expected | None]:
        """Return the shapes of the coefficients (O, I, F) and, if the basis is fitted, of its kernels (F, K)."""
        own = cast(Frequencies, kept)
        count = len(own.frequencies)
        tensors = {"coefficients": Expected((None, None, count), f"hold {counted(count, 'frequency')}")}
        if own.basis.fitted:
            shape = (count, math.prod(kernel_size))
            tensors["fitted_basis"] = Expected(shape, f"have shape {list(shape)}")
        return tensors

    def check(self, original: nn.Module, converted: nn.Module, kept: Kept | None, as_calibrated: bool | None) -> Check:
        """Check that the coefficients are the projection of the original kernel, to their last bit."""
        return check_kernel(original, converted, as_calibrated)

    def facts(self, weight: Tensor, kept: Kept) -> Mapping[str, Any]:
        """Return the mean |coefficient| of each DCT frequency of the original kernel; empty if the layer stays whole.

        A layer that stays whole still has these coefficients.
        """
        own = cast(Frequencies, kept)
        if own.whole or own.basis.name != "dct" or weight.is_meta:
            return {}
        means = project(weight, dct_basis(own.kernel_size)).abs().mean((0, 1), dtype=torch.float64).tolist()
        return {"spectrum": tuple(float(f"{mean:.{_DIGITS}g}") for mean in means)}
