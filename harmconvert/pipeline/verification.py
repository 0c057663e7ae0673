"""What a verification says: its verdict, and the figures behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

from ..codecs.codec import CODECS
from ..errors import counted, one_line, shortened


@dataclass(frozen=True)
class LayerCheck:
    """One convolution over 1x1, original against converted.

    ``kernel_error``: largest difference over the largest weight of the same filter. ``output_error``: relative
    difference of the layer's outputs in float64, both fed the original's input (None where it did not run). ``problem``
    says what is not as the plan has it, or is None. ``cut``: the layer keeps less than all on some axis.
    """

    name: str
    kept: int
    total: int
    kernel_error: float
    output_error: float | None
    problem: str | None
    cut: bool = False


@dataclass(frozen=True)
class Verification:
    """The verdict and the figures behind it.

    ``ok``: the converted network computes what the original does, within ``tolerance``. A cut network does not, and
    says so; ``as_planned`` tells that it is, kernel by kernel, the projection that its plan asks for. Relative errors
    are largest difference over largest output; ``float64_error`` isolates the rounding of the coefficients,
    ``float32_error`` adds that of float32 arithmetic (each None where that pass was not run; the notes say why).
    ``top1_agreement`` is the share of inputs with the same top-1 class, logits that the weights' dtype cannot tell
    apart being tied (None where outputs are no logits). ``random_inputs``: the inputs were noise, of which the top-1
    says nothing about a network that is cut.
    """

    ok: bool
    as_planned: bool
    tolerance: float
    max_relative_error: float
    float64_error: float | None
    float32_error: float | None
    top1_agreement: float | None
    inputs: int
    layers: tuple[LayerCheck, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    random_inputs: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """One line: what holds, or what does not and where."""
        return one_line(self._verdict)

    @property
    def _verdict(self) -> str:
        cut = [layer for layer in self.layers if layer.cut]
        outputs = f"outputs differ by {self.max_relative_error:.1e} of the largest"
        if self.random_inputs:
            outputs += f" on {counted(self.inputs, 'random input')}"
        elif self.top1_agreement is not None:
            outputs += f", same top-1 on {round(self.top1_agreement * self.inputs)} of {counted(self.inputs, 'input')}"
        if isnan(self.max_relative_error) and not self.problems:
            return "not verified: the outputs hold no finite value on these inputs, so there is nothing to compare"
        if cut and self.as_planned and not self.ok:
            if self.tolerance not in {codec.tolerance for codec in CODECS.values()}:  # the user asked for one
                outputs += f", tolerance {self.tolerance:.0e}"
            return f"cut as planned in {len(cut)} of {counted(len(self.layers), 'layer')}: {outputs}"
        outputs += f", tolerance {self.tolerance:.0e}"
        if self.ok:
            return f"verified: {outputs}"
        if self.problems:
            return f"not the same: {shortened(list(self.problems), 3)} ({outputs})"
        return f"not the same: {outputs}"
