"""The codec table of a file: the codecs of its tensors, and an entry for each coded tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..documents import check, count, input_errors, json_value
from ..errors import InputError, shortened
from .codec import CODECS, Codec, Entry, codec_of
from .packed import PACKED
from .plain import RAW, plain_codec

# The dtypes of decoded tensors, by their names in a codec table.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
# The dtypes of stored tensors, by their names in a safetensors file.
STORED_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

_MOST_AXES = 16
_UNREADABLE, _DISAGREE = "its codec table is unreadable", "its codec table and tensors disagree"
_TABLE = {...: {"version": count, "tensors": {...: json_value}}}
_ENTRY = {"shape": [count], "dtype": str, ...: json_value}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and its dtype by the name in safetensors."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def codec(self) -> Codec:
        """Return the codec of a tensor without an entry."""
        return plain_codec(STORED_NAMES[self.dtype]) if self.dtype in STORED_NAMES else RAW


@dataclass(frozen=True)
class CodecTable:
    """The codecs of a file: its plain codecs (name and version), and the entries of other tensors, by key.

    ``coded``: the coded weights. ``packed``: the packed vectors.

    >>> table = CodecTable.of({torch.float32, torch.int64})
    >>> table.to_json()
    {'float32': {'version': 1}, 'raw': {'version': 1}}
    """

    plain: frozenset[tuple[str, int]] = frozenset()
    coded: Mapping[str, Entry] = field(default_factory=dict)
    packed: Mapping[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], entries: Mapping[str, Entry] | None = None) -> CodecTable:
        """Return the table of a file that has plain tensors of some dtypes, and tensors with entries."""
        codecs = {plain_codec(dtype) for dtype in dtypes}
        return cls._of(((codec.name, codec.version) for codec in codecs), entries or {})

    @classmethod
    def _of(cls, plain: Iterable[tuple[str, int]], entries: Mapping[str, Entry]) -> CodecTable:
        packed = {key: entry for key, entry in entries.items() if entry.codec == PACKED.name}
        return cls(frozenset(plain), {key: one for key, one in entries.items() if key not in packed}, packed)

    @property
    def entries(self) -> dict[str, Entry]:
        """Return the entries of all tensors that are not stored as plain values."""
        return {**self.coded, **self.packed}

    def with_streams(self, stored: Mapping[str, Tensor]) -> CodecTable:
        """Return the table with the tensors of its file as the streams of its entries (`Entry.stream`)."""
        return replace(self, coded={key: replace(entry, stream=stored[key]) for key, entry in self.coded.items()})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict with the entries grouped by codec; inverse of `from_json`."""
        table: dict[str, Any] = {name: {"version": version} for name, version in sorted(self.plain)}
        for key, entry in self.entries.items():
            group = table.setdefault(entry.codec, {"version": entry.version, "tensors": {}})
            group["tensors"][key] = codec_of(entry).entry_to_json(entry)
        return table

    @classmethod
    def from_json(cls, data: Any) -> CodecTable:
        """Return the table that `to_json` wrote; the data may come from an untrusted file.

        Raises:
            InputError: a codec or its version is unknown, or the data is not a codec table.
        """
        with input_errors(_UNREADABLE):
            check(data, _TABLE, "codecs")
            versions = {name: group["version"] for name, group in data.items()}
        codecs = {name: _registered(name, version) for name, version in versions.items()}
        entries: dict[str, Entry] = {}
        with input_errors(_UNREADABLE):
            for name, group in data.items():
                if codecs[name].plain != ("tensors" not in group):
                    raise ValueError(f"{name}: it should {'not ' if codecs[name].plain else ''}list tensors")
                for key, entry in group.get("tensors", {}).items():
                    if key in entries:
                        raise ValueError(f"{key!r:.80} has two codecs")
                    entries[key] = _entry_from_json(codecs[name], key, entry)
        return cls._of(((name, codec.version) for name, codec in codecs.items() if codec.plain), entries)

    def check(self, stored: Mapping[str, Stored], limit: int) -> None:
        """Compare the table with the tensors of its file.

        Args:
            stored: all tensors of the file, by key.
            limit: the most bytes that all tensors with an entry may need after decoding.

        Raises:
            InputError: the table does not belong to this file, or claims tensors that are too large.
        """
        for key, entry in self.entries.items():
            shape, dtype = codec_of(entry).stored(entry)
            tensor = stored.get(key)
            if tensor is None or tensor.shape != tuple(shape) or STORED_NAMES.get(tensor.dtype) != dtype:
                expected = next((name for name, known in STORED_NAMES.items() if known == dtype), str(dtype))
                actual = "it is missing" if tensor is None else f"it is {tensor.dtype} {list(tensor.shape)}"
                raise InputError(f"{_DISAGREE}: {key[:80]} should be {expected} {list(shape)}, {actual}")
        plain = {tensor.codec for key, tensor in stored.items() if key not in self.entries}
        if differing := self.plain ^ {(codec.name, codec.version) for codec in plain}:
            raise InputError(f"{_DISAGREE}: only one of them has {shortened(sorted(name for name, _ in differing))}")
        if (size := sum(entry.decoded_bytes for entry in self.entries.values())) > limit:
            raise InputError(f"its codec table claims tensors of {size:,} bytes, far more than the file holds: refused")


def _registered(name: str, version: int) -> Codec:
    if (codec := CODECS.get((name, version))) is None:
        raise InputError(
            f"its tensors are stored with the codec {name[:80]!r} version {version}, which this harmconvert does not "
            "know: update harmconvert"
        )
    return codec


def _entry_from_json(codec: Codec, key: str, data: Any) -> Entry:
    """Return the entry of one tensor."""
    where = f"{codec.name}: {key[:80]}"
    try:
        data = codec.fields(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check(data, _ENTRY, f"codecs[{codec.name!r}]['tensors'][{key!r:.80}]")
    shape = tuple(data["shape"])
    if len(shape) > _MOST_AXES or prod(shape) >= 1 << 63:
        raise ValueError(f"{where}: its shape is out of range")
    if data["dtype"] not in DTYPES:
        raise ValueError(f"{where}: unknown dtype {data['dtype'][:80]!r}")
    parameters = {name: value for name, value in data.items() if name not in ("shape", "dtype")}
    entry = Entry(codec.name, codec.version, shape, DTYPES[data["dtype"]], parameters)
    try:
        codec.check(entry)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    return entry
