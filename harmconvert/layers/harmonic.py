"""Harmonic convolutions: any convolution class, with its kernel computed from coefficients and basis kernels.

Every convolution class of torch and timm reads ``self.weight`` in its forward. `HarmonicMixin` computes this ``weight``
from coefficients and does not change the forward. So padding modes, 'same' padding, weight standardisation and
transposed convolutions work as before. `to_harmonic` and `to_dense` convert between the two forms and copy every other
attribute.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, TypeGuard, cast

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UsageError
from ..kernels.basis import Basis, Frequency, all_frequencies, check_frequencies
from ..kernels.projection import merge, merge_channels_last, project, reconstruct

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


# Attributes that the mixin defines. A convolution class must not use these names itself.
_RESERVED_NAMES = frozenset(
    {
        "coefficients",
        "basis",
        "fitted_basis",
        "frequencies",
        "basis_spec",
        "kernels",
        "_merged",
        "_merge",
        "_set_basis",
        "_stored",
    }
)


class HarmonicMixin(nn.Module):
    """A convolution whose kernel is coefficients x basis, merged at each forward (sec. 5.2).

    `to_harmonic` puts this mixin before a convolution class. The parameter ``coefficients`` (O, I, F) replaces the
    parameter ``weight`` (in transposed convolutions the first axis of both is in_channels). The buffer ``basis`` (F, K)
    is not part of the state; it is recomputed when needed. If the basis is fitted to the layer, the buffer
    ``fitted_basis`` (F, K) is part of the state and stays float64 when the module is cast; else it is None.
    """

    coefficients: nn.Parameter
    basis: Tensor
    fitted_basis: Tensor | None
    bias: nn.Parameter | None
    frequencies: tuple[Frequency, ...]
    basis_spec: Basis
    _merged: Tensor | None

    @property
    def kernels(self) -> Tensor:
        """Return the basis kernels (F, K), float64."""
        return _basis_kernels(
            _kernel_size(self), self.frequencies, self.basis_spec.name, self.basis_spec.normalization, self.fitted_basis
        )

    @property
    def weight(self) -> Tensor:
        """Return the merged kernel (O, I, *kernel_size). Inside a forward it is computed only once."""
        return self._merge(None) if self._merged is None else self._merged

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Classes with weight standardisation read self.weight twice: merge once and keep the kernel for this forward.
        self._merged = self._merge(next(iter((*args, *kwargs.values())), None))
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._merged = None

    def _merge(self, input: Any) -> Tensor:
        name, normalization = self.basis_spec.name, self.basis_spec.normalization
        return _merged_kernel(
            self.coefficients, self.basis, _kernel_size(self), self.frequencies, name, normalization,
            self.fitted_basis, input,
        )  # fmt: skip

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._set_basis()  # load_state_dict(assign=True) may have changed the device or dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the coefficients: the projection of a random kernel with torch's default distribution."""
        kernel = torch.empty_like(self.weight)
        nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        self.coefficients.copy_(project(kernel, self.kernels))
        if self.bias is not None:
            bound = 1 / math.sqrt(kernel[0].numel())
            nn.init.uniform_(cast(Tensor, self.bias), -bound, bound)

    def extra_repr(self) -> str:
        kept, whole = len(self.frequencies), len(all_frequencies(_kernel_size(self)))
        return f"{super().extra_repr()}, frequencies={kept}/{whole}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        fitted = self.fitted_basis
        super()._apply(fn, recurse)
        # .half(), .to_empty() and the like must not change the basis, which is a constant: restore it afterwards.
        if fitted is not None:
            device = self._stored().device
            moved = torch.empty_like(fitted, device=device) if fitted.is_meta else fitted.to(device)
            self._buffers["fitted_basis"] = moved
        self._set_basis()
        return self

    def _set_basis(self) -> None:
        stored = self._stored()
        dtype = torch.promote_types(stored.dtype, torch.float32)
        self._buffers["basis"] = self.kernels.to(stored.device, dtype)

    def _stored(self) -> Tensor:
        """Return a parameter that has the device and the dtype of the coefficients."""
        return self.coefficients

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created at run time, so pickle and copy need a function that creates it again.
        return _empty_harmonic, (base_class(self),), self.__getstate__()


def is_harmonic_layer(module: nn.Module) -> TypeGuard[HarmonicMixin]:
    """Return whether a module is a harmonic convolution."""
    return isinstance(module, HarmonicMixin)


@cache
def harmonic_class(convolution: type[nn.Module]) -> type[nn.Module]:
    """Return the harmonic subclass of a convolution class (`HarmonicConv2d` for `Conv2d`), always the same object."""
    attributes = {"__module__": __name__, "convolution": convolution}
    return type(f"Harmonic{convolution.__name__}", (HarmonicMixin, convolution), attributes)


def coefficients_to_channels_last(model: nn.Module) -> None:
    """Store the coefficients of a network in memory as (O, F, I), in place; their shape and values do not change.

    Then kernels are merged directly into the channels_last format and gradients come back without a transposition. On
    WRN-28-10 this halves the extra time of a training step in harmonic form.
    """
    for module in model.modules():
        if is_harmonic_layer(module) and "coefficients" in module._parameters:
            module.coefficients.data = module.coefficients.data.transpose(1, 2).contiguous().transpose(1, 2)


def base_class(harmonic: nn.Module) -> type[nn.Module]:
    """Return the convolution class from which a harmonic convolution was made."""
    return cast(Any, type(harmonic)).convolution


def basis_key(conv: HarmonicMixin) -> list[Any]:
    """Return the facts about the basis on which the time of a forward depends, for JSON."""
    return [[*map(list, conv.frequencies)], conv.basis_spec.fitted]


def reason_not_convertible(conv: nn.Module) -> str | None:
    """Return why a convolution with a kernel larger than 1x1 cannot be converted, or None if it can be."""
    if is_harmonic_layer(conv):
        return "is harmonic already: fuse() the network first"
    if parametrize.is_parametrized(conv):
        return "its weight is parametrized: remove the parametrization first"
    classes = (cls for cls in type(conv).__mro__ if not cls.__module__.startswith("torch."))
    own = {*vars(conv), *conv._parameters, *conv._buffers, *conv._modules}.union(*map(vars, classes))
    if conflicts := own & _RESERVED_NAMES:
        return f"it has an attribute {min(conflicts)!r} of its own, a name that the harmonic form needs: rename it"
    weight = conv._parameters.get("weight")
    if weight is None and conv._buffers.get("weight") is not None:
        return "its weight is a buffer: a fixed filter, which is not trained"
    if weight is None:
        return "its weight is computed from other tensors (weight norm, pruning): remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet: run the network once first"
    if weight.is_complex():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}: only real kernels are converted"
    if list(weight.shape[2:]) != list(getattr(conv, "kernel_size", ())):
        return f"its weight has shape {tuple(weight.shape)}, which is not that of its kernel_size {_kernel_size(conv)}"
    if not weight.numel():
        return f"its weight is empty: it has shape {tuple(weight.shape)}"
    if hasattr(conv, "weight_fake_quant"):
        return "it is prepared for quantisation"
    if weight.is_floating_point() and weight.dtype.itemsize < 2:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, too coarse for coefficients"
    return None


def to_harmonic(
    conv: nn.Module,
    frequencies: Sequence[Frequency] | None = None,
    basis: Basis | None = None,
    memo: dict[int, Any] | None = None,
    values: bool = True,
) -> nn.Module:
    """Return the harmonic counterpart of a convolution, which is not changed.

    Every attribute (stride, padding, padding mode, dilation, groups, bias, dtype, device, requires_grad, training flag,
    hooks) is copied.

    Args:
        frequencies: those to keep; all if None.
        basis: the DCT if None.
        memo: as for `copy.deepcopy`, for copying a network whose parts share objects.
        values: if False, the coefficients are not computed: the caller fills them.

    >>> to_harmonic(nn.Conv2d(3, 8, 3, stride=2), [(0, 0), (0, 1), (1, 0)])
    HarmonicConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), frequencies=3/9)

    Raises:
        UsageError: ``conv`` is not a convolution or not convertible, or a frequency is outside its kernel.
    """
    if not isinstance(conv, CONVOLUTIONS):
        raise UsageError(f"{type(conv).__name__} is not a convolution: expected one of torch's Conv classes")
    if reason := reason_not_convertible(conv):
        raise UsageError(f"cannot convert this {type(conv).__name__}: {reason}")
    kernel_size = _kernel_size(conv)
    frequencies = all_frequencies(kernel_size) if frequencies is None else tuple(map(tuple, frequencies))
    check_frequencies(kernel_size, frequencies)
    memo = {} if memo is None else memo
    basis = Basis() if basis is None else basis
    harmonic = memo.setdefault(id(conv), _empty_harmonic(type(conv)))
    weight = cast(nn.Parameter, conv._parameters["weight"])
    # A weight that several convolutions share is projected once per set of frequencies: they share the coefficients.
    tie = hash(("coefficients", id(weight), frequencies, basis))
    if tie not in memo and values:
        kernels_FK = basis.kernels_for(weight, frequencies)
        memo[tie] = parameter_like(weight, project(weight, kernels_FK)), kernels_FK if basis.fitted else None
    elif tie not in memo:
        empty_OIF = weight.detach().new_empty(*weight.shape[:2], len(frequencies))
        fitted_FK = torch.zeros(len(frequencies), math.prod(kernel_size), dtype=torch.float64, device=weight.device)
        memo[tie] = parameter_like(weight, empty_OIF), fitted_FK if basis.fitted else None
    coefficients, fitted_basis = memo[tie]
    copy_state(conv, harmonic, ["weight"], {"coefficients": coefficients}, memo)
    harmonic.frequencies, harmonic.basis_spec, harmonic._merged = frequencies, basis, None
    harmonic._non_persistent_buffers_set.add("basis")
    harmonic._buffers["fitted_basis"] = fitted_basis
    harmonic._set_basis()
    return harmonic


def to_dense(harmonic: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return the plain convolution that computes the same as a harmonic one; inverse of `to_harmonic`.

    >>> to_dense(to_harmonic(nn.Conv2d(3, 8, 3)))
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if not is_harmonic_layer(harmonic):
        raise UsageError(f"{type(harmonic).__name__} is not a harmonic convolution")
    if parametrize.is_parametrized(harmonic):
        raise UsageError(
            "the coefficients of a harmonic convolution are parametrized: remove the parametrization first"
        )
    memo = {} if memo is None else memo
    conv = memo.setdefault(id(harmonic), _empty_dense(harmonic))
    tie = hash(("weight", id(harmonic.coefficients), harmonic.frequencies, harmonic.basis_spec))
    if tie not in memo:
        kernel = reconstruct(harmonic.coefficients.detach(), harmonic.kernels, _kernel_size(harmonic))
        memo[tie] = parameter_like(harmonic.coefficients, kernel)
    copy_state(harmonic, conv, ["coefficients"], {"weight": memo[tie]}, memo)
    for name in ("frequencies", "basis_spec", "_merged", "_packed"):
        conv.__dict__.pop(name, None)
    for name in ("basis", "fitted_basis"):
        conv._buffers.pop(name)
    conv._non_persistent_buffers_set.discard("basis")
    return conv


def _kernel_size(conv: nn.Module) -> tuple[int, ...]:
    return cast(tuple[int, ...], conv.kernel_size)


@torch.fx.wrap  # symbolic tracers record one call; they cannot trace the test of the memory format
def _merged_kernel(
    coefficients: Tensor,
    basis: Tensor,
    kernel_size: tuple[int, ...],
    frequencies: tuple[Frequency, ...],
    basis_name: str,
    normalization: str,
    fitted_basis: Tensor | None,
    input: Any,
) -> Tensor:
    """Compute the merged kernel in float32 or better, in the coefficients' dtype and the input's memory format."""
    dtype = torch.promote_types(coefficients.dtype, torch.float32)
    if basis.device != coefficients.device or basis.dtype != dtype:
        # The coefficients were replaced by others of another dtype or device: compute a basis that fits them.
        kernels_FK = _basis_kernels(kernel_size, frequencies, basis_name, normalization, fitted_basis)
        basis = kernels_FK.to(coefficients.device, dtype)
    with without_autocast(coefficients.device.type):
        precise_OIF = coefficients.to(basis.dtype)
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(kernel_size) + 2)
        if not _is_channels_last(input, channels_last, len(kernel_size)):
            return merge(precise_OIF, basis).to(coefficients.dtype).unflatten(2, kernel_size)
        if precise_OIF.is_contiguous():
            kernel = merge(precise_OIF, basis).to(coefficients.dtype).unflatten(2, kernel_size)
            return kernel.contiguous(memory_format=cast(torch.memory_format, channels_last))
        kernel_OKI = merge_channels_last(precise_OIF.transpose(1, 2), basis).to(coefficients.dtype)
        return kernel_OKI.unflatten(1, kernel_size).movedim(-1, 1)


def without_autocast(device: str) -> Any:
    """Return a context in which products are computed in the precision of their factors."""
    # A device without autocast (meta) is not compiled for; torch.compile of torch 2.10 cannot trace the question.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _is_channels_last(input: Any, channels_last: torch.memory_format | None, dimensions: int) -> bool:
    if not isinstance(input, Tensor) or channels_last is None or input.dim() != dimensions + 2:
        return False
    return not input.is_contiguous() and input.is_contiguous(memory_format=channels_last)


def _basis_kernels(
    kernel_size: Sequence[int],
    frequencies: Sequence[Frequency],
    basis_name: str,
    normalization: str,
    fitted_basis: Tensor | None,
) -> Tensor:
    return Basis(basis_name, normalization).kernels(kernel_size, frequencies) if fitted_basis is None else fitted_basis


def empty_counterpart(conv: nn.Module) -> nn.Module:
    """Return a module of the other form without state; `to_harmonic` or `to_dense` fills it when it is in ``memo``."""
    return _empty_dense(conv) if is_harmonic_layer(conv) else cast(nn.Module, _empty_harmonic(type(conv)))


def _empty_harmonic(convolution: type[nn.Module]) -> Any:
    cls = harmonic_class(cast(Any, convolution))
    return cls.__new__(cls)


def _empty_dense(harmonic: nn.Module) -> Any:
    cls = base_class(harmonic)
    return cls.__new__(cls)


def parameter_like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Return a parameter with a new value and the requires_grad and attributes of another (such as optimiser hints)."""
    like = nn.Parameter(value, requires_grad=parameter.requires_grad)
    like.__dict__.update(parameter.__dict__)
    return like


def copy_state(
    source: nn.Module,
    target: nn.Module,
    old: Collection[str],
    new: Mapping[str, nn.Parameter],
    memo: dict[int, Any],
) -> None:
    """Deep-copy the state of a module, except that the parameters ``old`` are replaced by the parameters ``new``."""
    parameters = dict(source._parameters)
    # __getstate__ leaves out what torch.compile stores in the module: a copy of that would run the original.
    rest = {key: value for key, value in cast(Any, source).__getstate__().items() if key != "_parameters"}
    target.__dict__.update(copy.deepcopy(rest, memo))
    copied: dict[str, Any] = {}
    for name, value in parameters.items():
        copied.update(new if name in old else {name: copy.deepcopy(value, memo)})
    target.__dict__["_parameters"] = copied
