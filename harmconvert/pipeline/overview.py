"""The text of a conversion: some lines that fit a screen, whatever the size of the network."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from ..codecs.plain import stored_bytes
from ..errors import counted, one_line, shortened
from ..network.state import tensors_of

if TYPE_CHECKING:
    from .conversion import Conversion, LayerRecord

COLUMNS = 100
# Names of layers in one line; the rest is counted.
_NAMES = 3


def overview(conversion: Conversion, last: str = "not verified yet: verify(original, conversion)") -> str:
    """Return what a conversion did, on one screen: each fact in at most two lines of at most `COLUMNS` columns."""
    first = f"Conversion of {type(conversion.model).__name__}: {_kept(conversion)}"
    facts = [*_facts(conversion), f"  {last}"]
    return "\n".join(line for text in (first, *facts) for line in _wrapped(one_line(text)))


def _wrapped(text: str) -> list[str]:
    """Return a fact in at most two lines."""
    return textwrap.wrap(text, COLUMNS, subsequent_indent="    ", max_lines=2, placeholder=" ...")


def _kept(conversion: Conversion) -> str:
    if conversion.search is not None:
        return f"budget {conversion.search.budget}"
    policy = conversion.plan.policy
    return f"{'lambda ' if policy not in ('custom', 'calibration') else ''}{policy}"


def _facts(conversion: Conversion) -> Iterator[str]:
    cost = conversion.cost
    yield f"  parameters  {_change(cost.parameters, cost.harmonic_parameters)}"
    yield f"  tensors     {_change(cost.bytes, cost.harmonic_bytes, 'B')}"
    if cost.dense_macs is not None and cost.factored_macs is not None:
        yield f"  MACs        {_change(cost.dense_macs, cost.factored_macs)} in the factored form"
    yield from _layers(conversion)
    if conversion.coded:
        yield f"  coded       {_coded(conversion)}"
    yield from _search(conversion)
    yield from _calibration(conversion)
    if conversion.advice:
        yield f"  warning     {conversion.advice}"
    elif conversion.plan.whole and not conversion.coded:
        yield "  warning     nothing is cut: the file is as large as before"


def _layers(conversion: Conversion) -> Iterator[str]:
    cut = [layer for layer in conversion.layers if 0 < layer.kept < layer.total]
    skipped = [layer for layer in conversion.layers if layer.skipped]
    ranked = conversion.plan.on("channels")
    converted = len(conversion.layers) - len(skipped)
    parts = [f"{converted} converted", f"{len(cut)} with fewer frequencies" if cut else "all frequencies kept"]
    parts += [f"{len(ranked)} with a lower rank"] if ranked else []
    yield f"  layers      {', '.join([*parts, f'{len(skipped)} skipped'])}"
    if cut:
        most = sorted(cut, key=_removed, reverse=True)
        names = shortened([f"{layer.name} {layer.kept}/{layer.total}" for layer in most], _NAMES)
        yield f"  cut most    {names}"
    if skipped:
        yield f"  skipped     {shortened([f'{layer.name} ({layer.why})' for layer in skipped], 1)}"


def _removed(layer: LayerRecord) -> tuple[float, float]:
    """Return how much of a layer is cut: the share of its frequencies, and the error of its kernel."""
    return 1 - layer.kept / layer.total, layer.error or 0.0


def _coded(conversion: Conversion) -> str:
    tensors = {key: tensor for key, tensor in tensors_of(conversion.model).items() if key in conversion.coded}
    size = sum(stored_bytes(tensor, conversion.coded[key]) for key, tensor in tensors.items())
    weights = sum(prod(entry.shape) for entry in conversion.coded.values())
    bits = 8 * size / max(weights, 1)
    return f"{counted(len(conversion.coded), 'tensor')} in {_amount(size, 'B')}, {bits:.2f} bits per weight"


def _search(conversion: Conversion) -> Iterator[str]:
    if (search := conversion.search) is not None:
        yield f"  search      {counted(len(search.tried), 'plan')} tried, scored by {search.scored_by}"
    if conversion.drops:
        yield f"  drop        {counted(len(conversion.drops), 'size')} tried"


def _calibration(conversion: Conversion) -> Iterator[str]:
    if (calibration := conversion.calibration) is None:
        return
    yield f"  calibrated  on {counted(calibration.inputs, 'input')}, {calibration.held_back} of them held back"
    if calibration.divergence is not None and calibration.plain_divergence is not None:
        yield (
            f"  outputs     divergence on held-back inputs {calibration.plain_divergence:.3g} -> "
            f"{calibration.divergence:.3g}" + _agreement(calibration.agreement, calibration.held_back)
        )
    if calibration.failed:
        yield f"  warning     not calibrated: {shortened([layer.name for layer in calibration.failed], _NAMES)}"


def _agreement(share: float | None, inputs: int) -> str:
    return "" if share is None else f", same top-1 on {round(share * inputs)} of {inputs}"


def _change(before: int, after: int, unit: str = "") -> str:
    return f"{_amount(before, unit)} -> {_amount(after, unit)} ({after / max(before, 1):.1%})"


def _amount(count: int, unit: str = "") -> str:
    """Return a number with three digits and the prefix of a thousand, a million or a thousand million."""
    for prefix, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            number = count / scale
            return f"{number:.{max(0, 2 - len(str(int(number))) + 1)}f} {prefix}{unit}".rstrip()
    return f"{count} {unit}".rstrip()
