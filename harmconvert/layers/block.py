"""The paper's block with spectrum normalisation (eq. 3): the module, and its conversion from and to a convolution."""

from __future__ import annotations

import math
import time
from typing import Any, cast

import timm
import torch
import torchvision
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.basis import Frequency, all_frequencies, dct_basis, frequencies_below, scaled_levels
from ..kernels.projection import project, reconstruct

STAGES = ("auto", "dense", "separable")
# From this many kernel positions on, a training step is faster with separate passes for rows and columns
# (benchmarks/block_stage.py). Without gradients one two-dimensional pass is usually faster.
SEPARABLE_FROM = 49


class HarmonicBlock2d(nn.Module):
    """The paper's block with spectrum normalisation (eq. 3), for networks trained from scratch.

    Each input channel is filtered with every kept DCT kernel (fixed, depthwise). If ``normalize`` is set, a batch norm
    without affine parameters normalises each of the in_channels x F responses. A learned 1x1 convolution mixes them.
    Input (N, in_channels, H, W), output (N, out_channels, H', W'), as for `nn.Conv2d` with the same arguments.

    Args:
        lam: "full", or an integer lambda meant for 3x3 (a kernel of size K keeps ceil(lam * K / 3) levels).
        normalization: scale of the DCT kernels, "ortho" or "l1". With ``normalize`` this is more than a rescaling of
            the weights, because the batch norm adds its eps to the variance of the responses.
        stage: how the DCT responses are computed; the results differ only by rounding. "dense": one two-dimensional
            pass. "separable": rows, then columns. "auto": separable for kernels of 7x7 and more while gradients are
            recorded, else dense. `choose_stage` measures which one is faster.

    >>> HarmonicBlock2d(3, 16, 3, padding=1, lam=2)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

    Raises:
        UsageError: an argument is unknown or does not fit the others.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        lam: str | int = "full",
        normalize: bool = True,
        normalization: str = "ortho",
        stage: str = "auto",
    ) -> None:
        super().__init__()
        if stage not in STAGES:
            raise UsageError(f"stage (={stage!r}) must be one of {', '.join(STAGES)}")
        if in_channels % groups or out_channels % groups:
            raise UsageError(
                f"in_channels (={in_channels}) and out_channels (={out_channels}) "
                f"must be divisible by groups (={groups})"
            )
        self.kernel_size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        if lam == "full":
            self.frequencies = all_frequencies(self.kernel_size)
        elif isinstance(lam, int) and lam >= 1:
            self.frequencies = frequencies_below(self.kernel_size, scaled_levels(self.kernel_size, lam))
        else:
            raise UsageError(f"lam (={lam!r}) must be 'full' or an integer of at least 1")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.stride, self.padding, self.dilation, self.normalization = stride, padding, dilation, normalization
        self.stage = stage
        responses = in_channels * len(self.frequencies)
        for name in ("basis", "row_basis", "column_basis"):
            self.register_buffer(name, None, persistent=False)
        self.norm = nn.BatchNorm2d(responses, affine=False) if normalize else nn.Identity()
        self.mix = nn.Conv2d(responses, out_channels, 1, groups=groups, bias=bias)
        self._set_basis()

    def forward(self, x: Tensor) -> Tensor:
        if cast(Tensor, self.basis).device != x.device:
            self._set_basis()
        separable_is_faster = math.prod(self.kernel_size) >= SEPARABLE_FROM and torch.is_grad_enabled()
        separable = self.stage == "separable" or (self.stage == "auto" and separable_is_faster)
        responses = self._separable_responses(x) if separable else self._dense_responses(x)
        return cast(Tensor, self.mix(self.norm(responses)))

    def _dense_responses(self, x: Tensor) -> Tensor:
        """Return the DCT responses (N, I x F, H', W') of input (N, I, H, W)."""
        basis_F1KK = cast(Tensor, self.basis).unflatten(1, self.kernel_size)[:, None].to(x.dtype)
        filters = basis_F1KK.repeat(self.in_channels, 1, 1, 1)
        return nn.functional.conv2d(x, filters, None, self.stride, self.padding, self.dilation, groups=self.in_channels)

    def _separable_responses(self, x: Tensor) -> Tensor:
        """Return the same responses, computed by filters along the rows, then filters along the columns."""
        (stride_y, stride_x), (pad_y, pad_x) = _pair(self.stride), _pair(self.padding)
        dilation_y, dilation_x = _pair(self.dilation)
        channels = self.in_channels
        row_indices = sorted({v for _, v in self.frequencies})
        filters = cast(Tensor, self.row_basis)[row_indices][:, None, None].to(x.dtype).repeat(channels, 1, 1, 1)
        rows = nn.functional.conv2d(x, filters, None, (1, stride_x), (0, pad_x), (1, dilation_x), groups=channels)
        rows_NIVHW = rows.unflatten(1, (channels, len(row_indices)))
        responses: dict[Frequency, Tensor] = {}
        for place, v in enumerate(row_indices):
            column_indices = [f[0] for f in self.frequencies if f[1] == v]
            filters = cast(Tensor, self.column_basis)[column_indices][:, None, :, None].to(x.dtype)
            columns = nn.functional.conv2d(
                rows_NIVHW[:, :, place], filters.repeat(channels, 1, 1, 1), None, (stride_y, 1), (pad_y, 0),
                (dilation_y, 1), groups=channels,
            )  # fmt: skip
            columns_NIUHW = columns.unflatten(1, (channels, len(column_indices)))
            responses |= {(u, v): columns_NIUHW[:, :, index] for index, u in enumerate(column_indices)}
        return torch.stack([responses[f] for f in self.frequencies], 2).flatten(1, 2)

    def choose_stage(self, example_input: Tensor, repeats: int = 5) -> str:
        """Time both stages on an input (N, I, H, W), forward and backward; use the faster one and return its name.

        The rule of "auto" was measured on other machines. The stages round differently, so set ``stage`` yourself if a
        run must be repeatable bit for bit.
        """
        seconds: dict[str, list[float]] = {"dense": [], "separable": []}
        with torch.enable_grad():
            for _ in range(repeats + 1):
                for stage, times in seconds.items():
                    x = example_input.detach().clone().requires_grad_()
                    start = time.perf_counter()
                    responses = self._separable_responses(x) if stage == "separable" else self._dense_responses(x)
                    gradient = torch.autograd.grad(responses.sum(), x)[0]
                    gradient.sum().item()  # waits for a GPU to finish
                    times.append(time.perf_counter() - start)
        self.stage = min(seconds, key=lambda stage: min(seconds[stage][1:]))  # the first run is a warm-up
        return self.stage

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._set_basis()
        return self

    def _set_basis(self) -> None:
        device, dtype = self.mix.weight.device, torch.promote_types(self.mix.weight.dtype, torch.float32)
        height, width = self.kernel_size
        columns, rows = (dct_basis((size,), None, self.normalization) for size in (height, width))
        for name, basis in (("basis", self.kernels), ("column_basis", columns), ("row_basis", rows)):
            self._buffers[name] = basis.to(device, dtype)

    @property
    def kernels(self) -> Tensor:
        """Return the DCT kernels (F, K), float64."""
        return dct_basis(self.kernel_size, self.frequencies, self.normalization)

    def extra_repr(self) -> str:
        kept = f"{len(self.frequencies)}/{len(all_frequencies(self.kernel_size))}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, frequencies={kept}"


def to_block(conv: nn.Module, normalize: bool = True, normalization: str = "ortho") -> HarmonicBlock2d:
    """Return a block (eq. 3) with the whole basis that replaces a 2-d convolution.

    Its mixing weights are the projection of the convolution's kernel. Without ``normalize`` the block computes the same
    as the convolution.

    Raises:
        UsageError: the convolution is of another class or does not pad with zeros, or the normalisation is unknown.
    """
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise UsageError(f"a block can only replace a plain Conv2d that is padded with zeros, not this {conv}")
    block = HarmonicBlock2d(
        conv.in_channels,
        conv.out_channels,
        _pair(conv.kernel_size),
        _pair(conv.stride),
        _pair(conv.padding),
        _pair(conv.dilation),
        conv.groups,
        conv.bias is not None,
        normalize=normalize,
        normalization=normalization,
    ).to(conv.weight.device, conv.weight.dtype)
    with torch.no_grad():
        coefficients_OIF = project(conv.weight, block.kernels)
        block.mix.weight.copy_(coefficients_OIF.flatten(1)[..., None, None])
        if conv.bias is not None and block.mix.bias is not None:
            block.mix.bias.copy_(conv.bias)
    return block.train(conv.training)


def fold_block(block: HarmonicBlock2d) -> nn.Conv2d:
    """Return the plain convolution that computes the same as a block in eval mode.

    In eval mode the batch norm is an affine map, so it can be merged into the kernel and a bias. The result is exact,
    also at the borders, because zeros are padded before the batch norm.
    """
    mix_OX = block.mix.weight.detach().double().flatten(1)
    bias = torch.zeros(len(mix_OX), dtype=torch.float64, device=mix_OX.device)
    if block.mix.bias is not None:
        bias += block.mix.bias.detach()
    if isinstance(block.norm, nn.BatchNorm2d):
        mean, variance = cast(Tensor, block.norm.running_mean), cast(Tensor, block.norm.running_var)
        scale_GX = (variance.double() + block.norm.eps).rsqrt().view(block.groups, -1)
        mix_GOX = mix_OX.view(block.groups, -1, mix_OX.shape[1]) * scale_GX[:, None]
        bias -= torch.einsum("gox,gx->go", mix_GOX, mean.double().view(block.groups, -1)).flatten()
        mix_OX = mix_GOX.flatten(0, 1)
    coefficients_OIF = mix_OX.unflatten(1, (-1, len(block.frequencies)))
    biased = block.mix.bias is not None or isinstance(block.norm, nn.BatchNorm2d)
    conv = nn.Conv2d(
        block.in_channels,
        block.out_channels,
        _pair(block.kernel_size),
        block.stride,
        block.padding,
        block.dilation,
        block.groups,
        bias=biased,
    ).to(block.mix.weight.device, block.mix.weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(reconstruct(coefficients_OIF, block.kernels, _pair(block.kernel_size)))
        if conv.bias is not None:
            conv.bias.copy_(bias)
    return conv.requires_grad_(block.mix.weight.requires_grad).train(block.training)


def absorb_bias(model: nn.Module, name: str) -> None:
    """Move the bias of the convolution ``name`` into the batch norms behind it, if all readers of its output are known.

    `fold_block` adds a bias that the original network may not have. Without that bias the dense form has the keys of
    the original, so that the original code can load it. The result is exact except for the rounding of the running
    means. In training mode a batch norm removes a constant anyway.
    """
    conv, norms = cast(nn.Conv2d, model.get_submodule(name)), _norms_after(model, name)
    bias = conv.bias
    if bias is None or not norms or not all(isinstance(norm.running_mean, Tensor) for norm in norms):
        return
    for norm in norms:
        mean = cast(Tensor, norm.running_mean)
        mean.copy_((mean.double() - bias.detach().double()).to(mean.dtype))
    conv.bias = None


def _norms_after(model: nn.Module, name: str) -> list[nn.BatchNorm2d]:
    """Return the batch norms that read a layer's output, alone or in a sum; an empty list if they are not known."""
    parent_name, _, child = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    after: Any = None
    if isinstance(parent, nn.Sequential):
        after = dict(zip(parent._modules, [*parent][1:], strict=False)).get(child)
    elif isinstance(parent, timm.models.resnet.ResNet | torchvision.models.ResNet) and child == "conv1":
        after = parent.bn1
    elif child == "stem" and hasattr(parent, "norms_reading_the_stem"):
        return list(parent.norms_reading_the_stem())
    return [after] if isinstance(after, nn.BatchNorm2d) else []


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second
