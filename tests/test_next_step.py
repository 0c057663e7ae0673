"""The help in groups, and the command that each command names as the next one: it runs as printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from harmconvert.cli import main
from harmconvert.cli.groups import GROUPS, main_name

from .commands import SAMPLE, ok

OWN = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
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


def test_a_network_without_kernels_over_1x1_is_not_advised_to_cut_frequencies() -> None:
    Path("pointwise.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(8, 8, 1)\n")
    words = next_of("inspect", "pointwise.py:make", "--input-size", "8,4,4")
    assert words[-2:] == ["--bits", "4"]


@pytest.mark.parametrize("name", ["convert", "finetune", "train"])
def test_every_option_of_a_long_help_is_in_one_group(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    assert command is not None
    options = [main_name(one) for one in command.params if isinstance(one, click.Option) and not one.hidden]
    grouped = [option for names in GROUPS.values() for option in names]
    assert len(grouped) == len(set(grouped))
    assert set(options) <= set(grouped)
    text = ok(name, "--help").stdout
    assert "Other options" not in text
    assert "Output:" in text
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


def test_the_help_shows_defaults() -> None:
    text = " ".join(ok("convert", "--help").stdout.split())
    for default in ("[default: dct]", "[default: 256; x>=", "[default: ortho]", "[default: 8; x>=0]"):
        assert default in text, default
