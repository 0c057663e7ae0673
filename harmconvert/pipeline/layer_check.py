"""Compare one layer of a converted network with its original, as the axes of its plan ask."""

from __future__ import annotations

from torch import nn

from ..plan import AXES, Check, LayerPlan
from ..plan.axes import last_cut


def check_layer(
    original: nn.Module, converted: nn.Module, planned: LayerPlan | None, as_calibrated: bool | None
) -> Check:
    """The check of the axis that wrote the layer's weight.

    Args:
        planned: what the layer keeps; None where no plan is known: then what the layer itself says.
        as_calibrated: whether the tensors that calibration wrote are what it wrote; None where it wrote none.
    """
    kept = last_cut(planned.keeps) if planned is not None else None
    axis = AXES[kept.axis] if kept is not None else next(iter(AXES.values()))
    return axis.check(original, converted, kept, as_calibrated)
