"""Find modules that convolve but are not torch's convolutions; a report names each and says why it is not converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..layers.block import HarmonicBlock2d
from ..layers.harmonic import CONVOLUTIONS
from .dataflow import OtherRun

_FIXED = "its blur filter is fixed, not learned"
_DEFORMABLE = "its kernel reads at positions that depend on the input"
_MIXED = "its kernels are computed anew for each input"
# The keys are names of classes; they hold for subclasses too.
_REASONS = {
    "CondConv2d": _MIXED, "DynamicConv": _MIXED, "Dynamic_conv2d": _MIXED, "BlurPool2d": _FIXED,
    "DeformConv2d": _DEFORMABLE, "DeformConv": _DEFORMABLE, "ModulatedDeformConv2d": _DEFORMABLE,
    "ModulatedDeformConv": _DEFORMABLE, "DCNv2": _DEFORMABLE, "DCNv3": _DEFORMABLE, "DCNv4": _DEFORMABLE,
}  # fmt: skip


@dataclass(frozen=True)
class OtherConvolution:
    """A module that convolves but is not converted: its class, kernel size and learned kernels, and the reason."""

    kind: str
    kernel_size: tuple[int, ...]
    kernels: tuple[nn.Parameter, ...]
    reason: str


def other_convolutions(model: nn.Module, ran: Mapping[str, OtherRun] | None = None) -> dict[str, OtherConvolution]:
    """Return, by name, the modules that convolve with a kernel over 1x1 but are not torch's convolutions.

    Args:
        ran: the modules that called convolution functions in a run. Without a run the shape of a module's ``weight``
            decides.
    """
    others: dict[str, OtherConvolution] = {}
    for name, module in model.named_modules():
        if isinstance(module, (*CONVOLUTIONS, HarmonicBlock2d)):
            continue
        kind, reason = _kind_and_reason(module)
        run = (ran or {}).get(name)
        kernels = tuple(p for p in module.parameters(recurse=False) if not is_lazy(p) and prod(p.shape[2:]) > 1)
        if reason is None and run is not None:
            reason = (
                "it calls a convolution as a function: only torch's convolution modules are converted"
                if run.learned
                else "its filter is fixed, not learned"
            )
        weight = module._parameters.get("weight") if isinstance(module._parameters, dict) else None
        if reason is None and ran is None and any(weight is kernel for kernel in kernels) and _may_convolve(module):
            reason = f"{kind} is not one of torch's convolution classes"
        if reason is not None:
            size = run.kernel_size if run else _kernel_size(module, kernels)
            others[name] = OtherConvolution(kind, size, kernels, reason)
    return others


def _kind_and_reason(module: nn.Module) -> tuple[str, str | None]:
    """Return the class of a module, and why a module of this class is not converted (None: the class does not tell)."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        kind = str(getattr(module, "original_name", kind))
        return kind, "it is TorchScript, whose layers cannot be replaced" if "Conv" in kind and hasattr(
            module, "weight"
        ) else None
    for base in type(module).__mro__:
        if base.__name__ in _REASONS:
            return kind, _REASONS[base.__name__]
    if "quantized" in type(module).__module__ and "Conv" in kind:
        return kind, "it is quantised"
    if isinstance(module, nn.modules.conv._ConvNd):
        return kind, f"{kind} is not one of torch's convolution classes"
    return kind, None


def _may_convolve(module: nn.Module) -> bool:
    """Return whether a module with a ``weight`` of three or more axes may convolve: not a norm or bilinear layer."""
    return not isinstance(module, nn.LayerNorm | nn.Bilinear) and not hasattr(module, "normalized_shape")


def _kernel_size(module: nn.Module, kernels: tuple[nn.Parameter, ...]) -> tuple[int, ...]:
    for key in ("kernel_size", "filt_size"):
        size = getattr(module, key, None)
        if isinstance(size, int):
            return (size, size)
        if isinstance(size, list | tuple):
            return tuple(size)
    return max((tuple(kernel.shape[2:]) for kernel in kernels), key=prod, default=())
