"""The last line of a command: the command that usually comes next, as it can be typed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..files import short_name
from .recording import command_words

if TYPE_CHECKING:
    from rich.console import Console

    from ..deploy.advice import Row
    from ..pipeline.convert_to_file import ConvertedFile

# Options that say how to make the network of SOURCE, and last the size of its inputs: the next command needs them, too.
_NETWORK = ("weights", "weights_key", "strip_prefix", "arguments", "code", "trust_code", "input_size")
_PREPROCESSING = ("preprocess", "mean", "std", "interpolation", "crop_pct")
_SUFFIXES = {"onnx": "onnx", "openvino": "xml"}


def suggest(console: Console, *words: str) -> None:
    """Print a command as the next step, in one line: a line break would make two commands of it."""
    console.print(f"Next: {shlex.join(['harmconvert', *words])}", markup=False, soft_wrap=True)


def to_convert(source: str, share_over_1x1: float) -> list[str]:
    """Return the words of a conversion that makes a network smaller.

    ``share_over_1x1``: the share of its parameters in convolutions over 1x1, which alone have frequencies to cut.
    """
    from ..arguments import WORTH_A_CUT, may_be_harmonic

    choice = share_over_1x1 >= WORTH_A_CUT and not may_be_harmonic(source)
    return ["convert", source, *_network_words(), *(("--lambda", "progressive") if choice else ("--bits", "4"))]


def _network_words(*more: str, leave_out: tuple[str, ...] = ()) -> list[str]:
    """Return the options of the running command that say how to make the network of SOURCE, and ``more`` of them."""
    names = {parameter.name or "" for parameter in click.get_current_context().command.params}
    return list(command_words(leave_out=names - {*_NETWORK, *more} | {*leave_out})["words"])


def after_evaluation(console: Console, source: str, values: Mapping[str, Any]) -> None:
    """Print what comes after an evaluation: plain weights of a cut network, or the smallest file of an uncut one."""
    from ..arguments import STREAMS, may_be_harmonic

    if may_be_harmonic(source):
        suggest(console, *to_export(source, code=values["code"], trust_code=values["trust_code"]))
        return
    data, words = values["dataset"] or values["data_dir"], _network_words(*_PREPROCESSING)
    if data.startswith(STREAMS):
        suggest(console, "convert", source, *words, "--bits", "4")
        return
    words += ["--data-dir", values["data_dir"]] if values["dataset"] and values["data_dir"] else []
    words += ["--metric", values["metric"]] if values["metric"] else []
    suggest(console, "convert", source, *words, "--bits", "auto", "--max-drop", "1", "--data", data)


def after_training(console: Console, source: str, output: str, plain: bool, values: Mapping[str, Any]) -> None:
    """Print what comes after a training; ``plain``: the output is plain weights, not a harmonic checkpoint."""
    if plain:
        words = _network_words(leave_out=("weights", "weights_key", "strip_prefix"))
        suggest(console, "convert", source, *words, "--checkpoint", output, "--lambda", "progressive")
    else:
        suggest(console, *to_export(output, source, values["code"], values["trust_code"]))


def after_benchmark(console: Console, lines: Sequence[str]) -> None:
    """Print the first command among the lines that say how to make the advised forms."""
    commands = [line.partition(": harmconvert ")[2] for line in lines if "FOLDER" not in line]
    if found := next(filter(None, commands), None):
        suggest(console, *shlex.split(found))


def after_export(console: Console, source: str) -> None:
    """Print the command for the page of a harmonic checkpoint, if the packages for it are installed."""
    from ..arguments import may_be_harmonic

    if may_be_harmonic(source) and find_spec("jinja2") and find_spec("matplotlib"):
        suggest(console, "report", source, *_network_words())


def after_demo(console: Console) -> None:
    """Print a conversion that is a part of the demonstration."""
    suggest(console, "convert", "sample:resnet_mnist5k", "--bits", "3", "--data", "sample:mnist5k")


def after_page(console: Console, source: str) -> None:
    """Print the command that measures the forms of a checkpoint."""
    suggest(console, "benchmark", source, *_network_words())


def to_make(row: Row, max_drop: float, source: str, data: str | None) -> str:
    """Return a line with the command, or the Python code, that makes a form of SOURCE that a benchmark advises.

    ``max_drop``: the largest loss of 8 bits, in %. ``data``: images on which 8 bits are calibrated.
    """
    title, name = f"{row.form}, {row.runtime}, {row.precision}", short_name(source)
    if row.runtime == "torch" and (row.form, row.precision) != ("dense", "f32"):
        load = (
            f"hc.load({source!r}, form={row.form!r})" if Path(source).is_file() else f"hc.open_source({source!r}).model"
        )
        return f"{title}: {load}{'.bfloat16()' if row.precision == 'bf16' else ''}"
    words = ["export", source, *_network_words()]
    if row.runtime == "torch":
        words += ["-o", f"{name}-dense.safetensors"]
    else:
        words += ["--format", row.runtime, *(() if row.form == "dense" else ("--form", row.form))]
        words += [] if row.precision == "f32" else ["--precision", row.precision]
        if row.precision == "int8":
            words += ["--data", data or "FOLDER", "--max-drop", f"{max_drop:g}"]
        precision = "" if row.precision == "f32" else f"-{row.precision}"
        words += ["-o", f"{name}{precision}.{_SUFFIXES[row.runtime]}"]
    return f"{title}: {shlex.join(['harmconvert', *words])}"


def to_export(
    checkpoint: str, source: str = "", code: str | None = None, trust_code: bool = False, factored: bool = False
) -> list[str]:
    """Return the words of a command that writes plain weights of a checkpoint, or the graph of its ``factored`` form.

    ``source``: from which it was made. ``code``, ``trust_code``: what options say about the user's code that makes its
    network. A network with low ranks needs fewer multiply-adds only in factored form.
    """
    own, name = _own_code(source, code, trust_code), Path(checkpoint).stem
    if factored and find_spec("onnxruntime") and find_spec("onnxscript"):
        size = _network_words(leave_out=_NETWORK[:-1])
        return ["export", checkpoint, *own, *size, "--format", "onnx", "--form", "factored", "-o", f"{name}.onnx"]
    return ["export", checkpoint, *own, "-o", f"{name}-dense.safetensors"]


def _own_code(source: str, code: str | None, trust_code: bool) -> list[str]:
    """Return the options that allow the user's code to make the network of a checkpoint."""
    from ..storage.source import parse_source

    code = source if source and parse_source(source).scheme == "code" else code
    return ["--model", code] if code else ["--trust-code"] if trust_code else []


def after_conversion(
    console: Console, source: str, file: ConvertedFile, chosen: bool, values: Mapping[str, Any]
) -> None:
    """Print what comes after a conversion; ``chosen``: an option says what to keep."""
    conversion, code = file.conversion, values["code"]
    if conversion is not None and not chosen and conversion.plan.whole:
        console.print("The whole basis is exact and saves nothing: a lambda, a rank, bits or a budget does.")
        suggest(console, *to_convert(source, conversion.cost.parameter_share))
    elif conversion is not None and conversion.coded and values["data"]:
        own = _own_code(source, code, values["trust_code"])
        compared = () if own or values["weights"] else ("--compare", source)
        suggest(console, "evaluate", file.output, *own, "--data", str(values["data"]), *compared)
    else:
        from ..network.low_rank import ranked_layers

        ranked = conversion is not None and bool(ranked_layers(conversion.model))
        suggest(console, *to_export(file.output, source, code, factored=ranked))
