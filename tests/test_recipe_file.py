"""Options of convert and finetune from a YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest

import harmconvert as hc
from harmconvert.storage import read_header

from .commands import SAMPLE, fails, ok

TRAINING = """
data: sample:mnist5k
epochs: 1
lr: 1e-3
scale: [0.9, 1]
hflip: 0
freeze-bn: false
calibration_images: 0
workers: 0
batch-size: 1000
"""

SMALL = """import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 7, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def words_of(path: str) -> list[str]:
    header = hc.open_source(path).header
    assert header is not None
    return list(header.history["command"]["words"])


def test_a_recipe_gives_the_options_of_a_conversion_and_the_source() -> None:
    Path("small.yaml").write_text(
        f"source: {SAMPLE}\nlambda:\n  stage3.*: 2\n  stage2.*: 1\ninput-size: [1, 28, 28]\nexclude: [stage1.*]\n"
        "basis: dct\noutput: cut.safetensors\n"
    )
    ok("convert", "--recipe", "small.yaml")
    plan = hc.open_source("cut.safetensors").header.plan  # type: ignore[union-attr]
    kept = {layer.name: layer.kept_share(9) for layer in plan.layers if not layer.whole}
    assert {name.split(".")[0]: share for name, share in kept.items()} == {"stage2": 1, "stage3": 3}
    # The file can be made again without the recipe.
    recorded = words_of("cut.safetensors")
    assert recorded[recorded.index("--lambda") + 1] == "stage3.*=2,stage2.*=1"
    assert recorded[recorded.index("--input-size") + 1] == "1,28,28"
    assert "small.yaml" not in recorded
    ok("convert", SAMPLE, *recorded, "-o", "again.safetensors")
    assert hc.open_source("again.safetensors").header.plan == plan  # type: ignore[union-attr]


def test_the_command_line_wins_over_the_recipe() -> None:
    Path("small.yaml").write_text("lambda: 2\noutput: a.safetensors\nforce: true\n")
    ok("convert", SAMPLE, "--recipe", "small.yaml", "--lambda", "3", "-o", "b.safetensors")
    assert words_of("b.safetensors") == ["--lambda", "3"]
    assert not Path("a.safetensors").exists()


def test_a_recipe_of_a_training_has_values_of_all_kinds() -> None:
    Path("small.py").write_text(SMALL)
    images = ["--input-size", "1,28,28", "--preprocess", "none"]
    ok("convert", "small.py:make", *images, "--lambda", "2", "--include", "0", "-o", "cut.safetensors")
    Path("training.yaml").write_text(TRAINING)
    ok("finetune", "cut.safetensors", "--trust-code", "--recipe", "training.yaml", "-o", "tuned.safetensors")
    (run,) = read_header("tuned.safetensors").history["training"]
    recipe = run["recipe"]
    assert (recipe["epochs"], recipe["lr"], tuple(recipe["scale"])) == (1, 1e-3, (0.9, 1.0))
    assert recipe["freeze_bn"] is False
    assert run["command"]["words"][:2] == ["--dataset", "sample:mnist5k"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("lamda: 2", 2, "bad.yaml: convert has no option 'lamda': did you mean lambda?"),
        ("epochs: 2", 2, "bad.yaml: convert has no option 'epochs'"),
        ("recipe: other.yaml", 2, "bad.yaml: convert has no option 'recipe'"),
        ("trials: many", 2, "bad.yaml: trials: 'many' is not a valid integer range."),
        ("basis: fourier", 2, "bad.yaml: basis: 'fourier' is not one of 'dct', 'haar', 'gaussian', 'klt'."),
        ("force: maybe", 2, "bad.yaml: force: 'maybe' is not true or false"),
        ("lambda:", 2, "bad.yaml: lambda: no value is not a number or a text"),
        ("lambda: half", 2, "unknown lambda 'half'"),
        ("trials: 3", 2, "--trials works only with --budget"),
        ("lambda: [", 3, "bad.yaml, line 1: not YAML: "),
        ("- lambda", 3, "bad.yaml has no options: write one in each line, such as 'data: photographs/'"),
        ("", 3, "bad.yaml has no options"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(text: str, code: int, message: str) -> None:
    Path("bad.yaml").write_text(text)
    fails(code, message, "convert", SAMPLE, "--recipe", "bad.yaml")


def test_a_missing_recipe_is_refused() -> None:
    fails(3, "no such file: none.yaml does not exist", "finetune", "x.safetensors", "--recipe", "none.yaml")
