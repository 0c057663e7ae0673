"""What a network says of its inputs, in timm's words: its ``pretrained_cfg``, and the record of it in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import nn

from ..documents import check, count, finite
from ..errors import UsageError

# Elements of one example that a file may ask for: 512 MB in float32.
_MOST_ELEMENTS = 1 << 27
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")


def pretrained_config(model: nn.Module) -> Mapping[str, Any]:
    """What a network says of its weights and pre-processing, as timm's do (``pretrained_cfg``, a dict or a record);
    nothing of one that says nothing."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """The size of each input of one example, as the model's ``pretrained_cfg`` has them; empty where it has none.

    timm leaves three channels in the size of a network that was made with other ``in_chans``; the network's own
    ``in_chans``, or the convolution that ``first_conv`` names, has the number.
    """
    config = pretrained_config(model)
    sizes = config.get("input_sizes") or [size for size in (config.get("input_size"),) if size]
    sizes = [tuple(size) for size in sizes]
    if len(sizes) == 1 and len(sizes[0]) == 3 and (channels := _channels(model, config, sizes[0][0])):
        return [(channels, *sizes[0][1:])]
    return sizes


def _channels(model: nn.Module, config: Mapping[str, Any], declared: int) -> int | None:
    """Channels that the network reads, where it says so beside its input size."""
    if isinstance(channels := getattr(model, "in_chans", None), int):
        return channels
    name = config.get("first_conv")
    module = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    channels = getattr(module, "in_channels", None)
    # A stem that folds pixels into channels reads a multiple of the declared number.
    return channels if isinstance(channels, int) and channels % declared else None


def _size(value: Any) -> bool:
    """A size of one input: one to five whole numbers above 0, of no more elements than fit into memory."""
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= 5
        and all(count(part) and part > 0 for part in value)
        and prod(value) <= _MOST_ELEMENTS
    )


def _interpolation(value: Any) -> bool:
    """A way to resize that timm knows."""
    return value in _INTERPOLATIONS


def _divisor(value: Any) -> bool:
    """A finite number other than 0."""
    return finite(value) and value != 0


def _share(value: Any) -> bool:
    """A finite number above 0."""
    return finite(value) and value > 0


_RECORD = {
    "input_sizes": [_size],
    "mean": [finite],
    "std": [_divisor],
    "interpolation": _interpolation,
    "crop_pct": _share,
    "crop_mode": str,
    "function": str,
}


def check_preprocessing(record: Any) -> None:
    """Raise ValueError, saying where, unless a checkpoint's record of its pre-processing can be used."""
    check(record, (_RECORD, None), "preprocessing")


def recorded(model: nn.Module, given: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The record of a network's pre-processing that its checkpoint keeps; None where nothing is known of it.

    Args:
        given: replaces what the network declares, in timm's words (input_size, mean, std, interpolation, crop_pct,
            crop_mode), and ``input_sizes`` of a network of several inputs, ``function`` for FILE.py:FUNCTION.

    Raises:
        UsageError: ``given`` holds something else.
    """
    config = {**pretrained_config(model), "input_sizes": input_sizes(model)}
    own = {key: _plain(config[key]) for key in _RECORD if config.get(key)}
    own = {key: value for key, value in own.items() if _usable({key: value})}
    asked = {key: value for key, value in (given or {}).items() if value is not None}
    if "input_size" in asked:
        asked["input_sizes"] = [asked.pop("input_size")]
    asked = {key: _plain(value) for key, value in asked.items()}
    if strange := sorted(set(asked) - set(_RECORD)):
        raise UsageError(f"preprocessing has no entry {strange[0]!r}: use {', '.join(_RECORD)} or input_size")
    try:
        check_preprocessing(asked)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "function" in asked or {"mean", "std"} <= set(asked):  # either replaces the other
        own = {key: value for key, value in own.items() if key == "input_sizes"}
    return {**own, **asked} or None


def declare(model: nn.Module, record: Mapping[str, Any] | None) -> None:
    """Make a network declare the pre-processing of a record; the inverse of `recorded`.

    >>> network = nn.Conv2d(1, 2, 3)
    >>> declare(network, {"input_sizes": [[1, 28, 28]], "mean": [0.13], "std": [0.31]})
    >>> input_sizes(network), pretrained_config(network)["mean"]
    ([(1, 28, 28)], (0.13,))
    """
    if not record:
        return
    config = dict(pretrained_config(model))
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items() if key in _RECORD}
    if "function" in known or {"mean", "std"} <= set(known):
        config = {key: value for key, value in config.items() if key not in ("function", "mean", "std")}
    if sizes := known.pop("input_sizes", ()):
        config.pop("input_sizes", None)
        known |= {"input_size": tuple(sizes[0])} if len(sizes) == 1 else {"input_sizes": tuple(map(tuple, sizes))}
    # timm's networks and ours keep it as an attribute; a class that computes it keeps its own.
    if not isinstance(getattr(type(model), "pretrained_cfg", None), property):
        model.pretrained_cfg = {**config, **known}  # type: ignore[assignment]


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _usable(record: Mapping[str, Any]) -> bool:
    try:
        check_preprocessing(record)
    except ValueError:
        return False
    return True
