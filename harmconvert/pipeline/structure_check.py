"""Check that two networks have the same structure, and the same tensors outside their kernels, bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..calibration import digests
from ..codecs.codec import Entry, codec_of
from ..layers.harmonic import CONVOLUTIONS, is_harmonic_layer
from ..network.layers import all_layers, convolutions, kernel_size, state_key, stored_names, weights_of
from ..network.low_rank import ranked_layers
from ..network.state import tensors_of
from ..plan.precision import rounded_keys
from ..storage.tensors import equal

_KERNELS = ("weight", "coefficients", "coefficients_in", "coefficients_out", "fitted_basis")
_ATTRIBUTES = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding", "transposed", "eps")


def pairs_of(
    original: nn.Module, converted: nn.Module, planned: Collection[str] = ()
) -> tuple[dict[str, tuple[nn.Module, nn.Module]], list[str]]:
    """Return the pairs of layers to compare, by name, and the differences of the structure.

    The pairs are the convolutions over 1x1, the ``planned`` layers, which the plan cuts, and the original's layers of
    low rank, which a dense network holds as one weight.
    """
    planned = {*planned, *ranked_layers(original)}
    original_layers, converted_layers = (
        {name: layer for name, layer in all_layers(model).items() if name in convs or name in planned}
        for model, convs in ((original, convolutions(original)), (converted, convolutions(converted)))
    )
    problems = [f"{name}: only in the original" for name in original_layers if name not in converted_layers]
    problems += [f"{name}: only in the converted network" for name in converted_layers if name not in original_layers]
    pairs = {}
    for name, conv in original_layers.items():
        if name not in converted_layers:
            continue
        other = converted_layers[name]
        if any(is_lazy(p) for p in conv.parameters(recurse=False)):
            continue
        shapes = [", ".join(str(tuple(weight.shape)) for weight in weights_of(layer)) for layer in (conv, other)]
        if shapes[0] != shapes[1]:
            problems.append(f"{name}: its kernel has shape {shapes[1]}, the original's {shapes[0]}")
            continue
        for attribute in _ATTRIBUTES:
            values = [getattr(c, attribute, None) for c in (conv, other)]
            if values[0] != values[1]:
                problems.append(f"{name}: {attribute} is {values[1]}, the original's {values[0]}")
        over_1x1 = prod(kernel_size(conv)) > 1 and cast(Tensor, conv.weight).is_floating_point()
        if over_1x1 or is_harmonic_layer(other) or name in planned:
            pairs[name] = (conv, other)
    return pairs, problems


def differing_modules(original: nn.Module, converted: nn.Module, pairs: Mapping[str, Any]) -> list[str]:
    """Return the modules without children that differ in class or settings; convolutions are not compared."""
    converted_modules, problems = dict(converted.named_modules()), []
    for name, module in original.named_modules():
        other = converted_modules.get(name)
        if other is None or name in pairs or any(module.children()) or isinstance(module, CONVOLUTIONS):
            continue
        kinds = [type(one).__name__ for one in (module, other)]
        if kinds[0] != kinds[1]:
            problems.append(f"{name}: is a {kinds[1]}, the original's a {kinds[0]}")
            continue
        other_settings = _settings(other)
        problems += [
            f"{name}: {key} is {other_settings[key]}, the original's {value}"
            for key, value in _settings(module).items()
            if key in other_settings and other_settings[key] != value
        ]
    return problems


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that are plain values and change its output."""
    plain = (int, float, str, tuple, type(None))
    without_effect = ("training", "inplace", "momentum")
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in without_effect and isinstance(v, plain)}


def as_calibrated(converted: nn.Module, calibrated: Mapping[str, str]) -> dict[str, bool]:
    """Return, for each tensor that calibration wrote, whether it is unchanged since then."""
    actual = digests(converted, calibrated)
    return {key: actual.get(key) == sha256 for key, sha256 in calibrated.items()}


def as_coded(converted: nn.Module, coded: Mapping[str, Entry]) -> dict[str, bool]:
    """Return, for each tensor that is coded, whether it has the values of its stream."""
    tensors = tensors_of(converted)
    return {
        key: key in tensors and equal(codec_of(entry).decode(entry.stream, entry), tensors[key])
        for key, entry in coded.items()
        if entry.stream is not None
    }


def as_rounded(original: nn.Module, converted: nn.Module) -> dict[str, bool]:
    """Return the keys of the tensors that are vectors of the original, rounded as in coded networks."""
    return dict.fromkeys(rounded_keys(original, converted), True)


def altered_state(
    original: nn.Module, converted: nn.Module, pairs: Mapping[str, Any], written: Mapping[str, bool]
) -> list[str]:
    """Return the differences of tensors outside the kernels of ``pairs``.

    Tensors that calibration wrote must be unchanged since then (``written``), all others equal to the original's.
    """
    paired = {id(original.get_submodule(name)) for name in pairs}
    kernels = {
        state_key(name, key)
        for name, module in original.named_modules(remove_duplicate=False)
        if id(module) in paired
        for key in (*_KERNELS, *stored_names(module))
    }
    kernels |= _tied_to(kernels, original) & _tied_to(kernels, converted)
    original_tensors, converted_tensors = tensors_of(original), tensors_of(converted)
    problems = []
    for key, tensor in original_tensors.items():
        if key in kernels or written.get(key):
            continue
        if key in written:
            problems.append(f"{key}: is not what calibration wrote")
            continue
        if key not in converted_tensors:
            problems.append(f"{key}: only in the original")
        elif not _equal(tensor, converted_tensors[key]):
            problems.append(f"{key}: differs from the original's")
    problems += [
        f"{key}: only in the converted network"
        for key in converted_tensors
        if key not in original_tensors and key not in kernels
    ]
    return problems


def _tied_to(keys: Collection[str], model: nn.Module) -> set[str]:
    """Return the keys of the tensors of a network that are the same as one of those with these keys."""
    tensors = tensors_of(model, keep_vars=True)
    same = {id(tensors[key]) for key in keys if key in tensors}
    return {key for key, tensor in tensors.items() if id(tensor) in same}


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, after rounding to the smaller of their floating dtypes."""
    if is_lazy(tensor) or is_lazy(other):
        return is_lazy(tensor) and is_lazy(other)
    if tensor.is_quantized or other.is_quantized:  # torch crashes if their storage is read
        return tensor.dtype == other.dtype and torch.equal(tensor, other)
    if tensor.shape != other.shape:
        return False
    tensor, other = (t if t.layout == torch.strided else t.to_dense() for t in (tensor, other))
    if not (tensor.is_floating_point() and other.is_floating_point()):
        dtype = tensor.dtype
    else:
        dtype = min((tensor.dtype, other.dtype), key=lambda d: -torch.finfo(d).eps)
    return torch.equal(_bits(tensor.to(dtype)), _bits(other.to(tensor.device, dtype)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
