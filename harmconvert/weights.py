"""State dicts in files and in networks: read without running anything, written whole, loaded strictly."""

from __future__ import annotations

import hashlib
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from .errors import InputError, OutsideError, first_line, shortened
from .files import outside, read_json, write_file

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

    Training wrappers are opened ("state_dict", "model", "params", EMA first) and "module." prefixes dropped. A
    checkpoint in several files is named by its index (.index.json), beside which they lie.

    Raises:
        InputError: unreadable, damaged, not a state dict, or a pickle that would run code.
    """
    if reason := why_unreadable(path):
        raise InputError(f"{path} {reason}")
    if str(path).endswith(".index.json"):
        return _read_shards(Path(path))
    if Path(path).suffix == ".safetensors":
        with open_safetensors(path):
            return safetensors.torch.load_file(path)
    try:
        content = unpickled(path)
    except InputError:
        raise
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


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors that an index places in files beside it, each file holding just those that it should."""
    try:
        places = read_json(index)["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights: {first_line(error) or type(error).__name__}") from error
    state: dict[str, Tensor] = {}
    for name in names:
        if not name or name != Path(name).name or name.endswith(".index.json"):
            raise InputError(f"{index} names {name[:80]!r}, which is no file beside it: refused")
        part = read_weights(index.with_name(name))
        wanted = {key for key, place in places.items() if place == name}
        if differing := sorted(wanted ^ set(part)):
            raise InputError(f"{index} and {name} disagree on {shortened(differing)}: get the files again")
        state |= part
    if not state:
        raise InputError(f"{index} names no weights")
    return state


def unpickled(path: str | Path) -> Any:
    """What torch.save wrote, tensors and plain containers only, on the CPU.

    Raises:
        InputError: a program, or damaged; one of `UNREADABLE`: anything else that torch.load stumbles over.
    """
    if reason := _why_not_weights(path):
        raise InputError(f"{path} {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the pickle's age
        # An explicit weights_only=True is not overruled by TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
        return torch.load(path, map_location="cpu", weights_only=True)


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
    try:
        if not path.exists():
            return "does not exist"
        if not path.is_file():
            return "is not a regular file"
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


def _why_not_weights(path: str | Path) -> str | None:
    """Why an archive that torch wrote holds no weights, or not those it was written with; None where it may.

    torch.load would not notice the latter: it compares no checksum.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return None  # no archive, but what older versions wrote
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked, size = sum(one.file_size for one in archive.infolist()), Path(path).stat().st_size
            if unpacked > _MOST_PACKED * size:
                return f"is refused: its {size:,} bytes unpack to {unpacked:,}"
            # What is marked as a folder torch.load does not read, and leaves memory as it found it.
            unread = next((one.filename for one in archive.infolist() if one.external_attr & 0x10), None)
            if any(name.endswith("/constants.pkl") for name in names):
                return "is a TorchScript program, which would have to be run: save its state_dict instead"
            if any(name.endswith("/archive_format") for name in names):
                return "is an exported program, not weights: save the state_dict of its network instead"
            if name := unread or archive.testzip():
                return f"is damaged ({name} is not what was written): get the file again"
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, RuntimeError, EOFError, zlib.error) as error:
        return f"is damaged ({first_line(error)}): get the file again"
    return None


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str], force: bool) -> None:
    """Write named tensors as .safetensors, by way of a staging file; raises as `save` does."""

    def write(staging: Path) -> None:
        try:
            safetensors.torch.save_file(dict(tensors), staging, metadata)
        except KeyError as error:  # a dtype that the format has no name for
            keys = [key for key, tensor in tensors.items() if tensor.dtype == error.args[0]]
            kind = str(error.args[0]).removeprefix("torch.")
            raise InputError(f"{shortened(keys)}: no safetensors file can hold {kind} values") from error

    with saving(path):
        write_file(path, write, force)


@contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """What safetensors raises when a disk is full is no OSError; here it is an OutsideError, as others are."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OutsideError(f"cannot write {path}: {error}; free some space or name another place") from error


def untied_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once and contiguous, and which keys are another name of which.

    Raises:
        InputError: a tensor without values (meta device), or a value or a name that no file can hold.
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
        if value.layout != torch.strided:
            kind = f"{value.dtype} {value.layout}".replace("torch.", "")
            raise InputError(f"{key} is a {kind} tensor, which no safetensors file can hold: make it a plain one")
        if any("\ud800" <= letter <= "\udfff" for letter in key):
            raise InputError(f"{key} is no name that a file can hold (lone surrogates): rename that module")
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
        if 0 in tensor.stride() and tensor.numel() > 1:  # values that are one in memory (expanded) take in no others
            tensor.data = tensor.data.contiguous()
    # Constants such as the DCT basis follow the dtype of the coefficients.
    model._apply(lambda tensor: tensor)
    # Tensors of a file are read as they are copied: all at once, they would be a second network in memory.
    keys = list(own)
    for start in range(0, len(keys), 64):
        model.load_state_dict({key: state[key] for key in keys[start : start + 64]}, strict=False)


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the network's parameters and persistent buffers: names, dtypes, shapes and bytes, sorted by name."""
    state = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    return tensors_sha256({key: tensor for key, tensor in state.items() if not tensor.is_meta})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over named tensors: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for part in _as_bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def tensors_crc32(tensors: Mapping[str, Tensor], before: bytes = b"") -> str:
    """CRC-32 over some bytes and then what `tensors_sha256` hashes: it tells damage, not intent, but is faster."""
    checksum = zlib.crc32(before)
    for part in _as_bytes(tensors):
        checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def _as_bytes(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for key, tensor in sorted(tensors.items()):
        # Names may hold lone surrogates, which no file can, but a digest.
        yield f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode("utf-8", "surrogatepass")
        plain = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
        plain = plain.dequantize() if plain.is_quantized else plain  # reading their storage ends the process
        flat = plain.cpu().contiguous().flatten()
        if flat.numel():
            yield flat.view(torch.uint8).numpy()
