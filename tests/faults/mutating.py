"""Mutations of valid files and documents: the inputs that both fuzzing engines pass to the readers.

An engine is a `Draw`, a function that returns numbers below a bound: random ones of hypothesis, or from atheris' bytes.
"""

from __future__ import annotations

import copy
import io
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_FINE = 1 << 24  # the number of places in a file that can be drawn
Draw = Callable[[int], int]  # returns a number from 0 to below its argument


def nested(depth: int) -> Any:
    """Return a list nested to this depth."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# Values that no reader expects, of all types, because a check for one type may accept another.
PLAIN: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**9, 2**31, 2**63, 10**400, 0.0, -1.5, 0.5, 1e308, math.nan, math.inf, "",
    "x", "0", "full", "progressive", "ortho", "dct", "klt", "\ud800", "\x1b[31mred\x1b[0m", "two\nlines", "nul\0",
    "../../up", "<b>", "{{ r }}", "é" * 300, [], {}, [[]], [None], [0], [0, 0], [[0, 0]], [1] * 2000, ["x", 1],
    {"": None}, {"a": {"b": []}}, {"name": "x"}, nested(50),
)  # fmt: skip
# More values, which only a pickle can have.
PICKLED: tuple[Any, ...] = (
    b"", b"bytes", {1}, (1, 2), OrderedDict(), {1: 2}, {None: None}, {(1, 2): 3}, 1j, bytearray(3), torch.Size([2, 3]),
    torch.float16, torch.device("cpu"), torch.tensor(1), torch.tensor(math.nan), torch.zeros(0), torch.zeros(2, 3),
    torch.zeros(3, dtype=torch.uint8), torch.zeros(1).expand(1 << 40), torch.zeros(2, device="meta"),
    torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.bool),
)  # fmt: skip


def chosen(draw: Draw, values: Sequence[T]) -> T:
    return values[draw(len(values))]


def places(document: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document, outer ones first."""
    if depth > 40:
        return []
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    own = [(document, key) for key in keys]
    return own + [place for key in keys for place in places(document[key], depth + 1)]


def changed(draw: Draw, document: Any, more: Sequence[Any] = ()) -> Any:
    """Return a copy of a document with one to four changed parts; ``more`` are additional values to put in."""
    whole = [copy.deepcopy(document)]
    for _ in range(1 + draw(4)):
        found = places(whole)
        # Half of the time anywhere, otherwise near the top, which readers check first.
        container, key = found[draw(len(found)) if draw(2) else draw(min(len(found), 12))]
        step = draw(8)
        if step == 0 and len(found) > 1 and container is not whole:
            del container[key]
        elif step == 1:
            other, there = chosen(draw, found)
            container[key] = copy.deepcopy(other[there])
        elif step == 2 and isinstance(container[key], list) and container[key]:
            container[key] = container[key] * 2
        elif step == 3 and isinstance(container[key], dict):
            name = chosen(draw, ("", "x", "name", "layers", "\ud800", "a\nb"))
            container[key][name] = copy.deepcopy(chosen(draw, PLAIN))
        elif step == 4 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
            value = container[key]
            container[key] = chosen(draw, (-value, value + 1, value * 1000, str(value)))
        else:
            container[key] = copy.deepcopy(chosen(draw, (*PLAIN, *more)))
    return whole[0]


def as_text(draw: Draw, document: Any) -> bytes:
    """Return a document as JSON; sometimes the text has something that no document can represent."""
    text = json.dumps(document, ensure_ascii=bool(draw(2)))
    step = draw(12)
    if step == 0:  # the same key twice
        text = text.replace("{", '{"name": 3, "layers": 4, ', 1)
    elif step == 1:  # more digits than Python parses
        text = text.replace("1", "1" * 5000, 1)
    elif step == 2:
        text = "[" * 100_000 + text
    elif step == 3:
        text = text[: draw(len(text) + 1)]
    data = text.encode("utf-8", "surrogatepass")
    return flipped(draw, data) if step == 4 else data


def flipped(draw: Draw, data: bytes) -> bytes:
    """Change some bytes, cut off the end, or append something."""
    bent = bytearray(data)
    for _ in range(1 + draw(4)):
        # The bound is the same for all lengths: torch does not write the same value with the same length every time.
        step, at = draw(4), draw(_FINE) * (len(bent) + 1) // _FINE
        if step == 0:
            del bent[at:]
        elif step == 1:
            bent[at:at] = chosen(draw, (b"\0", b"{", b'"', b"\xff" * 8, b"[" * 30))
        elif at < len(bent):
            bent[at] ^= 1 << draw(8)
    return bytes(bent)


def as_safetensors(draw: Draw, header: Any, data: bytes) -> bytes:
    """Return a safetensors file; the entry ``harmconvert`` of ``header`` may be a document or a text."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and not isinstance(metadata.get("harmconvert", ""), str):
        metadata["harmconvert"] = as_text(draw, metadata["harmconvert"]).decode("utf-8", "replace")
    text = json.dumps(header).encode()
    wrong = (0, 1, len(text) - 1, len(text) + len(data), 1 << 27, (1 << 63) + 7)
    length = len(text) if draw(20) else chosen(draw, wrong)
    whole = struct.pack("<Q", length) + text + data
    return whole if draw(8) else flipped(draw, whole)


def as_pickle(draw: Draw, document: Any) -> bytes:
    """Return a document as written by torch.save: a zip archive, or the sequence of pickles of older versions."""
    buffer = io.BytesIO()
    try:
        torch.save(document, buffer, _use_new_zipfile_serialization=bool(draw(3)))
    except Exception:  # some values cannot be pickled: leave them out
        torch.save({"x": 1}, buffer)
    whole = buffer.getvalue()
    return whole if draw(4) else flipped(draw, whole)


def made(draw: Draw | None, kind: str, seeds: Sequence[Any]) -> bytes:
    """Return a file of a kind (``json``, ``safetensors``, ``pickle``) from one of the valid documents.

    Without ``draw``, the document is unchanged.
    """
    pick = draw or (lambda below: below - 1)
    document = chosen(pick, seeds)
    if kind == "safetensors":
        header, data = document
        header = copy.deepcopy(header)
        if draw is not None and draw(4) and "__metadata__" in header:
            metadata = header["__metadata__"]
            metadata["harmconvert"] = changed(draw, metadata["harmconvert"])
        elif draw is not None:
            header = changed(draw, header)
        return as_safetensors(pick, header, data)
    if draw is not None:
        document = changed(draw, document, PICKLED if kind == "pickle" else ())
    return as_pickle(pick, document) if kind == "pickle" else as_text(pick, document)
