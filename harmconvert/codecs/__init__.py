"""Codecs: how one tensor is written to a file, read back, counted in bytes and hashed.

What belongs here: the encoding of single tensors in files, and its JSON. What does not: networks and plans, and reading
and writing files (`storage`). To add a codec, write a subclass of `Codec` and register it below.
"""

from __future__ import annotations

from .codec import CODECS, Codec, Entry, codec_of, register
from .digests import tensors_crc32, tensors_sha256
from .integers import Layout, Quantised, step_indices, step_sizes
from .packed import PACKED, entry_in_file, packed_entry
from .plain import BFLOAT16, FLOAT16, FLOAT32, RAW, plain_codec, stored_bytes, tolerance_of
from .quantised import QUANTISED, QuantisedCodec, layout_of, quantised_entry, zero_share
from .scales import affordable_steps
from .stream import pack, unpack
from .table import CodecTable, Stored

for _codec in (FLOAT32, FLOAT16, BFLOAT16, RAW, QUANTISED, PACKED):
    register(_codec)

__all__ = [
    "BFLOAT16",
    "CODECS",
    "FLOAT16",
    "FLOAT32",
    "PACKED",
    "QUANTISED",
    "RAW",
    "Codec",
    "CodecTable",
    "Entry",
    "Layout",
    "Quantised",
    "QuantisedCodec",
    "Stored",
    "affordable_steps",
    "codec_of",
    "entry_in_file",
    "layout_of",
    "pack",
    "packed_entry",
    "plain_codec",
    "quantised_entry",
    "register",
    "step_indices",
    "step_sizes",
    "stored_bytes",
    "tensors_crc32",
    "tensors_sha256",
    "tolerance_of",
    "unpack",
    "zero_share",
]
