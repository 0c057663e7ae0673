"""Fetching weights: every way in which that fails is one error, and nothing that was fetched is run."""

from __future__ import annotations

import os
import pickle
import socket
import urllib.error
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import torchvision.models._api as torchvision_api
from torch import nn

from ..errors import InputError, OutsideError, first_line
from ..samples import SAMPLES

OFFLINE = (
    f"what works offline: {', '.join(f'sample:{name}' for name in SAMPLES)}, local-dir:PATH, your own FILE.py:FACTORY, "
    "or any timm or torchvision name with --checkpoint FILE"
)


# What a network's maker raises where an argument is of the wrong kind.
_BAD_ARGUMENTS = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError)


@contextmanager
def reaching_out(what: str) -> Iterator[None]:
    """Turn every way in which a download fails into one error; without a network look in the local caches only."""
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not _hub_resolves():
            # The hub's client would retry for most of a minute before it said so.
            huggingface_hub.constants.HF_HUB_OFFLINE = True
        yield
    except (urllib.error.URLError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise OutsideError(f"the weights of {what} cannot be fetched: {first_line(error)}; {OFFLINE}") from error
    except RuntimeError as error:
        if "No pretrained weights" in str(error) or "no pretrained weights" in str(error):
            raise InputError(f"{what} has no pretrained weights: give some with --checkpoint FILE") from error
        raise InputError(f"{what} cannot be made: {first_line(error)}") from error
    except _BAD_ARGUMENTS as error:
        raise InputError(f"{what} cannot be made: {first_line(error)}") from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _hub_resolves() -> bool:
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # names are the proxy's to resolve
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError:
        return False
    return True


@contextmanager
def torchvision_loading(fetch: bool) -> Iterator[None]:
    """Builders of torchvision fetch weights with a pickle that may run code, and build otherwise without them: here
    they read plain tensors only, or (``fetch`` False) are built as for their weights and load nothing."""
    read, load = torchvision_api.load_state_dict_from_url, nn.Module.load_state_dict
    try:
        if fetch:
            torchvision_api.load_state_dict_from_url = partial(read, weights_only=True)
        else:
            torchvision_api.load_state_dict_from_url = lambda *_, **__: {}
            nn.Module.load_state_dict = lambda *_, **__: None  # type: ignore[method-assign]
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            "the downloaded weights hold more than tensors: refused; clear the cache of torch.hub"
        ) from error
    finally:
        torchvision_api.load_state_dict_from_url = read
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def torchvision_preprocessing(module: str, weights: Any) -> dict[str, Any]:
    """What timm calls a pretrained_cfg, from the transforms that belong to torchvision's weights."""
    transforms = weights.transforms()
    if not (crop := getattr(transforms, "crop_size", None)):
        return {}
    size = (crop[0], crop[0])
    if ".video" in module:
        return {"input_size": (3, int(weights.meta.get("min_temporal_size", 16)), *size)}
    cfg = {"input_size": (3, *size), "mean": tuple(transforms.mean), "std": tuple(transforms.std)}
    if resize := getattr(transforms, "resize_size", None):
        cfg |= {"crop_pct": crop[0] / resize[0], "interpolation": transforms.interpolation.value}
    return cfg
