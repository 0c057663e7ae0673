"""Checks of the networks, files, images and devices that arguments name, before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .groups import is_given, main_name

# Files of runtimes, from which no network in PyTorch can be made.
GRAPHS = (".onnx", ".ort", ".xml", ".tflite", ".engine", ".mlmodel")
# A name with one of these endings is always a path.
SUFFIXES = (
    ".safetensors", ".pth", ".pt", ".pt2", ".pt7", ".bin", ".ckpt", ".tar", ".json", ".py", *GRAPHS,
)  # fmt: skip
DEVICES = ("cpu", "cuda", "hip", "hpu", "meta", "mps", "mtia", "xla", "xpu")


class InputFile(click.ParamType):
    """A file to read."""

    name = "FILE"
    instead_of_folder = "name a file"

    def check(self, text: str) -> None:
        """Check the path of a file.

        Raises:
            InputError: the file does not exist, or is a folder. OutsideError: there is no permission to read it.
        """
        from ..errors import InputError
        from ..files import outside_error

        path = Path(text)
        if not text or not os.path.lexists(path):
            raise InputError(f"no such file: {text or repr(text)} does not exist")
        if not path.exists():
            raise InputError(f"no such file: {text} is a link to {os.readlink(path)}, which does not exist")
        if path.is_dir():
            raise InputError(f"{text} is a folder: {self.instead_of_folder}")
        if not path.is_file():
            raise InputError(f"{text} is not a regular file")
        if not os.access(path, os.R_OK):
            raise outside_error(PermissionError(13, os.strerror(13)), f"cannot read {text}")
        if path.suffix.lower() in GRAPHS:
            raise InputError(
                f"{text} is a graph for a runtime, not a network in PyTorch: name what it was exported from, as a "
                "checkpoint, weights (--checkpoint) or FILE.py:FACTORY"
            )


class SourceText(InputFile):
    """A source of a network: a name or a file."""

    name = "SOURCE"
    instead_of_folder = "name a file in it, or give local-dir:PATH for a folder that timm wrote"

    def check(self, text: str) -> None:
        """Check a source that is empty or names a file.

        Raises:
            UsageError: the source is empty. InputError, OutsideError: as for a file.
        """
        from ..errors import InputError, UsageError

        if not text.strip():
            raise UsageError(f"{text!r} names no network: give a SOURCE (see --help)")
        if "://" in text:
            raise UsageError(f"{text} is an address: download the file, and name it")
        scheme, _, name = text.partition(":")
        place, colon, _ = text.rpartition(":")
        if scheme == "reference":
            super().check(name)
        elif scheme.replace("_", "-") == "local-dir" and name and not Path(name).is_dir():
            raise InputError(f"no such folder: {name} {'is a file' if Path(name).exists() else 'does not exist'}")
        elif colon and place.endswith(".py"):
            if not Path(place).is_file():
                raise UsageError(f"there is no file {place}: give FILE.py:FACTORY")
        elif looks_like_a_path(text):
            super().check(text)
            if text.endswith(".py"):
                raise UsageError(f"{text} is Python: name the function that makes the network, as {text}:FACTORY")


class DeviceName(click.ParamType):
    """cpu, cuda or cuda:N."""

    name = "DEVICE"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        from ..errors import UsageError

        if not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d{{1,3}})?", str(value)):
            raise UsageError(f"--device {value}: give cpu, cuda, or cuda:N for the GPU of number N")
        return str(value)


def looks_like_a_path(text: str) -> bool:
    """Return whether a source without a scheme can only be a path.

    >>> looks_like_a_path("cut.safetensors"), looks_like_a_path("runs/cut"), looks_like_a_path("resnet50.a1_in1k")
    (True, True, False)
    """
    scheme, colon, _ = text.partition(":")
    if colon and os.sep not in scheme and "." not in scheme:
        return False
    return os.sep in text or text.endswith(SUFFIXES)


def check() -> None:
    """Check every file and every source among the arguments of the running command.

    Raises:
        UsageError: an option has an empty value. InputError, OutsideError: as in `InputFile.check` and
            `SourceText.check`.
    """
    from ..errors import UsageError

    context = click.get_current_context()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        optional = isinstance(parameter, click.Option)
        if optional and value in ("", ("",)) and is_given(context, parameter.name):
            raise UsageError(f"{main_name(parameter)} has an empty value: give one, or leave the option out")
        if isinstance(parameter.type, InputFile) and value is not None:
            for text in value if isinstance(value, tuple) else (value,):
                parameter.type.check(text)


def check_labelled(data: str, data_dir: str | None) -> None:
    """Raise UsageError if the text names no data with labels."""
    from ..arguments import DATA_FILES, PACKAGES, check_labelled, is_data_path, is_function
    from ..errors import UsageError

    if is_data_path(data) or is_function(data):
        return
    if (os.sep in data or data.endswith(DATA_FILES)) and not data.startswith(PACKAGES):
        raise UsageError(f"there is no folder {data}: give a folder with a folder for each class")
    check_labelled(data, data_dir)


def check_run(values: Mapping[str, Any]) -> None:
    """Check the data and the files of a run.

    Raises:
        UsageError: there are no images. All errors of `check`.
    """
    from ..arguments import check_labelled

    check_labelled(*named_data(values))
    check()


def named_data(values: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the name of a data set and a folder, from the options for data.

    Raises:
        UsageError: two options name a folder.
    """
    from ..arguments import is_data_path
    from ..errors import UsageError

    data, folder = values["dataset"], values["data_dir"]
    if not data or not is_data_path(data):
        return data, folder
    if folder is not None:
        raise UsageError(f"--data {data} and --data-dir {folder} both name a folder: give --data only")
    return "", data
