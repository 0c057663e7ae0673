"""Download weights: every failure becomes one kind of error, and no downloaded code is run."""

from __future__ import annotations

import os
import pickle
import socket
import urllib.error
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import torchvision.models._api as torchvision_api
from torch import nn

from ..errors import Argument, HarmconvertError, InputError, Message, OutsideError, first_line
from ..samples import SAMPLES

_OFFLINE = Message(
    f"these work offline: {', '.join(f'sample:{name}' for name in SAMPLES)}, local-dir:PATH, your own FILE.py:FACTORY, "
    "or any timm or torchvision name with ", Argument("weights", "FILE"),
)  # fmt: skip


# Exceptions that builders of networks raise for a wrong argument.
_BAD_ARGUMENTS = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError)


@contextmanager
def downloading(what: str) -> Iterator[None]:
    """Turn every failure of a download into one error; without an internet connection, use only the local caches."""
    try:
        # Without a connection, the hub's client would retry for nearly a minute.
        with nullcontext() if _hub_resolves() else offline():
            yield
    except HarmconvertError:
        raise
    except (urllib.error.URLError, huggingface_hub.errors.HfHubHTTPError, OSError) as error:
        raise OutsideError(f"the weights of {what} cannot be fetched: {first_line(error)}; ", _OFFLINE) from error
    except RuntimeError as error:
        if "No pretrained weights" in str(error) or "no pretrained weights" in str(error):
            file = Argument("weights", "FILE")
            raise InputError(f"{what} has no pretrained weights: give some with ", file) from error
        raise InputError(f"{what} cannot be made: {first_line(error)}") from error
    except _BAD_ARGUMENTS as error:
        raise InputError(f"{what} cannot be made: {first_line(error)}") from error


@contextmanager
def offline() -> Iterator[None]:
    """Let the hub's client use its local cache only."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _hub_resolves() -> bool:
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError:
        return False
    return True


@contextmanager
def torchvision_loading(fetch: bool) -> Iterator[None]:
    """Make torchvision's builders load weights safely inside, or not at all.

    By default these builders unpickle the weights, which can run code. With ``fetch``, they read only plain tensors.
    Without ``fetch``, they build the structure for the weights (it can differ from the untrained one) and load nothing.
    """
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
            "the downloaded weights contain more than tensors: refused; clear the cache of torch.hub"
        ) from error
    finally:
        torchvision_api.load_state_dict_from_url = read
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def torchvision_preprocessing(module: str, weights: Any) -> dict[str, Any]:
    """Return the transforms of torchvision's weights in the form of timm's ``pretrained_cfg``."""
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
