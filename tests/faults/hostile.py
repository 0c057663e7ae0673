"""Contents of malicious files: damaged, with false headers, or with code that runs when they are read."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HUGE = 2**62
ANSI = "\x1b[31mred\x1b]0;title\x07"


def built(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file from a header (JSON or a text) and data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def taken_apart(content: bytes) -> tuple[Any, bytes]:
    """Return the header (JSON) and the data of a safetensors file."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def entry(shape: Any, begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def no_safetensors(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield files that violate the rules of the container, or use them to the limit."""
    header, data = taken_apart(good)
    first = first_tensor(header)
    yield "empty", b""
    yield "seven bytes", good[:7]
    yield "header length 2^63", built(header, data, 2**63)
    yield "header length 2^64 - 1", built(header, data, 2**64 - 1)
    yield "header length 0", built("", data)
    yield "header one byte longer than the file", built(header, b"", len(json.dumps(header)) + 1)
    yield "trailing bytes", good + b"\0" * 9
    yield "trailing zip file", good + b"PK\x05\x06" + b"\0" * 18
    yield "header is a list", built("[]", data)
    yield "header is deeply nested", built("[" * 100_000, data)
    yield "header is no UTF-8", struct.pack("<Q", 4) + b'{"\xff"'
    yield (
        "one name twice",
        built('{"a":' + json.dumps(entry([1], 0, 4)) + ',"a":' + json.dumps(entry([1], 4, 8)) + "}", data),
    )
    shapes = [[0, HUGE], [HUGE, 4], [HUGE, HUGE, 16], [-1], [1.5], "3", None, [2**64], [0] * 5000]
    for shape in shapes:
        yield f"shape {str(shape)[:30]}", built({"a": entry(shape, 0, 0)})
        yield (
            f"shape {str(shape)[:30]} in a checkpoint",
            built({**header, first: {**header[first], "shape": shape}}, data),
        )
    offsets = [(0, 8), (4, 4), (8, 4), (-4, 0), (0, HUGE), (HUGE, HUGE + 4), (0, 4.5), (None, 4)]
    for begin, end in offsets:
        yield f"offsets {begin} to {end}", built({"a": entry([1], begin, end)}, b"\0" * 8)
    yield "overlapping tensors", built({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12)
    yield "a hole between tensors", built({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12)
    for dtype in ("F128", "I4", "F8_E4M3", "BOOL", "", 3):
        yield f"dtype {dtype}", built({"a": entry([1], 0, 4, dtype)}, b"\0" * 4)  # type: ignore[arg-type]
    yield "metadata that is no text", built({**header, "__metadata__": {"harmconvert": {"format_version": 1}}}, data)
    yield "git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    yield "web page", b"<!DOCTYPE html><html>not found</html>"
    yield "a pickle", pickle.dumps({"a": 1})
    yield "a zip file", b"PK\x03\x04" + b"\0" * 60


def first_tensor(header: Any) -> str:
    return next(key for key in header if key != "__metadata__")


def lying_headers(good: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield valid safetensors files whose entry ``harmconvert`` is invalid or contradicts the tensors."""
    header, data = taken_apart(good)
    known = header["__metadata__"]["harmconvert"]

    def made(what: Any) -> bytes:
        text = what if isinstance(what, str) else json.dumps(what)
        return built({**header, "__metadata__": {**header["__metadata__"], "harmconvert": text}}, data)

    def changed(change: Callable[[Any], None]) -> bytes:
        own = json.loads(known)
        change(own)
        return made(own)

    for version in (0, 3, -1, 10**30, "1", None, [1], float("nan")):
        yield f"format version {version}", changed(lambda own, v=version: own.update(format_version=v))
    odd: list[Any] = [
        None,
        -1,
        10**9,
        float("nan"),
        float("inf"),
        "x" * 9,
        [],
        {},
        [[]],
        [None],
        {"a": {"b": []}},
        True,
    ]
    for key in json.loads(known):
        for value in odd:
            yield f"{key} is {value!r}", changed(lambda own, k=key, v=value: own.update({k: v}))
        yield f"{key} is missing", changed(lambda own, k=key: own.pop(k))
    for key in json.loads(known)["plan"]:
        for value in odd:
            yield f"the plan's {key} is {value!r}", changed(lambda own, k=key, v=value: own["plan"].update({k: v}))
    for codec in ("float32", "raw", "float16", "x" * 9, "", ANSI):
        for value in [*odd, {"version": 2}, {"version": -1}, {"version": True}, {"version": 1, "tensors": {}}]:
            yield (
                f"the codec {codec!r} is {value!r}",
                changed(lambda own, c=codec, v=value: own["codecs"].update({c: v})),
            )
    for shape in ([HUGE, HUGE], [2**63], [-1], [1.5], [[]], None, "3", [1] * 5000):
        coded = {"version": 1, "tensors": {first_tensor(header): {"shape": shape, "dtype": "float32"}}}
        yield f"a coded tensor of shape {str(shape)[:30]}", changed(lambda own, c=coded: own["codecs"].update(raw=c))
    shapes_of = [[-1, 3], [10**9, 10**9], [2**40] * 9, [3, float("nan")], [[0, 0]] * 2, [[0, 9]], [[0, -1]]]
    for value in [*odd, *shapes_of]:
        for key in ("name", "kernel_size", "space", "channels"):
            yield (
                f"a layer's {key} is {value!r}",
                changed(lambda own, k=key, v=value: own["plan"]["layers"][0].update({k: v})),
            )
        for key in ("frequencies", "basis", "normalization", "more"):
            yield (
                f"the {key} of a layer's space are {value!r}",
                changed(lambda own, k=key, v=value: own["plan"]["layers"][0]["space"].update({k: v})),
            )
    for name in ("../../etc/passwd", "a\0b", ANSI, "\ud800", "stem\n", "", "." * 99, "x" * 10**6):
        yield f"a layer is called {name[:20]!r}", changed(lambda own, n=name: own["plan"]["layers"][0].update(name=n))
        yield f"a tensor is called {name[:20]!r}", built({**header, name: entry([0], len(data), len(data))}, data)
    yield "a layer twice", changed(lambda own: own["plan"]["layers"].append(own["plan"]["layers"][0]))
    yield (
        "a layer too many",
        changed(lambda own: own["plan"]["layers"].append({**own["plan"]["layers"][0], "name": "norm"})),
    )
    yield "a layer too few", changed(lambda own: own["plan"]["layers"].pop())
    yield "a frequency too few", changed(lambda own: own["plan"]["layers"][0]["space"]["frequencies"].pop())
    yield "tied to nothing", changed(lambda own: own["tied"].update({"stem.coefficients": "nowhere"}))
    yield "tied to itself", changed(lambda own: own["tied"].update({"norm.weight": "norm.weight"}))
    yield "no JSON", made("{")
    yield "nested without end", made("[" * 100_000)
    yield "one key twice", made('{"layers":[],' + known[1:])
    for scheme, name in (("code", "evil.py:make"), ("reference", "/etc/passwd"), ("local-dir", "/"), ("timm", "../x")):
        source = {"scheme": scheme, "name": name, "arguments": {"checkpoint_path": "/etc/passwd"}}
        yield f"its source is {scheme}:{name}", changed(lambda own, s=source: own.update(source=s))


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def payloads(mark: Path) -> dict[str, Payload]:
    """Return objects that run code when they are unpickled: each would write the file ``mark``."""
    return {
        "os.system": Payload(os.system, f"touch {mark}"),
        "exec": Payload(exec, f"open({str(mark)!r}, 'w')"),
        "eval": Payload(eval, f"open({str(mark)!r}, 'w')"),
        "open": Payload(open, str(mark), "w"),
        "subprocess": Payload(subprocess.check_call, ["touch", str(mark)]),
        "torch.save": Payload(torch.save, {}, str(mark)),
        "os.mkdir": Payload(os.mkdir, str(mark)),
    }


def containers(evil: Payload) -> dict[str, bytes]:
    """Return a pickle with code in each container that torch.load reads, and together with ordinary weights."""
    contents = {"bare": pickle.dumps(evil), "bare, protocol 0": pickle.dumps(evil, 0)}
    for name, whole in {
        "zip": {"weight": evil},
        "zip, state dict": {"state_dict": {"a": torch.ones(2), "b": evil}},
    }.items():
        file = io.BytesIO()
        torch.save(whole, file)
        contents[name] = file.getvalue()
    legacy, tarred = io.BytesIO(), io.BytesIO()
    torch.save({"weight": evil}, legacy, _use_new_zipfile_serialization=False)
    contents["legacy"] = legacy.getvalue()
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(evil)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    contents["tar"] = tarred.getvalue()
    return contents
