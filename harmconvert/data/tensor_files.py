"""Files of tensors: .npy, .pt, and sound as .wav. A file is a sample, or the one file has all samples as its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import HarmconvertError, InputError, OutsideError, counted, first_line
from .pictures import TENSORS, Pictures

SUFFIXES = (".npy", ".pt", ".wav")


class TensorFiles(Pictures):
    """A tensor in each file below a folder; with class folders, the label is the number of the folder."""

    task = TENSORS

    def __init__(self, root: Path, paths: Sequence[Path], classes: Sequence[str] = ()) -> None:
        self.classes, self.labelled = classes or None, bool(classes)
        numbers = {name: label for label, name in enumerate(classes)}
        self.files = [(path, numbers[path.relative_to(root).parts[0]] if classes else None) for path in paths]

    @property
    def description(self) -> str:  # type: ignore[override]
        """Return what was recognised, for a message."""
        kinds = ", ".join(sorted({path.suffix.lower() for path, _ in self.files}))
        classes = f" of {counted(len(self.classes), 'class')}" if self.classes else " without labels"
        return f"{counted(len(self), 'sample')}: tensors in files ({kinds}){classes}"

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int | None]:
        path, label = self.files[index]
        return tensor_in(path), label

    def name(self, index: int) -> str:
        return str(self.files[index][0])


class TensorRows(Pictures):
    """The rows of the tensor in one file, without labels."""

    task, labelled = TENSORS, False

    def __init__(self, path: Path) -> None:
        self.path = path
        if self.rows.dim() < 2:
            raise InputError(
                f"{path} has a tensor of {counted(self.rows.dim(), 'axis')}: the first one counts the samples"
            )

    @cached_property
    def rows(self) -> Tensor:
        """Return the whole tensor."""
        return tensor_in(self.path)

    @property
    def description(self) -> str:  # type: ignore[override]
        """Return what was recognised, for a message."""
        return f"{counted(len(self), 'sample')}: the rows of a tensor, without labels"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Tensor, None]:
        return self.rows[index], None

    def name(self, index: int) -> str:
        return f"row {index} of {self.path}"


def tensor_in(path: Path) -> Tensor:
    """Return the tensor in a file, in float32: whole numbers are not scaled; sound (channels, samples) is from -1 to 1.

    Raises:
        InputError: the file is damaged, or it has no tensor.
        OutsideError: there is no package that reads sound.
    """
    readers: dict[str, Callable[[Path], Tensor]] = {".npy": _array, ".pt": _pickled, ".wav": _sound}
    try:
        tensor = readers[path.suffix.lower()](path)
    except HarmconvertError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read: {first_line(error) or type(error).__name__}") from error
    return tensor.float()


def _array(path: Path) -> Tensor:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise InputError(f"{path} has no array of real numbers")
    return torch.from_numpy(values.astype(np.float32))


def _pickled(path: Path) -> Tensor:
    value = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor) or value.is_complex():
        raise InputError(f"{path} has a {type(value).__name__}: it should have one tensor of real numbers")
    return value


def _sound(path: Path) -> Tensor:
    try:
        import soundfile

        samples, _ = soundfile.read(str(path), dtype="float32", always_2d=True)
        return torch.from_numpy(samples.T.copy())
    except ImportError:
        pass
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise OutsideError(f"{path} is sound, which soundfile or scipy reads: pip install soundfile") from error
    _, values = wavfile.read(str(path))
    scale = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    return torch.from_numpy(np.atleast_2d(values.T).astype(np.float32) / scale)
