"""save(): a conversion, or any harmonic network, to one file."""

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
    """Write a harmonic network to one .safetensors file; returns the header written.

    Args:
        conversion: what `convert` returned, whose `Conversion.history` is recorded; what `open_source` returned, whose
            source and history are recorded; or a network with harmonic convolutions, of which only what can be read
            from it is recorded: its plan, its source where timm made it, and its pre-processing.
        source: where the network came from, or its source string.
        history: what to add to the record of what was done to it.
        preprocessing: what is done to its images, in timm's words (input_size, mean, std, crop_pct, ...);
            default: what the network declares in its ``pretrained_cfg``. `load` makes the network declare it again.
        force: replace a file that is there.

    Raises:
        UsageError: the output exists or cannot be a file, or nothing in the network is harmonic.
        InputError: weights that are not finite, or without values (meta device), or what could not be loaded again.
        OutsideError: the disk is full, permission is missing.
    """
    header, model = None, conversion
    if isinstance(conversion, Conversion):
        header, model = conversion.header(), conversion.model
    elif isinstance(conversion, Network):
        header, model = conversion.header, conversion.model
        # It may have been changed since it was read.
        header = replace(header, plan=plan_in(model, header.plan)) if header else None
        source = conversion.source if source is None and header is None else source
    assert isinstance(model, nn.Module)
    return write_checkpoint(
        model, path, header=header, source=source, history=history, preprocessing=preprocessing, force=force
    )
