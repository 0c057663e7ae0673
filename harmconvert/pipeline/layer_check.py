"""Compare one layer of a converted network with its original."""

from __future__ import annotations

from torch import nn

from ..plan import AXES, Check, LayerPlan
from ..plan.axes import last_cut


def check_layer(
    original: nn.Module, converted: nn.Module, planned: LayerPlan | None, as_calibrated: bool | None
) -> Check:
    """Run the check of the axis that wrote the layer's weight.

    Args:
        planned: what the layer keeps; None if no plan is known, so that the check reads it from the layer.
        as_calibrated: whether the tensors are those that calibration wrote; None if calibration wrote none.
    """
    kept = last_cut(planned.keeps) if planned is not None else None
    axis = AXES[kept.axis] if kept is not None else next(iter(AXES.values()))
    return axis.check(original, converted, kept, as_calibrated)
