"""A second reader of harmonic checkpoints, written only from docs/file-format.md, with numpy and json."""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Section 1: the dtypes, by their names in the container, and their names in checksums.
DTYPES = {
    "F64": ("<f8", "float64"), "F32": ("<f4", "float32"), "F16": ("<f2", "float16"), "BF16": ("<u2", "bfloat16"),
    "I64": ("<i8", "int64"), "I32": ("<i4", "int32"), "I16": ("<i2", "int16"), "I8": ("<i1", "int8"),
    "U8": ("<u1", "uint8"), "BOOL": ("?", "bool"),
}  # fmt: skip
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EPS = 1e-5


class UnreadableError(Exception):
    """The file does not have the documented format."""


@dataclass
class Checkpoint:
    """The content of a file.

    Its header, its tensors (bfloat16 as float32), the merged kernels and biases of all harmonic layers by the key of
    the plain layer's tensor, and whether its checksum is correct (None: it has none).
    """

    header: dict[str, Any]
    tensors: dict[str, Array]
    merged: dict[str, Array]
    whole: bool | None


def read(path: Path) -> Checkpoint:
    """Read a harmonic checkpoint of version 1 or 2."""
    entries, metadata, data = container(path.read_bytes())
    if "harmconvert" not in metadata:
        raise UnreadableError("not a harmonic checkpoint")
    text = metadata["harmconvert"]
    header = json.loads(text)
    version = header["format_version"]
    if version not in (1, 2):
        raise UnreadableError(f"format version {version}")
    plan = header if version == 1 else header["plan"]
    if version == 2:
        check_codecs(header["codecs"], entries)
    stored = {key: data[slice(*entry["data_offsets"])] for key, entry in entries.items()}
    tensors = {key: values(entry, stored[key]) for key, entry in entries.items()}
    tensors |= {key: tensors[other] for key, other in header["tied"].items()}
    merged: dict[str, Array] = {}
    for layer in plan["layers"]:
        merged[key_of(layer["name"], "weight")] = kernel(layer, space_of(layer, plan, version), tensors)
    for key, other in header["tied"].items():  # section 5: other names for layers of the plan
        if other.endswith("coefficients"):
            merged.setdefault(as_weight(key), merged[as_weight(other)])
    for name, block in header["blocks"].items():
        if version == 2:
            merged |= folded(name, block, tensors)
    return Checkpoint(header, tensors, merged, checked(header, text, entries, stored))


def container(content: bytes) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """Section 1: return the entries of the tensors, the metadata, and the data."""
    size = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + size])
    metadata = entries.pop("__metadata__", {})
    return entries, metadata, content[8 + size :]


def values(entry: dict[str, Any], data: bytes) -> Array:
    """Return the values of a tensor that is stored plain."""
    array = np.frombuffer(data, DTYPES[entry["dtype"]][0])
    if entry["dtype"] == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    return array.reshape(entry["shape"])


def check_codecs(codecs: dict[str, Any], entries: dict[str, Any]) -> None:
    """Section 3: raise UnreadableError for an unknown codec."""
    for name, codec in codecs.items():
        if name not in (*PLAIN.values(), "raw") or codec["version"] != 1:
            raise UnreadableError(f"codec {name} version {codec['version']}")
    if set(codecs) != {PLAIN.get(entry["dtype"], "raw") for entry in entries.values()}:
        raise UnreadableError("the codec table is not that of the tensors")


def key_of(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def as_weight(key: str) -> str:
    return key.removesuffix("coefficients") + "weight"


def space_of(layer: dict[str, Any], plan: dict[str, Any], version: int) -> dict[str, Any]:
    """Section 4: return what a layer keeps on the space axis, the only known axis."""
    if version == 1:
        return {**plan, **layer}
    if unknown := layer.keys() - {"name", "kernel_size", "space"}:
        raise UnreadableError(f"axis {unknown}")
    return dict(layer["space"])


def kernel(layer: dict[str, Any], space: dict[str, Any], tensors: dict[str, Array]) -> Array:
    """Section 4: return the merged kernel of a layer."""
    size = layer["kernel_size"]
    coefficients = tensors[key_of(layer["name"], "coefficients")]
    if space["basis"] == "klt":
        basis = tensors[key_of(layer["name"], "fitted_basis")]
    else:
        kernels = [product(space["basis"], size, frequency) for frequency in space["frequencies"]]
        basis = normalized(np.stack(kernels), space["normalization"])
    merged = np.einsum("abf,fk->abk", coefficients.astype("f8"), basis)
    return merged.reshape(*coefficients.shape[:2], *size).astype(coefficients.dtype)


def product(basis: str, size: list[int], frequency: list[int]) -> Array:
    """Return the basis kernel of a frequency, flattened."""
    kernel = np.ones(1)
    for length, index in zip(size, frequency, strict=True):
        kernel = np.outer(kernel, vectors(basis, length)[index]).ravel()
    return kernel


def normalized(basis: Array, normalization: str) -> Array:
    if normalization == "l1":
        return basis / np.abs(basis).sum(1, keepdims=True)
    if normalization != "ortho":
        raise UnreadableError(f"normalization {normalization}")
    return basis


def vectors(basis: str, size: int) -> list[Array]:
    """Return the basis vectors of one kernel axis."""
    if basis == "dct":
        k = np.arange(size)
        scales = [math.sqrt((1 if u == 0 else 2) / size) for u in range(size)]
        return [scales[u] * np.cos(math.pi / size * (k + 0.5) * u) for u in range(size)]
    if basis == "haar":
        return haar(size)
    if basis == "gaussian":
        return gaussian(size)
    raise UnreadableError(f"basis {basis}")


def haar(size: int) -> list[Array]:
    found = [np.full(size, math.sqrt(1 / size))]
    queue = [(0, size)]
    while queue:
        a, b = queue.pop(0)
        if b - a < 2:
            continue
        m = a + math.ceil((b - a) / 2)
        p, q = m - a, b - m
        vector = np.zeros(size)
        vector[a:m] = math.sqrt(q / (p * (p + q)))
        vector[m:b] = -math.sqrt(p / (q * (p + q)))
        found.append(vector)
        queue += [(a, m), (m, b)]
    return found


def gaussian(size: int) -> list[Array]:
    x = np.arange(size) - (size - 1) / 2
    vector = np.exp(-((x / (size / 4)) ** 2) / 2)
    found: list[Array] = []
    while len(found) < size:
        for _ in range(2):
            vector = vector - sum((known * (known @ vector) for known in found), np.zeros(size))
        found.append(vector / np.linalg.norm(vector))
        vector = -x * found[-1]
    return found


def folded(name: str, block: dict[str, Any], tensors: dict[str, Array]) -> dict[str, Array]:
    """Section 6: return the kernel and the bias of the convolution that is equal to a block."""
    size = block["kernel_size"]
    count = math.prod(size)
    weight = tensors[key_of(name, "mix.weight")].astype("f8")
    c = weight.reshape(len(weight), -1, count)
    bias = tensors.get(key_of(name, "mix.bias"), np.zeros(len(weight))).astype("f8")
    if block["normalize"]:
        mean, variance = (tensors[key_of(name, f"norm.running_{what}")].astype("f8") for what in ("mean", "var"))
        groups = len(mean) // (c.shape[1] * count)
        group = np.arange(len(weight)) // (len(weight) // groups)  # the group of each output channel
        c = c / np.sqrt(variance + EPS).reshape(groups, -1, count)[group]
        bias = bias - (c * mean.reshape(groups, -1, count)[group]).sum((1, 2))
    frequencies = sorted(itertools.product(*map(range, size)), key=lambda f: (sum(f), f))
    basis = normalized(np.stack([product("dct", size, [*f]) for f in frequencies]), block["normalization"])
    kernel = np.einsum("oif,fk->oik", c, basis).reshape(*c.shape[:2], *size)
    return {key_of(name, "weight"): kernel, key_of(name, "bias"): bias}


def checked(header: dict[str, Any], text: str, entries: dict[str, Any], stored: dict[str, bytes]) -> bool | None:
    """Section 8: return whether the checksum is correct."""
    if header.get("crc32") is None:
        return None
    if header["format_version"] == 1:
        rest = {name: value for name, value in header.items() if name != "crc32"}
        checksum = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    else:
        checksum = zlib.crc32(text[: text.rindex(',"crc32":')].encode())
    for key in sorted(entries):
        entry = entries[key]
        lengths = ", ".join(map(str, entry["shape"])) + ("," if len(entry["shape"]) == 1 else "")
        line = f"{key} torch.{DTYPES[entry['dtype']][1]} ({lengths})\n"
        checksum = zlib.crc32(stored[key], zlib.crc32(line.encode(), checksum))
    return f"{checksum:08x}" == header["crc32"]
