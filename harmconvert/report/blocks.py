"""The row of blocks on the page: how large each layer was, and how much of it the file keeps."""

from __future__ import annotations

from dataclasses import dataclass

from .facts import LayerFacts, Report
from .space import kept_text
from .text import layer_name, millions, percent, size_text


@dataclass(frozen=True)
class Block:
    """A layer as a block, or all other layers together (``rest``).

    ``text``: its description. ``parameters``: of the uncut layer, the width of the block. ``kept``: the share of its
    bytes that the file keeps, the filled height; None if the layer was skipped.
    """

    text: str
    parameters: int
    kept: float | None = None
    rest: bool = False


def layer_blocks(report: Report) -> tuple[Block, ...]:
    """Return a block for each layer of the report, then one for all other layers if they have parameters."""
    dense = report.form("dense")
    parameter_bytes = dense.bytes / max(dense.parameters, 1)
    coded = {layer.name: layer.coded_bytes for layer in report.coding if layer.weights}
    blocks = []
    for layer in report.layers:
        parameters = layer.parameters or layer.kept_parameters or 0
        if layer.name in coded and parameters:
            kept = coded[layer.name] / (parameters * parameter_bytes)
        else:
            kept = (layer.kept_parameters or parameters) / max(parameters, 1)
        share = min(kept, 1.0) if layer.kept else None
        words = f"\nkeeps {percent(share)} of its bytes" if layer.name in coded else ""
        blocks.append(Block(layer_text(layer) + words, parameters, share))
    rest = dense.parameters - sum(block.parameters for block in blocks)
    if rest > 0:
        blocks.append(Block(f"all other layers\n{millions(rest)} parameters", rest, rest=True))
    return tuple(blocks)


def layer_text(layer: LayerFacts) -> str:
    """Describe a layer in a few lines."""
    lines = [layer_name(layer.name), f"{layer.kind}, {size_text(layer.kernel)}"]
    if not layer.kept:
        return "\n".join([*lines, f"skipped: {layer.why}"])
    lines.append(kept_text(layer))
    if layer.other_axes:
        lines.append(f"keeps {layer.other_axes}")
    if layer.parameters is not None and layer.kept_parameters is not None:
        lines.append(f"{millions(layer.parameters)} -> {millions(layer.kept_parameters)} parameters")
    if layer.cut and layer.energy is not None:
        lines.append(f"energy kept {layer.energy:.1%}")
    if layer.output_error_before is not None and layer.output_error_after is not None:
        lines.append(f"output error {layer.output_error_before:.1%} -> {layer.output_error_after:.1%}")
    return "\n".join([*lines, *([layer.why] if layer.why else [])])
