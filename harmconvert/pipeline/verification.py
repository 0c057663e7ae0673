"""The result of a verification: its verdict and its measurements."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

from ..codecs.codec import CODECS
from ..errors import counted, one_line, shortened


@dataclass(frozen=True)
class LayerCheck:
    """The comparison of one convolution over 1x1 with the original.

    ``kernel_error`` is the largest difference divided by the largest weight of the same filter. ``output_error`` is the
    relative difference of the layer's outputs in float64 on the input of the original; None if the layer did not run.
    ``problem`` describes a difference from the plan, or is None. ``cut`` says that the layer keeps less than the whole
    on some axis.
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
    """The verdict of a verification and its measurements.

    ``ok`` says that the outputs of both networks are equal within ``tolerance``. For a cut network it is False;
    ``as_planned`` then says that each kernel is the projection that the plan describes.

    A relative error is the largest difference divided by the largest output. ``float64_error`` shows the rounding of
    the coefficients; ``float32_error`` also has the rounding of float32 arithmetic. Each is None if there was no run in
    that precision; ``notes`` has the reason. ``top1_agreement`` is the share of inputs with the same top-1 class;
    logits are ties if their difference is below the rounding of the weights' dtype. It is None if the outputs are no
    logits. ``random_inputs`` says that the inputs were noise, on which the top-1 of a cut network has no meaning.
    ``coded``: weights are quantised; each must be the one that its stream in the file has.
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
    coded: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the verification as JSON values."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """One line with the result: verified, cut as planned, or the first differences."""
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
            return "not verified: the outputs hold no finite value on these inputs, so they cannot be compared"
        if cut and self.as_planned and not self.ok:
            if self.tolerance not in {codec.tolerance for codec in CODECS.values()}:  # the user asked for one
                outputs += f", tolerance {self.tolerance:.0e}"
            what = "coded" if self.coded else "cut"
            return f"{what} as planned in {len(cut)} of {counted(len(self.layers), 'layer')}: {outputs}"
        outputs += f", tolerance {self.tolerance:.0e}"
        if self.ok:
            return f"verified: {outputs}"
        if self.problems:
            return f"not the same: {shortened(list(self.problems), 3)} ({outputs})"
        return f"not the same: {outputs}"
