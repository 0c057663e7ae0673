"""The coded weights of a network, as a table and as a line for a terminal."""

from __future__ import annotations

from math import prod

from rich.table import Table

from ..codecs import codec_of, stored_bytes, zero_share
from ..errors import counted, shortened
from ..network.state import tensors_of
from ..pipeline.convert import Conversion
from .coding import layer_bytes
from .facts import total_bytes
from .tables import fitted_table
from .text import layer_name, megabytes

# Tensors that are not coded are named if they have more than this share of the bytes.
LARGE = 0.02


def coding_table(conversion: Conversion) -> Table:
    """Return a row for each coded tensor: its weights, bits per weight, share of zeros, and bytes in a file."""
    rows = []
    for key, entry in conversion.coded.items():
        count, size = prod(entry.shape), codec_of(entry).bytes(entry)
        zeros = f"{zero_share(entry):.0%}"
        rows.append([layer_name(key), f"{count:,}", f"{8 * size / count:.2f}", zeros, f"{size:,}"])
    return fitted_table(["coded tensor", "weights", "bits per weight", "zeros", "bytes"], rows, left={0})


def coding_lines(conversion: Conversion) -> list[str]:
    """Return the size of the coded weights and of the other tensors, and the names of large ones among these."""
    entries = conversion.coded
    if not entries:
        return []
    total = total_bytes(layer_bytes(conversion.model, entries))
    share = total.plain_bytes / max(conversion.cost.harmonic_bytes, 1)
    large = [
        f"{key} ({megabytes(stored_bytes(tensor))})"
        for key, tensor in tensors_of(conversion.model).items()
        if key not in entries and stored_bytes(tensor) > LARGE * conversion.cost.harmonic_bytes
    ]
    lines = [
        f"coded: {counted(len(entries), 'tensor')} with {total.weights:,} weights in {megabytes(total.coded_bytes)}, "
        f"{total.bits or 0:.2f} bits per weight; not coded: {megabytes(total.plain_bytes)}, {share:.1%} of the tensors"
    ]
    if large:
        lines.append(f"large tensors that are not coded: {shortened(large, 5)}")
    return lines
