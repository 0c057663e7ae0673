"""Check arguments that are text or paths: what to keep, a budget, a format to export, names of data and of reports.

Nothing here imports torch, so that the command line can refuse a wrong argument at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors

from .errors import Argument, OutsideError, UsageError
from .files import check_folder, check_output, metrics_path, short_name, state_path

UNITS = {
    "params": "parameters", "macs": "MACs in factored form", "bytes": "bytes", "latency": "microseconds",
}  # fmt: skip
# A cut is advised if convolutions over 1x1, which alone have frequencies, hold at least this share of the parameters.
WORTH_A_CUT = 0.05
# Suffixes of amounts, with their factors. A number without a suffix is a share, because a user who writes 60 more
# likely forgot the % than means 60 parameters.
SUFFIXES = {
    "params": {"k": 10**3, "M": 10**6, "G": 10**9},
    "macs": {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "bytes": {"B": 1, "kB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30},
    "latency": {"us": 1, "ms": 10**3, "s": 10**6},
}
_NUMBER = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?) *(%|[a-z]*)")
# Suffixes of the files in which reports and figures are written.
PAGES = (".html", ".json")
FIGURES = (".png", ".svg")
# What a figure may show: of any network, and of a harmonic checkpoint.
NETWORK_FIGURES = ("filters", "spectrum", "tradeoff")
CHECKPOINT_FIGURES = ("errors", "training", "layers", "bits", "ranks")
# Prefixes of timm's data sets; those in STREAMS are read as a stream.
STREAMS = ("hfids/", "tfds/", "wds/")
PACKAGES = ("torch/", "hfds/", *STREAMS)
# Files that are data by themselves: an archive of class folders, boxes in COCO's format, tensors.
DATA_FILES = (".tar", ".json", ".npy", ".pt")
_MOST_DIGITS = 9  # int() raises ValueError for text of thousands of digits
FORMATS = ("dense", "timm", "onnx", "openvino", "torch-export")
GRAPHS = ("onnx", "openvino", "torch-export")
# The precisions of a graph: its weights, and what the runtime computes in.
PRECISIONS = {"onnx": ("f32", "int8"), "openvino": ("f32", "f16", "bf16", "int8")}
# The harmonic checkpoint in a repository of the hub, beside the files that timm reads.
HARMONIC_FILE = "harmonic.safetensors"
TIMM_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Budget:
    """A limit for one unit: a share of the whole network's cost (above 0, at most 1), or an amount.

    Units of amounts: parameters, bytes of the file, MACs of the factored form, microseconds on this machine.
    ``reserved``: bytes of the budget for what the file records besides the network: its source and the command.

    >>> Budget.parse("params=60%"), Budget.parse({"bytes": "10MB"})
    (Budget(unit='params', share=0.6, amount=None), Budget(unit='bytes', share=None, amount=10000000))
    >>> str(Budget.parse("latency=1500us"))
    'latency=1.5ms'
    """

    unit: str
    share: float | None = None
    amount: int | None = None
    reserved: int = field(default=0, repr=False, compare=False)

    @classmethod
    def parse(cls, budget: str | Mapping[str, Any] | Budget) -> Budget:
        """Parse ``"params=60%"``, ``"params=0.6"``, ``"params=5M"``, or a dict with one such entry; keep a `Budget`.

        Raises:
            UsageError: the unit is unknown, there is more than one, or the value is neither a share nor an amount.
        """
        if isinstance(budget, Budget):
            return budget
        pairs = dict([budget.partition("=")[::2]]) if isinstance(budget, str) else dict(budget)
        if len(pairs) != 1:
            raise UsageError(f"a budget is one of {', '.join(UNITS)}: {budget!r} names {len(pairs)}")
        ((unit, value),) = pairs.items()
        unit = unit.strip()
        if unit not in UNITS:
            raise UsageError(f"unknown budget {unit!r}: use one of {', '.join(UNITS)}, such as params=60%")
        scales = {suffix.lower(): scale for suffix, scale in SUFFIXES[unit].items()}
        match = _NUMBER.fullmatch(str(value).strip().lower())
        number, suffix = (float(match[1]), match[2]) if match else (math.nan, "")
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
        """Return the highest cost that a plan may have if the whole network costs ``whole``; at most ``whole``."""
        return math.floor(self.share * whole) if self.share is not None else min(self.amount or 0, whole)

    def __str__(self) -> str:
        if self.amount is None:
            return f"{self.unit}={100 * (self.share or 0):g}%"
        texts = [f"{self.amount / scale:.12g}{suffix}" for suffix, scale in SUFFIXES[self.unit].items()]
        return f"{self.unit}={min(texts, key=len)}"


def parse_lambda(text: str) -> str | int | dict[str, int]:
    """Parse a lambda: ``full``, ``progressive``, a number, or ``PATTERN=N,PATTERN=N``.

    >>> parse_lambda("2"), parse_lambda("layer3.*=2,layer4.*=1")
    (2, {'layer3.*': 2, 'layer4.*': 1})

    Raises:
        UsageError: the text is none of these.
    """
    text = text.strip()
    if text in ("full", "progressive"):
        return text
    if _is_decimal(text):
        return int(text)
    patterns: dict[str, int] = {}
    for part in text.split(","):
        pattern, equals, number = part.strip().rpartition("=")
        if not (equals and pattern and _is_decimal(number.strip())):
            raise UsageError(f"unknown lambda {text!r}: use full, progressive, a number, or PATTERN=N,PATTERN=N")
        if pattern in patterns:
            raise UsageError(f"lambda names the pattern {pattern!r} twice")
        patterns[pattern] = int(number)
    return patterns


def parse_bits(text: str) -> float | str | dict[str, float]:
    """Parse bits per weight: a number, ``PATTERN=N,PATTERN=N``, or ``auto``.

    >>> parse_bits("3"), parse_bits("layer4.*=2.5,fc=4")
    (3.0, {'layer4.*': 2.5, 'fc': 4.0})

    Raises:
        UsageError: the text is none of these.
    """
    if text.strip() == "auto":
        return "auto"
    patterns: dict[str, float] = {}
    for part in text.split(","):
        pattern, equals, number = part.strip().rpartition("=")
        match = _NUMBER.fullmatch(number.strip().lower())
        if match is None or match[2] or bool(equals) != bool(pattern) or (not equals and "," in text):
            raise UsageError(f"unknown bits {text!r}: use a number such as 3, PATTERN=N,PATTERN=N, or auto")
        if not equals:
            return float(match[1])
        if pattern in patterns:
            raise UsageError(f"bits names the pattern {pattern!r} twice")
        patterns[pattern] = float(match[1])
    return patterns


def parse_rank(text: str) -> float | int | dict[str, float | int]:
    """Parse ranks: a share of the full rank, a whole number, or ``PATTERN=R,PATTERN=R``.

    >>> parse_rank("0.5"), parse_rank("16"), parse_rank("layer4.*=0.25,fc=32")
    (0.5, 16, {'layer4.*': 0.25, 'fc': 32})

    Raises:
        UsageError: the text is none of these.
    """
    patterns: dict[str, float | int] = {}
    for part in text.split(","):
        pattern, equals, number = part.strip().rpartition("=")
        match = _NUMBER.fullmatch(number.strip().lower())
        if match is None or match[2] or bool(equals) != bool(pattern) or (not equals and "," in text):
            raise UsageError(f"unknown rank {text!r}: use a share such as 0.5, a whole number, or PATTERN=R,PATTERN=R")
        rank = int(match[1]) if _is_decimal(match[1]) else float(match[1])
        if not equals:
            return rank
        if pattern in patterns:
            raise UsageError(f"rank names the pattern {pattern!r} twice")
        patterns[pattern] = rank
    return patterns


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def check_format(
    path: str | Path, format: str, force: bool, dtype: str, form: str, precision: str = "f32", calibrated: bool = False
) -> None:
    """Raise UsageError if an export to ``path`` is not possible.

    The reasons are that ``path`` exists, that the format does not fit the suffix of ``path``, the dtype, the form or
    the precision, or that calibration inputs are missing for 8 bits or not needed.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if form not in ("dense", "factored") or (form == "factored" and format not in GRAPHS):
        what = f" is not possible with {format}: only onnx, openvino and torch-export can be factored"
        raise UsageError(Argument("form", form), what)
    if format in GRAPHS and dtype != "float32":
        what = " is only for state dicts (dense, timm), which are loaded in float32; a graph computes in its dtype"
        raise UsageError(Argument("dtype", dtype), what, ": use float32")
    if precision not in (known := PRECISIONS.get(format, ("f32",))):
        raise UsageError(Argument("precision", precision), f" is not possible with {format}: use {', '.join(known)}")
    if precision == "int8" and not calibrated:
        what = " needs inputs on which the ranges of the activations are measured: give "
        raise UsageError(Argument("precision", precision), what, Argument("calibrate", "images"))
    if calibrated and format not in PRECISIONS:
        what = f" is for graphs in low precision (onnx, openvino), not for {format}: leave it out"
        raise UsageError(Argument("calibrate", "images"), what)
    if format == "timm":
        check_folder(path, TIMM_FILES, force)
        return
    suffixes = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
    check_output(path, force, suffixes.get(format, ".safetensors"))
    if format == "openvino":
        check_output(Path(path).with_suffix(".bin"), force)


def check_run_outputs(output: str, resume: str | Path | None, force: bool) -> None:
    """Raise UsageError if a run would replace its ``output``, or the metrics or the state of another run beside it.

    The state is checked first: an interrupted run also left metrics, and ``force`` would delete its work.
    """
    if resume is None and not force and state_path(output).exists():
        raise interrupted(state_path(output))
    check_output(output, force, ".safetensors")
    check_output(metrics_path(output), force or resume is not None)


def interrupted(path: Path) -> UsageError:
    """Return the error for the state of an interrupted run that a new run would replace."""
    resume, force = Argument("resume", path), Argument("force", True)
    return UsageError(
        f"{path} is the state of an interrupted run: go on with ", resume, ", or start a new run with ", force
    )


def is_function(data: str) -> bool:
    """Return whether the text names data as the function of a file: ``FILE.py:FUNCTION``.

    >>> is_function("loaders.py:digits"), is_function("torch/cifar10")
    (True, False)
    """
    return data.rpartition(":")[0].endswith(".py")


def is_data_path(data: str) -> bool:
    """Return whether the text is the path of a folder, or of a file that is data by itself, and it exists."""
    return Path(data).is_dir() or (data.endswith(DATA_FILES) and Path(data).is_file())


def check_labelled(dataset: str, data_dir: str | None) -> None:
    """Raise UsageError unless a data set or a folder with labelled images is named."""
    if dataset.startswith(("sample:", *PACKAGES)) or is_function(dataset):
        return
    if dataset:
        raise UsageError(
            f"there is no folder and no data set {dataset!r}: give a folder with a folder for each class, "
            "sample:mnist5k, or a timm data set such as torch/cifar10 or hfds/USER/NAME"
        )
    if data_dir is None:
        raise UsageError("no data is named: give ", Argument("data", "DATA"))
    if not is_data_path(data_dir):
        raise UsageError(f"there is no folder {data_dir}: give a folder with a folder for each class")


def check_unlabelled(data: str) -> None:
    """Raise UsageError unless the text names images to calibrate on: a folder, a sample or a timm data set."""
    if data in ("sample:mnist5k", "sample:photographs") or is_data_path(data) or is_function(data):
        return
    if data.startswith("sample:"):
        raise UsageError(f"there is no sample data set {data!r}: use sample:mnist5k or sample:photographs")
    if Path(data).is_file():
        raise UsageError(f"{data} is a file: give the folder that holds the images")
    if not data.startswith(PACKAGES):
        raise UsageError(
            f"there is no folder {data}: give a folder of images, sample:mnist5k, sample:photographs, "
            "or a timm data set such as torch/cifar10 or hfds/USER/NAME"
        )


def templating() -> ModuleType:
    """Import jinja2, which makes the report page.

    Raises:
        OutsideError: jinja2 is not installed.
    """
    try:
        return import_module("jinja2")
    except ImportError as error:
        raise OutsideError("the report page is made by jinja2: pip install 'harmconvert[report]'") from error


def check_report(source: str, output: str | None, force: bool) -> Path:
    """Return the file for a report of ``source``; NAME-report.html if ``output`` is None. Call this before long work.

    Raises:
        UsageError: the suffix is neither .html nor .json, or the file exists and ``force`` is not set.
        OutsideError: jinja2 is missing.
    """
    path = Path(output) if output is not None else Path(f"{short_name(source)}-report.html")
    if path.suffix.lower() not in PAGES:
        raise UsageError(f"{path} should end in {' or '.join(PAGES)}: the suffix says what to write")
    check_output(path, force)
    if path.suffix.lower() == ".html":
        templating()
    return path


def check_figure(source: str, figure: str, output: str | None, force: bool) -> tuple[Path, Path]:
    """Return the image and the .csv for a figure of ``source``; NAME-FIGURE.png if ``output`` is None.

    Raises:
        UsageError: the suffix is not that of an image format, or one of the files exists and ``force`` is not set.
    """
    image = Path(output) if output is not None else Path(f"{short_name(source)}-{figure}.png")
    if image.suffix.lower() not in FIGURES:
        raise UsageError(f"{image} should end in {' or '.join(FIGURES)}: the suffix says what to write")
    numbers = image.with_suffix(".csv")
    for path in (image, numbers):
        check_output(path, force)
    return image, numbers


def may_be_harmonic(source: str) -> bool:
    """Return whether a source may be a harmonic checkpoint, from its name and the metadata of its file.

    False is certain; True is not.

    >>> may_be_harmonic("sample:resnet_mnist5k"), may_be_harmonic("reference:model_best.pth.tar")
    (False, True)
    """
    if source.startswith(("reference:", "hf-hub:", "hf_hub:")):
        return True  # what a repository holds is known when it is opened
    if source.replace("_", "-", 1).startswith("local-dir:"):
        source = f"{source.partition(':')[2]}/{HARMONIC_FILE}"
    if Path(source).suffix != ".safetensors" or not Path(source).is_file():
        return False
    try:
        with safetensors.safe_open(source, framework="np") as file:
            return "harmconvert" in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return True  # the error appears when the file is read


def stays_as_it_is(
    source: str | None,
    choices: Iterable[object],
    basis: str = "dct",
    normalization: str = "ortho",
    dtype: str = "float32",
) -> bool:
    """Return whether a conversion writes its network unchanged: it is harmonic, and no option asks for a change.

    Args:
        source: None if the network is known to be harmonic.
        choices: the options for what to keep and for the calibration; None or empty if they are not given.
    """
    if any(choices) or (basis, normalization, dtype) != ("dct", "ortho", "float32"):
        return False
    return source is None or may_be_harmonic(source)


def check_harmonic(source: str) -> None:
    """Raise UsageError if a source is certainly not a harmonic checkpoint."""
    if not may_be_harmonic(source):
        raise not_harmonic(source)


def not_harmonic(source: str) -> UsageError:
    """Return the error for a source that is not a harmonic checkpoint."""
    return UsageError(f"{source} is not a harmonic checkpoint: make one first with: harmconvert convert {source}")


def check_hub_name(repository: str) -> None:
    """Raise UsageError unless a text names a repository of the Hugging Face hub.

    >>> check_hub_name("me/resnet50-small")
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII) or ".." in repository or "--" in repository:
        raise UsageError(f"{repository!r} is not the name of a repository: give USER/REPO")
