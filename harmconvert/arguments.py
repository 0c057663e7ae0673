"""Check arguments that are text or paths: what to keep, a budget, a format to export, names of data and of reports.

Nothing here imports torch, so that the command line can refuse a wrong argument at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import OutsideError, UsageError
from .files import check_folder, check_output, short_name

UNITS = {
    "params": "parameters", "macs": "MACs in factored form", "bytes": "bytes", "latency": "microseconds",
}  # fmt: skip
# What an amount may be given in. A bare number is a share: 60 is more likely a forgotten % than 60 parameters.
SUFFIXES = {
    "params": {"k": 10**3, "M": 10**6, "G": 10**9},
    "macs": {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "bytes": {"B": 1, "kB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30},
    "latency": {"us": 1, "ms": 10**3, "s": 10**6},
}
_NUMBER = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?) *(%|[a-z]*)")
# What reports and figures are written as.
PAGES = (".html", ".json")
FIGURES = (".png", ".svg")
# How timm's data sets are named; those of the second kind are read from a stream.
STREAMS = ("hfids/", "tfds/", "wds/")
PACKAGES = ("torch/", "hfds/", *STREAMS)
_MOST_DIGITS = 9  # int() raises ValueError for text of thousands of digits
FORMATS = ("dense", "timm", "onnx", "torch-export")
GRAPHS = ("onnx", "torch-export")
TIMM_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Budget:
    """The most that a network may have of one unit: a share of what the whole one has, above 0 and up to 1, or an
    amount: parameters, bytes of its tensors, MACs (of the factored form), microseconds here.

    >>> Budget.parse("params=60%"), Budget.parse({"bytes": "10MB"})
    (Budget(unit='params', share=0.6, amount=None), Budget(unit='bytes', share=None, amount=10000000))
    >>> str(Budget.parse("latency=1500us"))
    'latency=1.5ms'
    """

    unit: str
    share: float | None = None
    amount: int | None = None

    @classmethod
    def parse(cls, given: str | Mapping[str, Any]) -> Budget:
        """Read ``"params=60%"``, ``"params=0.6"``, ``"params=5M"``, or a dict of one of them.

        Raises:
            UsageError: an unknown unit, several, or a value that is neither a share nor an amount.
        """
        pairs = dict([given.partition("=")[::2]]) if isinstance(given, str) else dict(given)
        if len(pairs) != 1:
            raise UsageError(f"a budget is one of {', '.join(UNITS)}: {given!r} names {len(pairs)}")
        ((unit, value),) = pairs.items()
        unit = unit.strip()
        if unit not in UNITS:
            raise UsageError(f"unknown budget {unit!r}: use one of {', '.join(UNITS)}, such as params=60%")
        scales = {suffix.lower(): scale for suffix, scale in SUFFIXES[unit].items()}
        found = _NUMBER.fullmatch(str(value).strip().lower())
        number, suffix = (float(found[1]), found[2]) if found else (math.nan, "")
        if suffix in scales and 1 <= number * scales[suffix] < math.inf:
            return cls(unit, amount=math.floor(number * scales[suffix]))
        share = number / {"%": 100, "": 1}.get(suffix, math.nan)
        if not 0 < share <= 1:
            raise UsageError(
                f"the budget {unit}={value} is no share of the network: give 60% or 0.6, at most 100%, or an amount "
                f"in {', '.join(SUFFIXES[unit])}"
            )
        return cls(unit, share)

    def limit(self, whole: int) -> int:
        """The most that a plan may cost where the whole network costs ``whole``: no more than that."""
        return math.floor(self.share * whole) if self.share is not None else min(self.amount or 0, whole)

    def __str__(self) -> str:
        if self.amount is None:
            return f"{self.unit}={100 * (self.share or 0):g}%"
        texts = [f"{self.amount / scale:.12g}{suffix}" for suffix, scale in SUFFIXES[self.unit].items()]
        return f"{self.unit}={min(texts, key=len)}"


def parse_lambda(text: str) -> str | int | dict[str, int]:
    """What ``--lambda`` says: ``full``, ``progressive``, a number, or ``PATTERN=N,PATTERN=N``.

    >>> parse_lambda("2"), parse_lambda("layer3.*=2,layer4.*=1")
    (2, {'layer3.*': 2, 'layer4.*': 1})

    Raises:
        UsageError: none of these.
    """
    text = text.strip()
    if text in ("full", "progressive"):
        return text
    if _decimal(text):
        return int(text)
    patterns: dict[str, int] = {}
    for part in text.split(","):
        pattern, equals, number = part.strip().rpartition("=")
        if not (equals and pattern and _decimal(number.strip())):
            raise UsageError(f"unknown lambda {text!r}: use full, progressive, a number, or PATTERN=N,PATTERN=N")
        if pattern in patterns:
            raise UsageError(f"lambda names the pattern {pattern!r} twice")
        patterns[pattern] = int(number)
    return patterns


def _decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def check_format(path: str | Path, format: str, force: bool, dtype: str, form: str) -> None:
    """Raise UsageError where an export to ``path`` cannot be: it exists, or the format does not go with its suffix, the
    dtype or the form."""
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if form not in ("dense", "factored") or (form == "factored" and format not in GRAPHS):
        raise UsageError(f"--form {form} does not go with {format}: factored is for onnx and torch-export")
    if format in GRAPHS and dtype != "float32":
        raise UsageError(
            f"--dtype {dtype} is for state dicts (dense, timm), which are computed with in float32 again; a graph "
            "computes as it is stored: use float32"
        )
    if format == "timm":
        check_folder(path, TIMM_FILES, force)
        return
    check_output(path, force, {"onnx": ".onnx", "torch-export": ".pt2"}.get(format, ".safetensors"))


def check_labelled(dataset: str, data_dir: str | None) -> None:
    """Raise UsageError where a data set and a folder name no labelled images."""
    if dataset.startswith(("sample:", *PACKAGES)):
        return
    if dataset:
        raise UsageError(
            f"there is no data set {dataset!r}: use sample:mnist5k, a timm data set such as torch/cifar10 or "
            "hfds/USER/NAME, or a folder with --data-dir"
        )
    if data_dir is None:
        raise UsageError("which images? give --data-dir FOLDER, or --dataset NAME")
    if not (Path(data_dir).is_dir() or (data_dir.endswith(".tar") and Path(data_dir).is_file())):
        raise UsageError(f"there is no folder {data_dir}: give --data-dir FOLDER with a folder for each class")


def check_unlabelled(data: str) -> None:
    """Raise UsageError where a text names no images to calibrate on."""
    if data in ("sample:mnist5k", "sample:photographs") or Path(data).is_dir():
        return
    if data.startswith("sample:"):
        raise UsageError(f"there is no sample data set {data!r}: use sample:mnist5k or sample:photographs")
    if Path(data).is_file() and not data.endswith(".tar"):
        raise UsageError(f"{data} is a file: give the folder that holds the images")
    if not (Path(data).is_file() or data.startswith(PACKAGES)):
        raise UsageError(
            f"there is no folder {data}: give a folder of images, sample:mnist5k, sample:photographs, "
            "or a timm data set such as torch/cifar10 or hfds/USER/NAME"
        )


def templating() -> ModuleType:
    """jinja2, which fills the page.

    Raises:
        OutsideError: it is not installed.
    """
    try:
        return import_module("jinja2")
    except ImportError as error:
        raise OutsideError("the report page is made by jinja2: pip install 'harmconvert[report]'") from error


def check_report(source: str, output: str | None, force: bool) -> Path:
    """The file that a report of ``source`` goes to, NAME-report.html where none is named; call it before long work.

    Raises:
        UsageError: neither .html nor .json; it exists and ``force`` is not set. OutsideError: jinja2 is missing.
    """
    path = Path(output) if output is not None else Path(f"{short_name(source)}-report.html")
    if path.suffix.lower() not in PAGES:
        raise UsageError(f"{path} should end in {' or '.join(PAGES)}: the suffix says what to write")
    check_output(path, force)
    if path.suffix.lower() == ".html":
        templating()
    return path


def check_figure(source: str, figure: str, output: str | None, force: bool) -> tuple[Path, Path]:
    """The image and the .csv that a figure of ``source`` goes to, NAME-FIGURE.png where no output is named.

    Raises:
        UsageError: no image that can be written; either file exists and ``force`` is not set.
    """
    image = Path(output) if output is not None else Path(f"{short_name(source)}-{figure}.png")
    if image.suffix.lower() not in FIGURES:
        raise UsageError(f"{image} should end in {' or '.join(FIGURES)}: the suffix says what to write")
    numbers = image.with_suffix(".csv")
    for path in (image, numbers):
        check_output(path, force)
    return image, numbers
