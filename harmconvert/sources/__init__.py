"""Source strings to networks: timm, torchvision, the hub, local folders, the user's factories, checkpoints.

What belongs here: how each kind of source makes its network and finds its weights. The format of a file belongs to
`storage`."""

from .downloads import torchvision_loading
from .limits import built_within
from .opening import (
    check_rebuilds,
    load,
    made_by_code,
    open_counterpart,
    open_original,
    open_rival,
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
    "open_original",
    "open_reference",
    "open_rival",
    "open_source",
    "rebuild",
    "torchvision_loading",
]
