"""Files: harmonic checkpoints and their header, weights from other programs, 16-bit precision.

What belongs here: reading and writing files, with checks and limits; nothing in a file is executed. What does not:
source strings, which can name a model of a library or of the hub (`sources`), and codecs of single tensors (`codecs`).
"""

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
from .unpickling import UNREADABLE, read_pickle, why_pickle_unreadable, why_tensor_refused
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
    "read_pickle",
    "read_weights",
    "rounded",
    "saving",
    "untied_state",
    "why_pickle_unreadable",
    "why_tensor_refused",
    "why_unreadable",
    "write_checkpoint",
    "write_tensors",
]
