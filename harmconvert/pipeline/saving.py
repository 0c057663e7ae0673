"""save(): write a conversion, or any harmonic network, to one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..storage.checkpoint import Header, Network, plan_in, write_checkpoint
from ..storage.source import Source
from .convert import Conversion


def save(
    conversion: Conversion | Network | nn.Module,
    path: str | Path,
    *,
    source: Source | str | None = None,
    history: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Header:
    """Write a harmonic network to one .safetensors file; return the header of the file.

    Args:
        conversion: the result of `convert`, whose `Conversion.history` is recorded; the result of `open_source`, whose
            source and history are recorded; or a network with harmonic convolutions. For the last, only its plan, its
            pre-processing, and its source if timm built it are recorded.
        source: the source of the network, or its source string.
        history: entries to add to the history.
        preprocessing: of images, with timm's names (input_size, mean, std, crop_pct, ...); default: the network's
            ``pretrained_cfg``. `load` writes it into the ``pretrained_cfg`` of the loaded network.
        force: replace an existing file.

    Raises:
        UsageError: the output exists or cannot be a file, or no layer of the network is harmonic.
        InputError: weights are not finite or have no values (meta device), or the file could not be loaded again.
        OutsideError: the disk is full or permission is missing.
    """
    header, model = None, conversion
    if isinstance(conversion, Conversion):
        header, model = conversion.header(), conversion.model
    elif isinstance(conversion, Network):
        header, model = conversion.header, conversion.model
        # The network may have changed since it was read.
        header = replace(header, plan=plan_in(model, header.plan)) if header else None
        source = conversion.source if source is None and header is None else source
    assert isinstance(model, nn.Module)
    return write_checkpoint(
        model, path, header=header, source=source, history=history, preprocessing=preprocessing, force=force
    )
