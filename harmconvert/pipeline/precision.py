"""Store a conversion in 16 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..calibration import digests
from ..network.values import seeded_inputs
from ..pipeline.convert import Conversion
from ..storage.precision import check_rounding, dtype_named, rounded


def in_fewer_bits(conversion: Conversion, dtype: str, inputs: Any = None) -> tuple[Conversion, float]:
    """The conversion with its network stored in ``dtype``, and the relative difference that this makes to the outputs.

    Raises:
        UsageError: an unknown dtype, no ``inputs`` and none known of the network; InputError, CheckError: as `rounded`,
            `check_rounding`.
    """
    inputs = seeded_inputs(conversion.model) if inputs is None else inputs
    small = rounded(conversion.model, dtype_named(dtype))
    if (calibration := conversion.calibration) is not None:  # what calibration wrote is rounded, too
        calibration = replace(calibration, changed=digests(small, calibration.changed))
    rounding = check_rounding(conversion.model, small, inputs)
    return replace(conversion, model=small, calibration=calibration), rounding
