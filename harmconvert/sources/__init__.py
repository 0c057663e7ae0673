"""Open the network that a source string names: timm, torchvision, the hub, local folders, user code, checkpoints.

What belongs here: how each kind of source builds its network and finds its weights. What does not: the formats of files
(`storage`).
"""

from .downloads import torchvision_loading
from .hub import published_checkpoint
from .limits import built_within
from .opening import (
    check_rebuilds,
    load,
    made_by_code,
    open_counterpart,
    open_for_comparison,
    open_original,
    open_source,
    rebuild,
)
from .reference import open_reference
from .request import SourceRequest

__all__ = [
    "SourceRequest",
    "built_within",
    "check_rebuilds",
    "load",
    "made_by_code",
    "open_counterpart",
    "open_for_comparison",
    "open_original",
    "open_reference",
    "open_source",
    "published_checkpoint",
    "rebuild",
    "torchvision_loading",
]
