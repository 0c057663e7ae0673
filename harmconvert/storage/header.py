"""The header of a harmonic checkpoint: a description of its network, as JSON in the metadata entry ``harmconvert``.

`docs/file-format.md` describes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from ..codecs.digests import tensors_crc32
from ..codecs.table import CodecTable
from ..documents import check, count, input_errors, parse_json, whole
from ..errors import InputError
from ..kernels.basis import BASES, NORMALIZATIONS
from ..network.declared import check_preprocessing
from ..plan.plan import Plan
from .history import check_history, with_columns, with_layers
from .source import Source

FORMAT_VERSION = 2
METADATA_KEY = "harmconvert"
_MARK = ',"crc32":'


@dataclass(frozen=True)
class BlockRecord:
    """The settings of a `HarmonicBlock2d`: whether it has a batch norm, the scale of its DCT kernels, and their size.

    ``kernel_size`` is None in files of version 1; then the network gives it.
    """

    normalize: bool = True
    normalization: str = "ortho"
    kernel_size: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, data: Any) -> BlockRecord:
        """Return the record that `dataclasses.asdict` wrote; early files have only ``normalize``, as a bool."""
        if isinstance(data, bool):
            return cls(data)
        check(data, {"kernel_size": ([count], None)}, "block")
        size = data.get("kernel_size")
        record = cls(bool(data["normalize"]), str(data["normalization"]), None if size is None else tuple(size))
        if record.normalization not in NORMALIZATIONS:
            raise ValueError(f"a block's normalization is {record.normalization!r}")
        return record


@dataclass(frozen=True)
class Header:
    """The description of a network in a harmonic checkpoint.

    ``preprocessing`` is None in early files, which did not record it. ``format_version`` is the version of the file
    from which the header was read.
    """

    plan: Plan
    source: Source | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, BlockRecord] = field(default_factory=dict)
    codecs: CodecTable = field(default_factory=CodecTable)
    crc32: str | None = None
    preprocessing: Mapping[str, Any] | None = None
    format_version: int = field(default=FORMAT_VERSION, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able dict in the current format version; inverse of `from_json`."""
        return {
            "format_version": FORMAT_VERSION,
            "source": asdict(self.source) if self.source else None,
            "plan": self.plan.to_json(),
            "codecs": self.codecs.to_json(),
            "blocks": {name: asdict(block) for name, block in self.blocks.items()},
            "tied": dict(self.tied),
            "history": with_columns(self.history),
            "versions": dict(self.versions),
            **({"preprocessing": dict(self.preprocessing)} if self.preprocessing else {}),
            "crc32": self.crc32,
        }

    @property
    def calibrated(self) -> dict[str, str]:
        """Return the keys of the tensors that calibration wrote, each with the sha256 of its values."""
        record = self.history.get("calibration")
        changed = record.get("changed") if isinstance(record, dict) else None
        return {str(k): str(v) for k, v in changed.items()} if isinstance(changed, dict) else {}

    @classmethod
    def from_json(cls, data: Any) -> Header:
        """Return the header that `to_json` wrote, in this release or in an earlier one.

        Raises:
            InputError: the format version, the basis or a codec is unknown, or the data is not a header.
        """
        version = data.get("format_version") if isinstance(data, dict) else None
        if not whole(version) or version not in (1, FORMAT_VERSION):
            raise InputError(
                f"it has format version {version!r}, this harmconvert reads versions 1 and {FORMAT_VERSION}: "
                "update harmconvert"
            )
        if version == 1 and data.get("basis") not in BASES:
            raise InputError(f"it uses the basis {data.get('basis')!r}, which this harmconvert does not know")
        source = Source.from_json(data["source"]) if data.get("source") else None
        # A version 1 file has only plain tensors, and its plan is not nested.
        codecs = CodecTable() if version == 1 else CodecTable.from_json(data.get("codecs"))
        with input_errors("its header is unreadable"):
            history = with_layers(data.get("history", {}))
            check_history(history)
            check_preprocessing(data.get("preprocessing"))
            return cls(
                Plan.from_json(data if version == 1 else data["plan"]),
                source,
                {str(k): str(v) for k, v in data.get("tied", {}).items()},
                history,
                {str(k): str(v) for k, v in data.get("versions", {}).items()},
                {str(k): BlockRecord.from_json(v) for k, v in data.get("blocks", {}).items()},
                codecs,
                data.get("crc32"),
                data.get("preprocessing") or None,
                version,
            )


def header_text(header: Header, stored: Mapping[str, Tensor]) -> str:
    """Return the JSON text of a header; its last entry is the checksum."""
    known = {key: value for key, value in header.to_json().items() if key != "crc32"}
    text = json.dumps(known, separators=(",", ":"))[:-1]
    return f'{text}{_MARK}"{tensors_crc32(stored, text.encode())}"}}'


def checksum(text: str, stored: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of a header's text up to its checksum, and of the tensors as they are stored."""
    data = parse_json(text)
    if data.get("format_version") == 1:
        known = {key: value for key, value in data.items() if key != "crc32"}
        return tensors_crc32(stored, json.dumps(known, sort_keys=True).encode())
    return tensors_crc32(stored, text.rpartition(_MARK)[0].encode())
