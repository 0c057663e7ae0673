"""The source of a network: source strings, and the record of a source in a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from ..documents import check, count, json_value
from ..errors import InputError, UsageError, first_line
from ..layers.harmonic import base_class, is_harmonic_layer
from ..network.declared import pretrained_config
from ..network.layers import kernel_size

log = logging.getLogger(__name__)

SCHEMES = (
    "timm", "torchvision", "transformers", "smp", "diffusers", "hf-hub", "local-dir", "sample", "reference",
)  # fmt: skip

_SOURCE = {
    "scheme": str, "name": str, "arguments": {...: json_value}, "sha256": (str, None), "licence": json_value,
    "weights": ({...: str}, None), "classes": (count, None),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The source of a network: scheme and name of its source string, and the arguments with which it was built.

    ``sha256`` and ``licence`` belong to its weights before conversion. ``weights`` describes them: the ``file`` from
    which they were read, the ``key`` of its container, the ``prefix`` that was dropped and the names ``left_out``; or
    the ``tag`` of pretrained weights. ``classes`` is the number of classes of a classifier that was replaced later.
    """

    scheme: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None
    licence: str | None = None
    weights: Mapping[str, str] | None = None
    classes: int | None = None

    def __str__(self) -> str:
        return f"{self.scheme}:{self.name}" if self.scheme != "code" else self.name

    @classmethod
    def from_json(cls, data: Any) -> Source:
        """Return the source that `dataclasses.asdict` wrote; raise InputError for other data."""
        try:
            check(data, _SOURCE, "source")
            arguments, weights = dict(data.get("arguments", {})), data.get("weights")
            return cls(
                data["scheme"], data["name"], arguments, data.get("sha256"), data.get("licence"),
                None if weights is None else dict(weights), data.get("classes"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the source recorded in the file is unreadable: {error!r}") from error


def parse_source(text: str, arguments: Mapping[str, Any] | None = None) -> Source:
    """Split a source string into scheme and name.

    >>> parse_source("torchvision:resnet18").scheme, parse_source("resnet50").scheme, parse_source("net.py:make").scheme
    ('torchvision', 'timm', 'code')
    """
    scheme, colon, name = text.partition(":")
    arguments = dict(arguments or {})
    scheme = scheme.replace("_", "-")
    if colon and scheme in SCHEMES:
        if not name:
            raise UsageError(f"source {text!r} names nothing after '{scheme}:'")
        return Source(scheme, name, arguments)
    if colon:
        return Source("code", text, arguments)
    return Source("timm", text, arguments)


def as_source(source: Source | str | None) -> Source | None:
    """Return a source, from a `Source` or its string.

    >>> str(as_source("sample:resnet_mnist5k"))
    'sample:resnet_mnist5k'

    Raises:
        UsageError: the argument is something else, or the source has arguments that JSON cannot represent.
    """
    source = parse_source(source) if isinstance(source, str) else source
    if source is not None and not isinstance(source, Source):
        raise UsageError(f"source (={source!r:.80}) must be a source string such as 'timm:resnet50', or a Source")
    if source is not None and not json_value(source.arguments):
        raise UsageError(f"the arguments of {source} cannot be JSON: use only numbers, text, lists and dicts")
    return source


def timm_source(model: nn.Module) -> Source | None:
    """Return the timm source of a network; None if timm does not build a network with the same modules and settings."""
    cfg = pretrained_config(model)
    architecture = cfg.get("architecture")
    if not architecture:
        return None
    known = {key: getattr(model, key, None) for key in ("num_classes", "in_chans")}
    candidates: list[dict[str, Any]] = [{key: value for key, value in known.items() if isinstance(value, int)}, {}]
    try:  # newer versions of timm record the arguments of a network
        candidates.insert(0, json.loads(json.dumps(timm.models.get_model_args(model))))
    except Exception as error:
        log.info("timm does not know the arguments of %s: %s", architecture, first_line(error))
    for candidate in candidates:
        try:
            with torch.device("meta"):
                twin = timm.create_model(architecture, pretrained=False, **candidate)
                if _structure(twin) == _structure(model):
                    return Source("timm", architecture, candidate, licence=cfg.get("license"))
        except Exception as error:
            log.info("timm cannot build %s with %s: %s", architecture, candidate, first_line(error))
    log.info("no source is recorded: timm's network with the name %s differs from this one", architecture)
    return None


def _structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the names, classes, settings and shapes of all modules in the network's dense form.

    Shapes alone are not enough: another output stride or activation does not change them.
    """
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        shapes = {key: tuple(t.shape) for key, t in module._parameters.items() if t is not None}
        if is_harmonic_layer(module):
            shapes["weight"] = (*shapes.pop("coefficients")[:2], *kernel_size(module))
            base = base_class(module)
            parts.append((name, base.__name__, base.extra_repr(module), sorted(shapes.items())))
        else:
            parts.append((name, type(module).__name__, module.extra_repr(), sorted(shapes.items())))
    return parts
