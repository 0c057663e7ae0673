"""Read files that torch.save wrote, without running any code that they name."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, first_line

# Exceptions that torch.load raises for files that are damaged or contain more than tensors.
UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    RuntimeError,
    MemoryError,  # the file claims a huge length
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
)

# Archives of torch.save are not compressed: one that unpacks to more than this many times its size is refused.
_LARGEST_EXPANSION = 4

# Messages of torch for an intact pickle that contains more than tensors and plain containers.
_MORE_THAN_TENSORS = ("Unsupported global: GLOBAL", "Can only SETITEM", "Can only append")

# First bytes of files that are named .pth but were not written by torch.save.
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
_DAMAGED = "it is damaged, cut off, or was not written by torch.save: get it again"
_OF_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # after the protocol: the magic number of torch's old format

# Placeholders for these would be harmless, too, but only a malicious file names them: it is refused.
_HOSTILE_MODULES = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "pty", "ctypes", "importlib", "webbrowser",
    "commands", "pickle", "code",
}  # fmt: skip
_HOSTILE_BUILTINS = {"eval", "exec", "compile", "open", "__import__", "input", "breakpoint", "apply", "execfile"}


class Placeholder:
    """Replaces an object in a file whose class is neither imported nor run; it keeps no data of the object."""

    kind = "?"
    dump_patches = False  # torch.load reads this attribute if a file contains the source code of a module

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignore an item of a list."""

    def extend(self, items: Any) -> None:
        """Ignore items of a list."""

    def add(self, item: Any) -> None:
        """Ignore an item of a set."""


def read_weights_pickle(path: str | Path) -> Any:
    """Return the content of a torch.save file: tensors, plain containers, and a `Placeholder` for any other object.

    For a file that torch.load cannot read, one of `UNREADABLE` is raised.

    Raises:
        InputError: the file is a program, is damaged, or is a pickle that would run code.
    """
    try:
        return read_pickle(path)
    except pickle.UnpicklingError as error:
        if not any(text in str(error) for text in _MORE_THAN_TENSORS):
            raise
    module = SimpleNamespace(__name__="placeholders", Unpickler=_InertUnpickler, load=_inert_load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Every name in the pickle is looked up by `_InertUnpickler.find_class`.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


def read_pickle(path: str | Path) -> Any:
    """Return the content of a torch.save file that has only tensors and plain containers, on the CPU.

    For a file that torch.load cannot read, one of `UNREADABLE` is raised.

    Raises:
        InputError: the file is a program, or is damaged.
    """
    if reason := _archive_problem(path):
        raise InputError(f"{path} {reason}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old pickles
        # TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD does not override an explicit weights_only=True.
        return torch.load(path, map_location="cpu", weights_only=True)


def placeholder_kind(content: Any, depth: int = 5) -> str | None:
    """Return the class of an object that is neither a tensor nor a plain container; None if there is none."""
    if isinstance(content, Placeholder):
        return f"an object of the class {content.kind[:80]}"
    if isinstance(content, Mapping) and depth:
        return next((kind for value in content.values() if (kind := placeholder_kind(value, depth - 1))), None)
    return None


def why_pickle_unreadable(path: str | Path, error: Exception) -> str:
    """Return, in one line, why torch.load cannot read a file; ``error`` is its exception, one of `UNREADABLE`.

    torch's own messages recommend to run the code in the file, and they mention pickles even if the file is not one.
    """
    if isinstance(error, OSError | MemoryError):
        return first_line(error) or type(error).__name__
    with Path(path).open("rb") as file:
        start = file.read(512)
    if "GLOBAL" in str(error):
        return "it contains objects that are not tensors"
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
    """Builds tensors and plain containers; any other object becomes a `Placeholder`."""

    def find_class(self, module: str, name: str) -> Any:
        """Return safe functions for the few names that tensors need, and a class of placeholders for any other name."""
        root = module.partition(".")[0]
        if root in _HOSTILE_MODULES or (root in ("builtins", "__builtin__") and name in _HOSTILE_BUILTINS):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("collections", "defaultdict"):
            return lambda *_: {}
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            # A pickle can set attributes of the returned function, so it must not get torch's own function.
            return lambda storage, offset, size, stride, *_: torch._utils._rebuild_tensor_v2(
                storage, offset, size, stride, False, OrderedDict()
            )
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: _check_tensor(data)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        return type("Placeholder", (Placeholder,), {"kind": f"{module}.{name}"})


def _inert_load(file: Any, **options: Any) -> Any:
    return _InertUnpickler(file, **options).load()


def _check_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise pickle.UnpicklingError(f"a parameter of a {type(value).__name__}")
    return value


def why_tensor_refused(tensor: Tensor) -> str | None:
    """Return why a tensor from a pickle cannot be used; None if it can."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return "is not a plain tensor (it is meta, sparse or quantised)"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has the shape {tuple(tensor.shape)}, but the file holds only a part of its values (expanded)"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is not a plain tensor but a {type(tensor).__name__}"
    return None


def _archive_problem(path: str | Path) -> str | None:
    """Return why an archive of torch has no weights, or damaged ones; None if it may have.

    torch.load would not detect the damage: it does not compare checksums.
    """
    with Path(path).open("rb") as file:
        if file.read(4) != _ARCHIVE:
            return None  # not an archive: older versions of torch wrote no archives
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked, size = sum(one.file_size for one in archive.infolist()), Path(path).stat().st_size
            if unpacked > _LARGEST_EXPANSION * size:
                return f"is refused: its {size:,} bytes unpack to {unpacked:,}"
            # torch.load does not read an entry that is marked as a folder: its tensor would have uninitialised values.
            unread = next((one.filename for one in archive.infolist() if one.external_attr & 0x10), None)
            if any(name.endswith("/constants.pkl") for name in names):
                return "is a TorchScript program, which is not run: save its state_dict instead"
            if any(name.endswith("/archive_format") for name in names):
                return "is an exported program, not weights: save the state_dict of its network instead"
            if name := unread or archive.testzip():
                return f"is damaged ({name} is not what was written): get the file again"
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, RuntimeError, EOFError, zlib.error) as error:
        return f"is damaged ({first_line(error)}): get the file again"
    return None
