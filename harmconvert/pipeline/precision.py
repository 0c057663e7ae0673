"""Round the weights of a conversion to 16 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..calibration import digests
from ..network.values import seeded_inputs
from ..pipeline.convert import Conversion
from ..plan import coded_weights
from ..storage.precision import check_rounding, dtype_named, rounded


def in_fewer_bits(conversion: Conversion, dtype: str, inputs: Any = None) -> tuple[Conversion, float]:
    """Return the conversion with weights in ``dtype``, and the relative difference of the outputs that this causes.

    Raises:
        UsageError: the dtype is unknown, or ``inputs`` is None and the network declares no input size.
        InputError, CheckError: see `rounded` and `check_rounding`.
    """
    inputs = seeded_inputs(conversion.model) if inputs is None else inputs
    rounded_model = rounded(conversion.model, dtype_named(dtype))
    # Coded weights have the values of their stream in any dtype.
    weights = coded_weights(rounded_model, conversion.plan)
    coded = {w.key: w.restore(conversion.coded[w.key]) for w in weights if w.key in conversion.coded}
    if (calibration := conversion.calibration) is not None:  # the digests are of the rounded tensors
        calibration = replace(calibration, changed=digests(rounded_model, calibration.changed))
    difference = check_rounding(conversion.model, rounded_model, inputs)
    return replace(conversion, model=rounded_model, calibration=calibration, coded=coded), difference
