"""The help in groups, and the command that each command names as the next one: it runs as printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

import harmconvert as hc
from harmconvert.cli import main
from harmconvert.cli.groups import GROUPS, main_name

from .commands import SAMPLE, converted, ok
from .pictures import digit_folders

OWN = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
"""

SMALL = """
from torch import nn
def make():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(144, 10)
    )
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def next_of(*arguments: str) -> list[str]:
    """Run a command; return the words of the command that it names as the next one."""
    lines = ok(*arguments).stdout.splitlines()
    assert sum(line.startswith("Next: ") for line in lines) == 1
    words = shlex.split(lines[-1].removeprefix("Next: "))
    assert words[0] == "harmconvert"
    return words[1:]


def test_from_inspection_to_plain_weights_each_command_names_the_next() -> None:
    conversion = next_of("inspect", SAMPLE)
    assert conversion == ["convert", SAMPLE, "--lambda", "progressive"]
    export = next_of(*conversion)
    cut = "resnet_mnist5k-harmonic-progressive.safetensors"
    assert export == ["export", cut, "-o", "resnet_mnist5k-harmonic-progressive-dense.safetensors"]
    assert next_of("verify", SAMPLE, cut, "--as-planned") == export
    ok(*export)
    assert "Next:" not in ok("verify", SAMPLE, cut, "--as-planned", "-q").stdout
    assert "Next:" not in ok("verify", SAMPLE, cut, "--as-planned", "--json").stdout


def test_a_network_with_low_ranks_is_exported_in_the_form_that_saves_multiply_adds() -> None:
    Path("own.py").write_text(SMALL.replace("4, 4, 3", "4, 32, 3").replace("144", "1152"))
    words = ("--input-size", "1,28,28", "--rank", "*=1", "-o", "low.safetensors")
    export = next_of("convert", "own.py:make", *words)
    size = ["--input-size", "1,28,28"]
    assert export[:4] == ["export", "low.safetensors", "--model", "own.py:make"]
    assert export[4:] == [*size, "--format", "onnx", "--form", "factored", "-o", "low.onnx"]
    ok(*export)
    assert Path("low.onnx").exists()


def test_a_conversion_without_a_choice_says_that_it_saves_nothing() -> None:
    result = ok("convert", SAMPLE)
    assert "The whole basis is exact and saves nothing: a lambda, a rank, bits or a budget does." in result.stdout
    assert result.stdout.splitlines()[-1] == f"Next: harmconvert convert {SAMPLE} --lambda progressive"
    assert "saves nothing" not in ok("convert", SAMPLE, "--lambda", "full", "--force").stdout


def test_the_next_command_names_code_and_weights_of_your_own() -> None:
    import torch

    Path("net_of_mine.py").write_text(OWN)
    values: dict[str, object] = {}
    exec(OWN, values)
    torch.save(values["make"]().state_dict(), "weights.pth")  # type: ignore[operator]
    own = ("net_of_mine.py:make", "--checkpoint", "weights.pth", "--input-size", "3,8,8")
    conversion = next_of("inspect", *own)
    assert sorted(conversion) == sorted(["convert", *own, "--lambda", "progressive"])
    export = next_of(*conversion)
    assert export[2:4] == ["--model", "net_of_mine.py:make"]
    ok(*export)
    assert Path(export[-1]).exists()


def digits(each: int = 3) -> str:
    digit_folders(Path("digits"), each)
    return "digits"


@pytest.mark.slow
def test_after_an_evaluation_comes_the_smallest_file_or_the_plain_weights() -> None:
    Path("small.py").write_text(SMALL)
    words = next_of("evaluate", "small.py:make", "--preprocess", "none", "--input-size", "1,28,28", "--data", digits())
    assert words[:2] == ["convert", "small.py:make"]
    assert words[-6:] == ["--bits", "auto", "--max-drop", "1", "--data", "digits"]
    ok(*words, "-o", "cut.safetensors")
    export = next_of("evaluate", "cut.safetensors", "--trust-code", "--data", "digits")
    assert export == ["export", "cut.safetensors", "--trust-code", "-o", "cut-dense.safetensors"]
    ok(*export)
    assert "Next:" not in ok("evaluate", "cut.safetensors", "--trust-code", "--data", "digits", "--json").stdout


@pytest.mark.parametrize("harmonic", ["none", "all"])
def test_after_a_training_comes_a_cut_or_the_plain_weights(harmonic: str) -> None:
    Path("small.py").write_text(SMALL)
    words = ("--preprocess", "none", "--input-size", "1,28,28", "--epochs", "1", "--crop", "none", "--hflip", "0")
    train = ("train", "small.py:make", "--data", digits(), "--harmonic", harmonic, "--recipe", "finetune", *words)
    following = next_of(*train, "--workers", "0", "-o", "trained.safetensors")
    assert following[0] == ("convert" if harmonic == "none" else "export")
    ok(*following)


def test_export_names_the_page_and_the_page_names_the_measurement() -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    converted("cut.safetensors", "--lambda", "2")
    page = next_of("export", "cut.safetensors", "-o", "dense.safetensors")
    assert page == ["report", "cut.safetensors"]
    benchmark = next_of(*page)
    assert benchmark == ["benchmark", "cut.safetensors"]
    short = ("-b", "1", "--repeats", "3", "--runtime", "torch", "--precision", "f32", "--layout", "contiguous")
    ok(*benchmark, *short, "--form", "dense", "--threads", "1")
    assert "Next:" not in ok("export", SAMPLE, "-o", "uncut.safetensors").stdout


def test_a_benchmark_names_the_command_that_makes_the_form_it_advises() -> None:
    short = ("-b", "1", "--repeats", "3", "--runtime", "torch", "--precision", "f32", "--layout", "contiguous")
    export = next_of("benchmark", SAMPLE, *short, "--form", "dense", "--threads", "1")
    assert export == ["export", SAMPLE, "-o", "resnet_mnist5k-dense.safetensors"]
    ok(*export)


def test_a_network_without_kernels_over_1x1_is_not_advised_to_cut_frequencies() -> None:
    Path("pointwise.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(8, 8, 1)\n")
    words = next_of("inspect", "pointwise.py:make", "--input-size", "8,4,4")
    assert words[-2:] == ["--bits", "4"]


@pytest.mark.parametrize("name", ["convert", "finetune", "train", "export", "benchmark"])
def test_every_option_of_a_long_help_is_in_one_group(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    options = [main_name(one) for one in command.params if isinstance(one, click.Option) and not one.hidden]
    grouped = [option for names in GROUPS.values() for option in names]
    assert len(grouped) == len(set(grouped))
    assert set(options) <= set(grouped)
    text = ok(name, "--help").stdout
    assert "Other options" not in text
    assert "Messages:" in text
    assert all(option in text for option in options)


def test_every_group_has_an_option_that_exists() -> None:
    known = {
        option
        for name in main.list_commands(click.Context(main))
        if (command := main.get_command(click.Context(main), name)) is not None
        for one in command.params
        for option in one.opts
    }
    assert {option for names in GROUPS.values() for option in names} <= known | {"--help"}


def test_the_help_of_finetune_shows_the_defaults_of_its_recipe() -> None:
    command = main.get_command(click.Context(main), "finetune")
    assert command is not None
    shown = {
        one.name or "": one.show_default
        for one in command.params
        if isinstance(one, click.Option) and isinstance(one.show_default, str)
    }
    assert len(shown) >= 25
    for name, text in shown.items():
        value = getattr(hc.Recipe(), name)
        for number, part in zip(value if isinstance(value, tuple) else [value], str(text).split(), strict=False):
            if isinstance(number, str):
                assert part == number, name
            else:
                assert float(part.rstrip(":")) == pytest.approx(number, abs=0.004), name
    assert "[default: (5); x>=1]" in ok("finetune", "--help").stdout


def test_rare_options_are_not_in_the_help_and_work() -> None:
    assert "--vflip" not in ok("train", "--help").stdout
    assert "--normalization" not in ok("convert", "--help").stdout
    ok("convert", SAMPLE, "--normalization", "l1", "-o", "l1.safetensors")


def test_the_help_shows_defaults() -> None:
    text = " ".join(ok("convert", "--help").stdout.split())
    for default in ("[default: dct]", "[default: 256; x>=", "[default: float32]", "[default: 8; x>=0]"):
        assert default in text, default
