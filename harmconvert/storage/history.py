"""The structure of the history in a checkpoint's header: the record of conversion, calibration and training.

Other folders write these records; here is only the check that a file has records of the right form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..documents import check, count, finite, json_value, number, pair
from ..errors import counted
from ..kernels.ranks import SPECTRUM_STEPS

# A value that all layers share is in a file once, so a small file could otherwise claim any number of them.
MOST_LAYERS, MOST_COLUMNS = 100_000, 40
_NUMBER, _TEXT = (number, None), (str, None)


def rank_spectrum(value: Any) -> bool:
    """Return whether the value is a list of shares from 0 to 1, one for each step of a spectrum."""
    if not isinstance(value, list | tuple) or len(value) != SPECTRUM_STEPS + 1:
        return False
    return all(finite(share) and 0 <= share <= 1 for share in value)


_MEASUREMENT = {
    **dict.fromkeys(("metric", "title", "unit", "data"), str),
    "value": number,
    "interval": (pair, None),
    "higher_is_better": bool,
    "samples": count,
}
_EVALUATION = {
    **dict.fromkeys(("images", "labelled"), count),
    **dict.fromkeys(("top1", "top5", "loss", "agreement", "divergence", "images_per_second"), _NUMBER),
    "top1_interval": ([number], None),
    "unreadable": [str],
    "measurement": (_MEASUREMENT, None),
}
_LAYER = {
    "name": str,
    **dict.fromkeys(("decision", "solver", "why"), _TEXT),
    **dict.fromkeys(("damping", "condition", "error_before", "error_after", "seconds"), _NUMBER),
    **dict.fromkeys(("positions", "unknowns", "inputs", "inputs_enough"), count),
    "spectrum": (rank_spectrum, None),
}
CALIBRATION = {
    "layers": [_LAYER],
    **dict.fromkeys(("inputs", "held_back", "batch_norms"), count),
    **dict.fromkeys(("plain_divergence", "refit_divergence", "divergence", "kept"), _NUMBER),
    "notes": [str],
    "settings": {...: json_value, "seed": (count, None), "damping": _NUMBER},
    "changed": {...: str},
    "incomparable": _TEXT,
    **dict.fromkeys(("plain_agreement", "agreement"), _NUMBER),
}
_SEARCH = {
    **dict.fromkeys(("budget", "unit", "scored_by", "frequencies"), str),
    **dict.fromkeys(("whole", "limit", "smallest", "taken"), count),
    "tried": [{"origin": str, "cost": count, "expected": number, "measured": _NUMBER}],
    "frontier": [pair],
    "exact": bool,
    "notes": [str],
}
_CONVERSION = {
    "cost": ({...: (number, None)}, None),
    "layers": ({...: {"energy": _NUMBER, "error": _NUMBER, "spectrum": ([finite], None)}}, None),
    "search": (_SEARCH, None),
    "drops": ([{"share": number, "drop": number}], None),
}
STAGES = [{"name": str, "evaluation": (_EVALUATION, None), "why": _TEXT}]
COMMAND = {"name": str, "source": str, "words": [str]}
_RUN = {
    "command": (COMMAND, None),
    "recipe": {...: json_value},
    "stages": STAGES,
    "epochs": [{...: _NUMBER}],
    "evaluation": (_EVALUATION, None),
}
HISTORY = {
    "command": (COMMAND, None),
    "calibration": (CALIBRATION, None),
    "conversion": (_CONVERSION, None),
    "held_out": ({...: _EVALUATION}, None),
    "training": [_RUN],
}


def with_columns(history: Mapping[str, Any]) -> dict[str, Any]:
    """Return a history in which the layers of a calibration are a list for each entry; inverse of `with_layers`.

    A value that all layers have is there once. In a small file, names and values of all layers would take some per cent
    of the bytes.

    >>> with_columns({"calibration": {"layers": [{"name": "a", "inputs": 64}, {"name": "b", "inputs": 64}]}})
    {'calibration': {'layers': {'name': ['a', 'b'], 'inputs': 64}}}
    """
    calibration = history.get("calibration")
    if not isinstance(calibration, Mapping) or not calibration.get("layers"):
        return dict(history)
    layers = calibration["layers"]
    names = dict.fromkeys(name for layer in layers for name in layer)
    columns: dict[str, Any] = {name: [layer.get(name) for layer in layers] for name in names}
    for name, values in columns.items():
        if name != "name" and not isinstance(values[0], list | dict) and values.count(values[0]) == len(values) > 1:
            columns[name] = values[0]
    return {**history, "calibration": {**calibration, "layers": columns}}


def with_layers(history: Any) -> Any:
    """Return a history in which the layers of a calibration are a list of dicts, as `check_history` wants them.

    Other values are returned as they are.

    Raises:
        ValueError: the lists of the entries have different lengths, or there is no list of names, or there are far more
            layers or columns than a network has.
    """
    calibration = history.get("calibration") if isinstance(history, Mapping) else None
    if not isinstance(calibration, Mapping) or not isinstance(calibration.get("layers"), Mapping):
        return history
    columns = calibration["layers"]
    check(columns, {"name": [json_value], ...: json_value}, "history['calibration']['layers']")
    length = len(columns["name"])
    if length > MOST_LAYERS or len(columns) > MOST_COLUMNS:
        raise ValueError(f"{counted(length, 'layer')} with {counted(len(columns), 'column')} are too many")
    columns = {key: own if isinstance(own, list) else [own] * length for key, own in columns.items()}
    layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {**history, "calibration": {**calibration, "layers": layers}}


def check_history(history: Any) -> None:
    """Raise ValueError, with the place, if an entry that reports or further training read has the wrong form.

    Other entries may be anything.
    """
    check(history, HISTORY, "history")
