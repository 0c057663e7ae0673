"""A second reader of harmonic checkpoints, written only from docs/file-format.md, with numpy and json."""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import partial
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
    coded = check_codecs(header["codecs"], entries) if version == 2 else {}
    stored = {key: data[slice(*entry["data_offsets"])] for key, entry in entries.items()}
    tensors = {
        key: coded[key](stored[key]) if key in coded else values(entry, stored[key]) for key, entry in entries.items()
    }
    tensors |= {key: tensors[other] for key, other in header["tied"].items()}
    merged: dict[str, Array] = {}
    for layer in plan["layers"]:
        space = space_of(layer, plan, version)
        if space is not None or "channels" in layer:
            merged[key_of(layer["name"], "weight")] = kernel(layer, space, tensors)
    for key, other in header["tied"].items():  # section 5: other names for layers of the plan
        if other.endswith(("coefficients", "coefficients_in")):
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


def quantised(entry: dict[str, Any], stream: bytes) -> Array:
    """Section 3, the codec `quantised`: the values of a stream."""
    shape, groups, transposed = entry["shape"], entry.get("groups", 1), entry.get("transposed", False)
    first, second = shape[0], (shape[1:] or [1])[0]
    count = math.prod(shape[2:])
    rows, channels = (second, first // groups) if transposed else (first // groups, second)
    columns = channels * count
    at = 0

    def number() -> int:
        nonlocal at
        value, bits = 0, 0
        while True:
            value += (stream[at] & 127) << bits
            at, bits = at + 1, bits + 7
            if stream[at - 1] < 128:
                return value

    def signed() -> int:
        value = number()
        return value // 2 if value % 2 == 0 else -((value + 1) // 2)

    def part() -> tuple[int, int] | None:
        return (scale - 1, number()) if (scale := number()) else None

    largest, step_base = number(), signed()
    step_parts = [part() for _ in range(4)]
    scale_base, scale_parts, counts = 0, [], []
    if shape_of_tables := number():
        scale_base, scale_parts = signed(), [part() for _ in range(4)]
    else:
        counts = [number() for _ in range(2 * largest + 1)]
    factors = None
    if number():
        factors = np.frombuffer(stream, "<f4", groups * rows, at).reshape(groups, rows)
        at += 4 * groups * rows
    words = [int(word) for word in np.frombuffer(stream, "<u4", offset=at)]
    state = 0

    def refill() -> None:
        nonlocal state
        if state < 1 << 32 and words:
            state = (state << 32) + words.pop()

    refill()
    refill()

    def take(weights: list[int]) -> int:
        """Return one integer; ``weights`` are those of -m to m."""
        nonlocal state
        q, left = state % (1 << 24), 0
        place = 0
        while q >= left + weights[place]:
            left += weights[place]
            place += 1
        weight = weights[place]
        state = (state >> 24) * weight + q - left
        refill()
        return place - len(weights) // 2

    def parts(descriptions: list[tuple[int, int] | None], base: int) -> tuple[Array, Array]:
        own = []
        lengths = (groups * rows, groups * channels, count, groups * columns)
        for length, description in zip(lengths, descriptions, strict=True):
            weights = [] if description is None else distribution(description[0], 4, description[1])
            own.append([take(weights) if weights else 0 for _ in range(length)])
        of_channels = np.array(own[1]).reshape(groups, channels, 1) + np.array(own[2])
        return np.array(own[0]).reshape(groups, rows), of_channels.reshape(groups, columns) + base + np.array(
            own[3]
        ).reshape(groups, columns)

    row_steps, column_steps = parts(step_parts, step_base)
    integers = np.zeros((groups, rows, columns), int)
    if shape_of_tables:
        row_scales, column_scales = parts(scale_parts, scale_base)
        row_scales, column_scales = row_scales - row_steps, column_scales - (column_steps - step_base)
        indices = np.clip(row_scales[:, :, None] + column_scales[:, None], 0, 127)
        for index in range(128):
            weights = distribution(index, shape_of_tables, largest) if (indices == index).any() else []
            for place in zip(*np.nonzero(indices == index), strict=True):
                integers[place] = take(weights)
    else:
        free = (1 << 24) - len(counts)
        weights = [1 + own * free // sum(counts) for own in counts]
        weights[weights.index(max(weights))] += (1 << 24) - sum(weights)
        for place in np.ndindex(integers.shape):
            integers[place] = take(weights)
    if state or words:
        raise UnreadableError("the stream does not end with its last integer")
    result = integers * steps(column_steps)[:, None]
    if row_steps.any():
        result = result * steps(row_steps)[..., None]
    if factors is not None:
        result = result * factors.astype(float)[..., None]
    if transposed:
        result = result.reshape(groups, rows, channels, count).swapaxes(1, 2)
    return result.reshape(shape).astype(entry["dtype"])


def steps(indices: Array) -> Array:
    """Return the steps of indices."""
    return np.array([2.0 ** ((i % 4) / 4) * 2.0 ** (i // 4) for i in indices.ravel().tolist()]).reshape(indices.shape)


def distribution(index: int, shape: int, largest: int) -> list[int]:
    """Return the weights of the integers from -largest to largest."""
    with localcontext(Context(prec=50)):
        scale = Decimal(2) ** (Decimal(index - 24) / 4)
        powers = [(Decimal(v) / scale) ** (Decimal(shape) / 4) if v else Decimal(0) for v in range(largest + 1)]
        ends = next((v for v, power in enumerate(powers) if power > 40), largest + 1)
        g = [(-power).exp() if v < ends else Decimal(0) for v, power in enumerate(powers)]
        whole = g[0] + 2 * sum(g[1:])
        free = (1 << 24) - (2 * largest + 1)
        above = [1 + int(one * free / whole) for one in g[1:]]
    return [*reversed(above), (1 << 24) - 2 * sum(above), *above]


def packed(entry: list[Any], stream: bytes) -> Array:
    """Section 3, the codec `packed`: the values of a stream."""
    kind, exponent, least, bits = struct.unpack("<BhiB", stream[:8])
    every = int.from_bytes(stream[8:], "little")
    numbers = [least + (every >> place * bits) % (1 << bits) for place in range(entry[0])]
    if every >> bits * len(numbers) or kind > 1:
        raise UnreadableError("the stream is not that of a packed vector")
    return (np.ldexp(numbers, exponent) if kind == 0 else steps(np.array(numbers))).astype(
        entry[2] if len(entry) > 2 else "float32"
    )


def check_codecs(codecs: dict[str, Any], entries: dict[str, Any]) -> dict[str, Callable[[bytes], Array]]:
    """Section 3: return a decoder for each tensor that has an entry; raise UnreadableError for an unknown codec."""
    decoders = {"quantised": quantised, "packed": packed}
    for name, codec in codecs.items():
        if name not in (*PLAIN.values(), "raw", *decoders) or codec["version"] != 1:
            raise UnreadableError(f"codec {name} version {codec['version']}")
    coded = {
        key: partial(decoder, entry)
        for name, decoder in decoders.items()
        for key, entry in codecs.get(name, {}).get("tensors", {}).items()
    }
    used = {PLAIN.get(entry["dtype"], "raw") for key, entry in entries.items() if key not in coded}
    if set(codecs) - {*decoders} != used:
        raise UnreadableError("the codec table is not that of the tensors")
    return coded


def key_of(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def as_weight(key: str) -> str:
    return key.removesuffix("_in").removesuffix("coefficients") + "weight"


def space_of(layer: dict[str, Any], plan: dict[str, Any], version: int) -> dict[str, Any] | None:
    """Section 4: return what a layer keeps on the space axis; None if it does not have this axis."""
    if version == 1:
        return {**plan, **layer}
    if unknown := layer.keys() - {"name", "kernel_size", "space", "channels", "precision"}:
        raise UnreadableError(f"axis {unknown}")
    return dict(layer["space"]) if "space" in layer else None


def low_rank(layer: dict[str, Any], tensors: dict[str, Array]) -> Array:
    """Section 4: return the coefficients (A, B, F) of a layer of low rank."""
    channels = layer["channels"]
    first, second = (tensors[key_of(layer["name"], f"coefficients_{part}")].astype("f8") for part in ("in", "out"))
    rank, groups = channels["rank"], channels.get("groups", 1)
    if not channels.get("kernel_second"):
        second = second[:, :, None]
    outputs, inputs, frequencies = len(second) // groups, first.shape[1], max(first.shape[2], second.shape[2])
    transposed = channels.get("transposed", False)
    shape = (groups * inputs, outputs) if transposed else (groups * outputs, inputs)
    result = np.zeros((*shape, frequencies))
    for g in range(groups):
        for o in range(outputs):
            for i in range(inputs):
                rows = first[g * rank : (g + 1) * rank, i]
                value = (second[g * outputs + o] * rows).sum(0)
                result[(g * inputs + i, o) if transposed else (g * outputs + o, i)] = value
    return result


def kernel(layer: dict[str, Any], space: dict[str, Any] | None, tensors: dict[str, Array]) -> Array:
    """Section 4: return the merged kernel of a layer."""
    size = layer["kernel_size"]
    if "channels" in layer:
        coefficients = low_rank(layer, tensors)
        coefficients = coefficients.astype(tensors[key_of(layer["name"], "coefficients_in")].dtype)
    else:
        coefficients = tensors[key_of(layer["name"], "coefficients")]
    if space is None:
        return coefficients.reshape(*coefficients.shape[:2], *size)
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
