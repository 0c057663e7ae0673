"""A request for a network: its source string, and what replaces its weights, its arguments or its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SourceRequest:
    """Which network to open. The fields are the arguments of `harmconvert.open_source`."""

    text: str | Path
    weights: str | Path | None = None
    weights_key: str | None = None
    strip_prefix: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trust_code: bool = False
    code: str | None = None
