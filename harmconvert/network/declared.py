"""Read and set what a network declares about its inputs: timm's ``pretrained_cfg``, and its record in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn

from ..documents import check, count, finite
from ..errors import UsageError

# Largest number of elements of one example that a file may ask for: 512 MB in float32.
_MOST_ELEMENTS = 1 << 27
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


def pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    """Return a network's ``pretrained_cfg``, timm's record of weights and pre-processing; empty if it has none."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the size of each input of one example from the network's ``pretrained_cfg``; empty if it has none.

    If a network was created with another number of channels (``in_chans``), timm still writes three channels into the
    size. Then the network's attribute ``in_chans``, or the convolution that ``first_conv`` names, has the number.
    """
    config = pretrained_config(model)
    sizes = config.get("input_sizes") or [size for size in (config.get("input_size"),) if size]
    sizes = [tuple(size) for size in sizes]
    if len(sizes) == 1 and len(sizes[0]) == 3 and (channels := _channels(model, config, sizes[0][0])):
        return [(channels, *sizes[0][1:])]
    return sizes


def _channels(model: nn.Module, config: Mapping[str, Any], declared: int) -> int | None:
    """Return the number of input channels that the network names outside its input size, or None."""
    if isinstance(channels := getattr(model, "in_chans", None), int):
        return channels
    name = config.get("first_conv")
    module = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    channels = getattr(module, "in_channels", None)
    # A stem that folds pixels into channels reads a multiple of the declared number.
    return channels if isinstance(channels, int) and channels % declared else None


def _input_size(value: Any) -> bool:
    """Return whether the value can be an input size: at most five whole numbers above 0, and not too many elements.

    The size of an input with one number for each example, such as a time step, is empty.
    """
    return (
        isinstance(value, list | tuple)
        and len(value) <= 5
        and all(count(part) and part > 0 for part in value)
        and prod(value) <= _MOST_ELEMENTS
    )


def _timm_interpolation(value: Any) -> bool:
    return value in _INTERPOLATIONS


def _nonzero_number(value: Any) -> bool:
    return finite(value) and value != 0


def _positive_number(value: Any) -> bool:
    return finite(value) and value > 0


_RECORD = {
    "input_sizes": [_input_size],
    "mean": [finite],
    "std": [_nonzero_number],
    "interpolation": _timm_interpolation,
    "crop_pct": _positive_number,
    "crop_mode": str,
    "function": str,
}


def check_preprocessing(record: Any) -> None:
    """Raise ValueError unless a checkpoint's record of pre-processing is valid; the message names the wrong entry."""
    check(record, (_RECORD, None), "preprocessing")


def preprocessing_record(model: nn.Module, changes: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the record of a network's pre-processing for its checkpoint; None if nothing is known.

    Args:
        changes: entries that replace what the network declares: timm's (input_size, mean, std, interpolation, crop_pct,
            crop_mode), ``input_sizes`` for a network with several inputs, or ``function`` for FILE.py:FUNCTION.

    Raises:
        UsageError: ``changes`` has an unknown entry or a wrong value.
    """
    config = {**pretrained_config(model), "input_sizes": input_sizes(model)}
    own = {key: _plain(config[key]) for key in _RECORD if config.get(key)}
    own = {key: value for key, value in own.items() if _is_valid({key: value})}
    changed = {key: value for key, value in (changes or {}).items() if value is not None}
    if "input_size" in changed:
        changed["input_sizes"] = [changed.pop("input_size")]
    changed = {key: _plain(value) for key, value in changed.items()}
    if unknown := sorted(set(changed) - set(_RECORD)):
        raise UsageError(f"preprocessing has no entry {unknown[0]!r}: use {', '.join(_RECORD)} or input_size")
    try:
        check_preprocessing(changed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "function" in changed or {"mean", "std"} <= set(changed):  # a function replaces mean and std, and vice versa
        own = {key: value for key, value in own.items() if key == "input_sizes"}
    return {**own, **changed} or None


def declare_preprocessing(model: nn.Module, record: Mapping[str, Any] | None) -> None:
    """Set a network's ``pretrained_cfg`` to the pre-processing of a record; the inverse of `preprocessing_record`.

    >>> network = nn.Conv2d(1, 2, 3)
    >>> declare_preprocessing(network, {"input_sizes": [[1, 28, 28]], "mean": [0.13], "std": [0.31]})
    >>> input_sizes(network), pretrained_config(network)["mean"]
    ([(1, 28, 28)], (0.13,))
    """
    if not record:
        return
    config = dict(pretrained_config(model))
    new = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items() if key in _RECORD}
    if "function" in new or {"mean", "std"} <= set(new):
        config = {key: value for key, value in config.items() if key not in ("function", "mean", "std")}
    if sizes := new.pop("input_sizes", ()):
        config.pop("input_sizes", None)
        new |= {"input_size": tuple(sizes[0])} if len(sizes) == 1 else {"input_sizes": tuple(map(tuple, sizes))}
    # If a class computes `pretrained_cfg`, the attribute cannot be set.
    if not isinstance(getattr(type(model), "pretrained_cfg", None), property):
        model.pretrained_cfg = {**config, **new}  # type: ignore[assignment]


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _is_valid(record: Mapping[str, Any]) -> bool:
    try:
        check_preprocessing(record)
    except ValueError:
        return False
    return True
