"""Where a network came from: source strings, and what a file records of one."""

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
from ..layers.harmonic import base_class
from ..network.declared import pretrained_config
from ..network.layers import is_harmonic_layer, kernel_size

log = logging.getLogger(__name__)

SCHEMES = ("timm", "torchvision", "hf-hub", "local-dir", "sample", "reference")

_SOURCE = {
    "scheme": str, "name": str, "arguments": {...: json_value}, "sha256": (str, None), "licence": json_value,
    "weights": ({...: str}, None), "classes": (count, None),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a network came from: scheme and name of its source string, the arguments it was made with, the sha256 of
    its weights before conversion and their licence.

    ``weights`` says which those weights were: the ``file`` they were read from, the ``key`` of its container, the
    ``prefix`` dropped, what was ``left_out``; or the ``tag`` of pretrained ones. ``classes``: of the classifier that
    the network was given after it was made.
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
        """Read what `dataclasses.asdict` wrote; raises InputError where it is something else."""
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
    """A source, also where it is given as its string.

    >>> str(as_source("sample:resnet_mnist5k"))
    'sample:resnet_mnist5k'

    Raises:
        UsageError: it is something else, or its arguments are such as no JSON can hold.
    """
    source = parse_source(source) if isinstance(source, str) else source
    if source is not None and not isinstance(source, Source):
        raise UsageError(f"source (={source!r:.80}) must be a source string such as 'timm:resnet50', or a Source")
    if source is not None and not json_value(source.arguments):
        raise UsageError(f"the arguments of {source} hold what JSON cannot: give numbers, text, lists and dicts")
    return source


def timm_source(model: nn.Module) -> Source | None:
    """The timm source of a network that timm made, if making it again gives the same modules with the same settings."""
    cfg = pretrained_config(model)
    architecture = cfg.get("architecture")
    if not architecture:
        return None
    known = {key: getattr(model, key, None) for key in ("num_classes", "in_chans")}
    candidates: list[dict[str, Any]] = [{key: value for key, value in known.items() if isinstance(value, int)}, {}]
    try:  # newer timm keeps the arguments that a network was made with
        candidates.insert(0, json.loads(json.dumps(timm.models.get_model_args(model))))
    except Exception as error:
        log.info("timm does not say what %s was made with: %s", architecture, first_line(error))
    for candidate in candidates:
        try:
            with torch.device("meta"):
                twin = timm.create_model(architecture, pretrained=False, **candidate)
                if _anatomy(twin) == _anatomy(model):
                    return Source("timm", architecture, candidate, licence=cfg.get("license"))
        except Exception as error:
            log.info("timm does not make %s with %s: %s", architecture, candidate, first_line(error))
    log.info("no source is recorded: timm makes another network than this one by the name %s", architecture)
    return None


def _anatomy(model: nn.Module) -> list[tuple[Any, ...]]:
    """Names, classes, settings and shapes of all modules of the network's dense form.

    Shapes alone would not do: an output stride or another activation leaves them as they are.
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
