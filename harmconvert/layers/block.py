"""The paper's block (eq. 3) in a network: put in the place of a convolution, and folded back into one."""

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
# Positions of a kernel from which a training step is quicker by rows and columns (benchmarks/block_stage.py); without
# gradients both at once are, more often than not.
SEPARABLE_FROM = 49


class HarmonicBlock2d(nn.Module):
    """The paper's block with spectrum normalisation (eq. 3), for networks trained from scratch.

    Each input channel is filtered with every kept DCT kernel (fixed, depthwise); with ``normalize`` a batch norm
    without affine parameters normalises each of the in_channels x F responses; a learned 1x1 convolution mixes them.
    Input (N, in_channels, H, W), output (N, out_channels, H', W'), as `nn.Conv2d` with the same arguments.
    ``lam``: "full", or an integer lambda meant for 3x3 (a kernel of size K keeps ceil(lam * K / 3) levels).
    ``stage``: how the DCT responses are computed, the same to rounding: "dense" (one two-dimensional pass), "separable"
    (rows, then columns), or "auto": separable for kernels from 7x7 on while gradients are recorded; `choose_stage`
    measures instead.
    ``normalization``: of the DCT kernels, "ortho" or "l1"; with ``normalize`` no mere rescaling of the weights, because
    the batch norm adds its eps to the variance of what they give.

    >>> HarmonicBlock2d(3, 16, 3, padding=1, lam=2)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

    Raises:
        UsageError: an argument that no convolution of that size can have.
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
        pays = math.prod(self.kernel_size) >= SEPARABLE_FROM and torch.is_grad_enabled()
        separable = self.stage == "separable" or (self.stage == "auto" and pays)
        responses = self._separable(x) if separable else self._dense(x)
        return cast(Tensor, self.mix(self.norm(responses)))

    def _dense(self, x: Tensor) -> Tensor:
        """DCT responses (N, I x F, H', W') of input (N, I, H, W)."""
        basis_F1KK = cast(Tensor, self.basis).unflatten(1, self.kernel_size)[:, None].to(x.dtype)
        filters = basis_F1KK.repeat(self.in_channels, 1, 1, 1)
        return nn.functional.conv2d(x, filters, None, self.stride, self.padding, self.dilation, groups=self.in_channels)

    def _separable(self, x: Tensor) -> Tensor:
        """The same responses: every kept frequency along the rows first, then along the columns of what that gave."""
        (down, across), (top, left), (far, wide) = map(_pair, (self.stride, self.padding, self.dilation))
        channels = self.in_channels
        across_rows = sorted({f[1] for f in self.frequencies})
        filters = cast(Tensor, self.row_basis)[across_rows][:, None, None].to(x.dtype).repeat(channels, 1, 1, 1)
        rows = nn.functional.conv2d(x, filters, None, (1, across), (0, left), (1, wide), groups=channels)
        rows_NIVHW = rows.unflatten(1, (channels, len(across_rows)))
        found: dict[Frequency, Tensor] = {}
        for place, v in enumerate(across_rows):
            down_columns = [f[0] for f in self.frequencies if f[1] == v]
            filters = cast(Tensor, self.column_basis)[down_columns][:, None, :, None].to(x.dtype)
            columns = nn.functional.conv2d(
                rows_NIVHW[:, :, place], filters.repeat(channels, 1, 1, 1), None, (down, 1), (top, 0), (far, 1),
                groups=channels,
            )  # fmt: skip
            columns_NIUHW = columns.unflatten(1, (channels, len(down_columns)))
            found |= {(u, v): columns_NIUHW[:, :, index] for index, u in enumerate(down_columns)}
        return torch.stack([found[f] for f in self.frequencies], 2).flatten(1, 2)

    def choose_stage(self, example_input: Tensor, repeats: int = 5) -> str:
        """Time both stages on an input (N, I, H, W), forward and backward, and keep the quicker one; returns which.

        For a machine that the rule of "auto" was not measured on. Another stage is other rounding, so what is to be
        repeated bit for bit sets ``stage`` itself.
        """
        seconds: dict[str, list[float]] = {"dense": [], "separable": []}
        with torch.enable_grad():
            for _ in range(repeats + 1):
                for stage, times in seconds.items():
                    x = example_input.detach().clone().requires_grad_()
                    start = time.perf_counter()
                    responses = self._separable(x) if stage == "separable" else self._dense(x)
                    gradient = torch.autograd.grad(responses.sum(), x)[0]
                    gradient.sum().item()  # waits for a GPU to finish
                    times.append(time.perf_counter() - start)
        self.stage = min(seconds, key=lambda stage: min(seconds[stage][1:]))  # the first warms up
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
        """The DCT kernels (F, K), float64."""
        return dct_basis(self.kernel_size, self.frequencies, self.normalization)

    def extra_repr(self) -> str:
        kept = f"{len(self.frequencies)}/{len(all_frequencies(self.kernel_size))}"
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, frequencies={kept}"


def to_block(conv: nn.Module, normalize: bool = True, normalization: str = "ortho") -> HarmonicBlock2d:
    """The whole-basis block (eq. 3) in the place of a 2-d convolution; its mixing weights are that kernel, projected.

    Without ``normalize`` it computes what `to_harmonic`'s counterpart does.

    Raises:
        UsageError: a convolution of another class, one that does not pad with zeros, or an unknown normalisation.
    """
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise UsageError(f"a block can take the place of a plain Conv2d padded with zeros, not of this {conv}")
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
    """The plain convolution that computes what a block computes in eval mode: its batch norm is affine there, so it
    goes into the kernel and a bias (exact, also at the padding, which comes before it)."""
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
    """Take the bias of the convolution ``name`` into the batch norms that alone read it, where it is known which do.

    So the dense form of a network that has no such bias has none either, and stock code loads it. Exact but for the
    rounding of the running means; in training mode a batch norm does not see a constant anyway.
    """
    conv, norms = cast(nn.Conv2d, model.get_submodule(name)), _norms_reading(model, name)
    bias = conv.bias
    if bias is None or not norms or not all(isinstance(norm.running_mean, Tensor) for norm in norms):
        return
    for norm in norms:
        mean = cast(Tensor, norm.running_mean)
        mean.copy_((mean.double() - bias.detach().double()).to(mean.dtype))
    conv.bias = None


def _norms_reading(model: nn.Module, name: str) -> list[nn.BatchNorm2d]:
    """The batch norms whose inputs are the output of a layer, or that plus something else; none where unknown."""
    place, _, child = name.rpartition(".")
    parent: Any = model.get_submodule(place)
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
