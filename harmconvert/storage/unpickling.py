"""Files that torch.save wrote, read without running anything that they name."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line

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

# What torch says of a pickle that is whole, but holds more than tensors and plain containers.
_MORE_THAN_TENSORS = ("Unsupported global: GLOBAL", "Can only SETITEM", "Can only append")

# What files begin with that are called .pth, but were not written by torch.save.
_OTHER_FORMATS = {
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x1f\x8b": "a gzip archive: unpack it, and name the file in it",
    b"BZh": "a bzip2 archive: unpack it, and name the file in it",
    b"7z\xbc\xaf": "a 7z archive: unpack it, and name the file in it",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}
_ARCHIVE = b"PK\x03\x04"
_DAMAGED = "it is damaged, cut off, or nothing that torch.save wrote: get it again"
_OF_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # behind the protocol: the magic number of torch's old format

# A placeholder for these would be as harmless as for others, but no honest file has them: it is refused.
_HOSTILE_MODULES = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "pty", "ctypes", "importlib", "webbrowser",
    "commands", "pickle", "code",
}  # fmt: skip
_HOSTILE_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "input", "breakpoint", "apply", "execfile"}


class Placeholder:
    """Stands for an object in a file whose class is neither imported nor run; it keeps nothing of the object."""

    kind = "?"
    dump_patches = False  # which torch.load asks for where a file holds the source code of a module

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Pass over an item of a list."""

    def extend(self, items: Any) -> None:
        """Pass over items of a list."""

    def add(self, item: Any) -> None:
        """Pass over an item of a set."""


def weights_content(path: str | Path) -> Any:
    """What torch.save wrote: tensors and plain containers, and a `Placeholder` for each object of another class.

    Raises:
        InputError: a program, a damaged file, or a pickle that would run code; one of `UNREADABLE`: as `unpickled`.
    """
    try:
        return unpickled(path)
    except pickle.UnpicklingError as error:
        if not any(text in str(error) for text in _MORE_THAN_TENSORS):
            raise
    module = SimpleNamespace(__name__="placeholders", Unpickler=_InertUnpickler, load=_inert_load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Every name that the pickle asks for goes through `_InertUnpickler.find_class`.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


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


def why_not_read(path: str | Path, error: Exception) -> str:
    """Why torch.load does not read a file, in one line; ``error`` is what it raised, one of `UNREADABLE`.

    torch's own messages advise to run what the file names, and mention pickles where the file is not one.
    """
    if isinstance(error, OSError | MemoryError):
        return first_line(error) or type(error).__name__
    with Path(path).open("rb") as file:
        start = file.read(512)
    if "GLOBAL" in str(error):
        return "it holds objects that are no tensors"
    if start.startswith(_ARCHIVE):
        written = any(name.endswith("/data.pkl") for name in zipfile.ZipFile(path).namelist())
        return _DAMAGED if written else "it is an archive that torch.save did not write"
    for signature, what in _OTHER_FORMATS.items():
        if start.startswith(signature):
            return f"it is {what}"
    if start[8:10] == b'{"':
        return "it is a safetensors file: rename it to end in .safetensors"
    if start[257:262] == b"ustar":
        return "it is a tar archive: unpack it, and name the file in it"
    if start[:1] == b"\x80" and not start[2:].startswith(_OF_TORCH):
        return "it is a pickle that torch.save did not write: save its tensors with torch.save or as .safetensors"
    return "it is text" if _is_text(start) else _DAMAGED


def _is_text(start: bytes) -> bool:
    text = start.decode(errors="replace").rstrip("\ufffd")  # the last character may be cut off
    return "\ufffd" not in text and all(character.isprintable() or character.isspace() for character in text)


class _InertUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other name is a fresh class of placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        """The few names that tensors need, as functions made for this file, and placeholders for all others."""
        root = module.partition(".")[0]
        if root in _HOSTILE_MODULES or (root in ("builtins", "__builtin__") and name in _HOSTILE_BUILTINS):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("collections", "defaultdict"):
            return lambda *_: {}
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            # The pickle may set attributes of what it is given: torch's own function stays out of its reach.
            return lambda storage, offset, size, stride, *_: torch._utils._rebuild_tensor_v2(
                storage, offset, size, stride, False, OrderedDict()
            )
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: _checked(data)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        return type("Placeholder", (Placeholder,), {"kind": f"{module}.{name}"})


def _inert_load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise pickle.UnpicklingError(f"a parameter of a {type(value).__name__}")
    return value


def why_no_values(tensor: Tensor) -> str | None:
    """Why a tensor from a pickle cannot be taken as it is; None where it can."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "is no plain tensor (meta, sparse or quantised)"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims the shape {tuple(tensor.shape)}, of which the file holds a part (expanded)"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is no plain tensor but a {type(tensor).__name__}"
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
