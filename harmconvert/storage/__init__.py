"""Files: checkpoints and their header, the weights that others wrote, 16-bit precision.

What belongs here: bytes, their checks and their limits. Nothing in a file is executed. A source string, which may name
a model of a library or of the hub, is opened in `sources`."""

from .checkpoint import (
    Network,
    harmonic_like,
    in_form,
    is_harmonic,
    plan_in,
    read_checkpoint,
    read_header,
    write_checkpoint,
)
from .header import METADATA_KEY, BlockRecord, Header
from .history import CALIBRATION, STAGES, check_history
from .precision import as_stored, check_rounding, dtype_named, in_float32, rounded
from .source import SCHEMES, Source, as_source, parse_source
from .unpickling import UNREADABLE, unpickled, why_no_values, why_not_read
from .weights import (
    load_exactly,
    load_state,
    load_weights,
    read_weights,
    saving,
    untied_state,
    why_unreadable,
    write_tensors,
)

__all__ = [
    "CALIBRATION",
    "METADATA_KEY",
    "SCHEMES",
    "STAGES",
    "UNREADABLE",
    "BlockRecord",
    "Header",
    "Network",
    "Source",
    "as_source",
    "as_stored",
    "check_history",
    "check_rounding",
    "dtype_named",
    "harmonic_like",
    "in_float32",
    "in_form",
    "is_harmonic",
    "load_exactly",
    "load_state",
    "load_weights",
    "parse_source",
    "plan_in",
    "read_checkpoint",
    "read_header",
    "read_weights",
    "rounded",
    "saving",
    "unpickled",
    "untied_state",
    "why_no_values",
    "why_not_read",
    "why_unreadable",
    "write_checkpoint",
    "write_tensors",
]
