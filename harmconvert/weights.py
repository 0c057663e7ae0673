"""State dicts in files and in networks: read without running anything, written whole, loaded strictly."""

from __future__ import annotations

import hashlib
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from .errors import InputError, OutsideError, first_line, shortened
from .files import outside, write_file

# What torch.load raises for files that are broken, or that are more than tensors.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    MemoryError,  # of a length that the file only claims
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
)

_MOST_PACKED = 4


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors or .pth file; pickles are read with weights_only=True, whatever the environment.

    Training wrappers are opened ("state_dict", "model", "params", EMA first) and "module." prefixes dropped.

    Raises:
        InputError: unreadable, not a state dict, or a pickle that would run code.
    """
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    if Path(path).suffix == ".safetensors":
        with open_safetensors(path):
            return safetensors.torch.load_file(path)
    try:
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle's age
            # An explicit weights_only=True is not overruled by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        text = first_line(error)
        if "GLOBAL" in str(error):
            raise InputError(
                f"{path} holds more than tensors, and reading it would run code: refused; save its state_dict as "
                f".safetensors where you trust it"
            ) from error
        raise InputError(f"{path} is not a readable .pth file: {text or type(error).__name__}; get it again") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "params"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        raise InputError(f"{path} holds no state dict (a mapping from names to tensors)")
    for name, tensor in content.items():
        if not isinstance(name, str) or (reason := why_no_values(tensor)):
            raise InputError(f"{path}: {name!r:.80} {reason if isinstance(name, str) else 'is no name of a tensor'}")
    return dict(clean_state_dict(dict(content)))


def check_zip(path: str | Path, whole: bool = False) -> None:
    """Raise ValueError for a zip that unpacks to far more than it holds (torch packs nothing), or, where it has to be
    ``whole``, one with a part whose checksum is wrong, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        unpacked, size = sum(info.file_size for info in file.infolist()), Path(path).stat().st_size
        if unpacked > _MOST_PACKED * size:
            raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
        if whole and (name := file.testzip()):
            raise ValueError(f"the checksum of {name} is wrong")


def why_no_values(tensor: Tensor) -> str | None:
    """Why a tensor from a pickle cannot be taken as it is; None where it can."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "is no plain tensor (meta, sparse or quantised)"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {tuple(tensor.shape)}, of which the file holds a part (expanded)"
    return None


def open_safetensors(path: str | Path) -> Any:
    """`safetensors.safe_open`, with a plain word about what the file is where it is none.

    Raises:
        InputError: no such file, empty, or something else.
    """
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}; get the file again") from error
    except OSError as error:
        raise outside(error, f"cannot read {path}") from error


def why_unreadable(path: str | Path) -> str | None:
    """Why no weights can be in a file, judged by its first bytes; None where they may be."""
    path = Path(path)
    if not path.exists():
        return "does not exist"
    if not path.is_file():
        return "is not a regular file"
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise outside(error, f"cannot read {path}") from error
    text = start.lstrip().lower()
    if not start:
        return "is empty: get the file again"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run 'git lfs pull' where it came from"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights: the download went wrong; get the file again"
    # A safetensors file starts with any eight bytes, but its ninth opens the header.
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":
        return "is a pickle, not safetensors: rename it to .pth and give it with --checkpoint"
    return None


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str], force: bool) -> None:
    """Write named tensors as .safetensors, by way of a staging file; raises as `save` does."""

    def write(staging: Path) -> None:
        try:
            safetensors.torch.save_file(dict(tensors), staging, metadata)
        except safetensors.SafetensorError as error:
            raise OutsideError(f"cannot write {path}: {error}; free some space or name another place") from error

    write_file(path, write, force)


def untied_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once and contiguous, and which keys are another name of which.

    Raises:
        InputError: a tensor without values (meta device).
    """
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_key: dict[int, str] = {}
    storages: set[int] = set()
    for key, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise InputError(f"{key} is no tensor but a {type(value).__name__}, which no safetensors file can hold")
        if value.is_meta:
            raise InputError(f"{key} has no values (meta device): load weights first")
        if id(value) in first_key:
            tied[key] = first_key[id(value)]
            continue
        first_key[id(value)] = key
        tensor = value.detach()
        # Two views of one storage are two tensors in a file.
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in storages and tensor.numel() > 0
        storages.add(storage)
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return tensors, tied


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict strictly, in the dtypes it has.

    Raises:
        InputError: keys missing, unexpected, of another shape or not floating point; the first ten of each are named.
    """
    own = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    complaints = []
    if missing := [key for key in own if key not in state]:
        complaints.append(f"missing: {shortened(missing)}")
    if unexpected := [key for key in state if key not in own]:
        complaints.append(f"unexpected: {shortened(unexpected)}")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if shapes:
        complaints.append(f"other shape: {shortened(shapes)}")
    kinds = [
        f"{key} {str(state[key].dtype).removeprefix('torch.')}"
        for key in own
        if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
    ]
    if kinds:
        complaints.append(f"not floating point (quantised?): {shortened(kinds)}")
    if any(tensor.is_meta for tensor in own.values()):
        complaints.append("the network is on the meta device: build it on the CPU")
    if complaints:
        raise InputError(f"{where} does not fit this {type(model).__name__}: {'; '.join(complaints)}")
    for key, tensor in own.items():
        if tensor.dtype != state[key].dtype:
            tensor.data = tensor.data.to(state[key].dtype)
    # Constants such as the DCT basis follow the dtype of the coefficients.
    model._apply(lambda tensor: tensor)
    model.load_state_dict(dict(state))


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the network's parameters and persistent buffers: names, dtypes, shapes and bytes, sorted by name."""
    state = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    return tensors_sha256({key: tensor for key, tensor in state.items() if not tensor.is_meta})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over named tensors: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(cast(Any, flat.view(torch.uint8).numpy()))
    return digest.hexdigest()
