"""Open the network of a flow from a source, or use the network object that the caller gives."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

from torch import nn

from ..errors import DamageWarning, InputError, UsageError
from ..network.exchange import exchange
from ..sources.opening import open_source
from ..sources.request import SourceRequest
from ..storage.checkpoint import Header, Network, plan_in
from ..storage.source import Source
from .convert import Conversion
from .listener import Listener

# The types of the network argument of a flow.
Openable = str | Path | SourceRequest | Network | Conversion | nn.Module


def opened(
    model: Openable, listener: Listener, *, form: str = "harmonic", intact: bool = False, pretrained: bool = True
) -> Network:
    """Return the network of a source, or the caller's network object with the source and header that are known.

    Args:
        form: form of a checkpoint's network, as for `open_source`.
        intact: refuse a damaged checkpoint, because the flow writes a file from it.

    Raises:
        InputError: the checkpoint is damaged, or as in `open_source`.
    """
    if isinstance(model, Network):
        return model
    if isinstance(model, Conversion):
        return Network(model.model, _unknown(model.model), model.header())
    if isinstance(model, nn.Module):
        header = None
        with suppress(UsageError):  # no layer is harmonic
            header = Header(plan_in(model))
        return Network(model, _unknown(model), header)
    request = model if isinstance(model, SourceRequest) else SourceRequest(model)
    with listener.busy(f"loading {request.text}"), warnings.catch_warnings():
        if intact:
            warnings.simplefilter("error", DamageWarning)
        try:
            network = open_source(
                str(request.text),
                weights=request.weights,
                weights_key=request.weights_key,
                strip_prefix=request.strip_prefix,
                arguments=dict(request.arguments),
                pretrained=pretrained,
                form=form,
                trust_code=request.trust_code,
                code=request.code,
            )
        except DamageWarning as warning:
            raise InputError(f"{warning} (in Python, hc.load and hc.save accept it)") from warning
    if request.weights and (record := network.source.weights):
        left_out = f"; left out: {record['left_out']}" if "left_out" in record else ""
        parts = ", ".join(record[key] for key in ("file", "key", "prefix") if key in record)
        listener.say(f"weights: {parts}{left_out}")
    return network


def is_given(model: Openable) -> bool:
    """Return whether the caller gave a network object, which a flow must not change."""
    return isinstance(model, Network | Conversion | nn.Module)


def own(network: Network, model: Openable) -> Network:
    """Return a network that the flow may change: a copy if the caller gave a network object."""
    return Network(exchange(network.model, {}), network.source, network.header) if is_given(model) else network


def text_of(model: Openable) -> str:
    """Return the source string of a network, or the name of its class."""
    if isinstance(model, str | Path):
        return str(model)
    if isinstance(model, SourceRequest):
        return str(model.text)
    return type(model if isinstance(model, nn.Module) else model.model).__name__


def known_source(network: Network) -> Source | None:
    """Return the source that a checkpoint records; None for a module of the caller, whose source `save` finds."""
    return None if network.source.scheme == "unknown" and network.header is None else network.source


def _unknown(model: nn.Module) -> Source:
    return Source("unknown", type(model).__name__)
