"""The forms of one network (DESIGN 2): `fuse` gives the dense one."""

from __future__ import annotations

from functools import partial

from torch import nn

from .conv import HarmonicMixin, to_dense
from .surgery import exchange


def fuse(model: nn.Module) -> nn.Module:
    """The dense form: a copy of ``model`` with plain convolutions that hold the merged kernels.

    Its state dict has the keys and shapes of the network that was converted. Parts that are not harmonic are copied.

    >>> from harmconvert.conv import to_harmonic
    >>> fuse(nn.Sequential(to_harmonic(nn.Conv2d(1, 2, 3))))
    Sequential(
      (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    )

    Raises:
        InputError: the network cannot be copied.
    """
    harmonic = [module for module in model.modules() if isinstance(module, HarmonicMixin)]
    dense = exchange(model, {conv: partial(to_dense, conv) for conv in harmonic})
    dense.__dict__.pop("harmconvert_calibration", None)  # it tells of coefficients, which are no more
    return dense
