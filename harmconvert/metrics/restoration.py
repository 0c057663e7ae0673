"""Likeness of images: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, OutsideError
from .metric import TARGETS, UNCUT, Metric, Outcome
from .outputs import describe, main_output

# An error below the rounding of float32 counts as this rounding, so that equal images have a finite ratio: 138.5 dB.
_LEAST_MSE = float(torch.finfo(torch.float32).eps) ** 2
# Values beyond this are not those of images whose range is 1.
_LARGEST = 2.0


def _pairs(outcome: Outcome, name: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, ...) of a network, and those that they are compared with, as values of range 1."""
    images = main_output(outcome.outputs)
    expected = main_output(outcome.uncut) if outcome.targets is None else outcome.targets
    if not isinstance(images, Tensor) or not isinstance(expected, Tensor) or not images.is_floating_point():
        what = describe(images if not isinstance(images, Tensor) else expected)
        raise InputError(f"{name} compares images (N, C, H, W) of floating point: this is {what}")
    if images.shape != expected.shape:
        raise InputError(
            f"{name} compares images of one size: the outputs have {describe(images)}, the targets {describe(expected)}"
        )
    if not expected.is_floating_point():
        return images.double() / 255, expected.double() / 255
    if expected.numel() and float(expected.abs().max()) > _LARGEST:
        raise InputError(
            f"{name} expects values from 0 to 1, but they reach {float(expected.abs().max()):.3g}: scale "
            "outputs and targets, or give targets of whole numbers from 0 to 255"
        )
    return images.double(), expected.double()


def _psnr(outcome: Outcome) -> np.ndarray:
    images, expected = _pairs(outcome, "psnr")
    mse = (images - expected).square().flatten(1).mean(1).clamp_min(_LEAST_MSE)
    return (-10 * mse.log10()).cpu().numpy()


def _ssim(outcome: Outcome) -> np.ndarray:
    images, expected = _pairs(outcome, "ssim")
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise OutsideError("ssim needs torchmetrics: pip install 'harmconvert[metrics]'") from error
    if images.dim() != 4 or min(images.shape[2:]) < 11:
        raise InputError(f"ssim compares images (N, C, H, W) of at least 11x11 pixels: these have {describe(images)}")
    values = structural_similarity_index_measure(images, expected, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(-1).cpu().numpy()


METRICS = (
    Metric("psnr", "PSNR", _psnr, unit="dB", compares_with=(TARGETS, UNCUT), finite=False),
    Metric("ssim", "SSIM", _ssim, unit="%", scale=100, compares_with=(TARGETS, UNCUT)),
)
