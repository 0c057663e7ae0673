"""The commands that make a checkpoint again, computed from its header."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..arguments import parse_lambda
from ..errors import HarmconvertError, counted
from ..files import short_name
from ..network.layers import LayerInfo
from ..plan import Plan, bases_of, make_plan
from ..storage.checkpoint import Header
from ..storage.source import Source
from ..training.recipe import RECIPES, Recipe

# Options whose name differs from the field of the recipe.
OPTION_NAMES = {"ema": "model-ema-decay", "temperature": "distill-temperature"}

_LONGEST = 200  # letters of a lambda; the plan of a longer lambda is read from the checkpoint


@dataclass(frozen=True)
class Reproduction:
    """Shell lines that make a checkpoint again.

    Each line can be run without changes. ``notes``: the steps that no command can repeat.
    """

    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def reproduction(header: Header, checkpoint: str, layers: Sequence[LayerInfo]) -> Reproduction:
    """Return a line for each step that a command did or that follows from the plan.

    The lines write files with new names, because the checkpoint and the files before it usually exist.
    """
    output = _again(checkpoint)
    runs = header.history.get("training", [])
    finetunings = [run for run in runs if run.get("stages")]
    inputs = [_again(_input_of(run, number)) for number, run in enumerate(finetunings)]
    files = [*(_again(f"cut-{short_name(checkpoint)}") if file == output else file for file in inputs), output]
    if runs and runs[0] not in finetunings:
        line, notes = _training(runs[0], header, files[0])
    else:
        line, notes = _conversion(header, files[0], checkpoint, layers)
    lines = [line] if line else []
    for run, before, after in zip(finetunings, files, files[1:], strict=False):
        if run.get("command"):
            lines.append(_line("finetune", before, [*run["command"]["words"], *_recipe(run["recipe"])], after))
        else:
            words = " ".join(_recipe(run["recipe"]))
            notes.append(
                f"{before} was fine-tuned to {after} on images that the file does not name: give them to harmconvert "
                f"finetune with --data" + (f", and {words}" if words else "")
            )
    if lines:
        notes.append("Paths are as they were given. Each command writes a new file.")
    return Reproduction(tuple(lines), tuple(notes))


def commands(header: Header, checkpoint: str, layers: Sequence[LayerInfo]) -> tuple[str, ...]:
    """Return the lines of `reproduction`."""
    return reproduction(header, checkpoint, layers).lines


def _again(file: str) -> str:
    """Return the name of the file that is made again."""
    return f"again-{short_name(file)}.safetensors"


def _input_of(run: Mapping[str, Any], number: int) -> str:
    """Return the file name of the checkpoint with which a fine-tuning began."""
    if run.get("command"):
        return str(run["command"]["source"])
    return f"finetuned-{number}.safetensors" if number else "cut.safetensors"


def _conversion(
    header: Header, file: str, checkpoint: str, layers: Sequence[LayerInfo]
) -> tuple[str | None, list[str]]:
    """Return the line and the notes of the conversion that writes ``file``; ``checkpoint``: that of the report."""
    command, source, calibration = header.history.get("command"), header.source, header.history.get("calibration")
    if command is not None:
        words = list(command["words"])
        if "--plan" in words:  # the plan file may have changed, but the checkpoint contains the plan
            words[words.index("--plan") + 1] = checkpoint
        key = (source.weights or {}).get("key") if source else None
        if key and "--checkpoint" in words and "--checkpoint-key" not in words:  # make the default key explicit
            position = words.index("--checkpoint") + 2
            words[position:position] = ["--checkpoint-key", key]
        text = command["source"]
        return _line("convert", _source_text(source) if source and text == str(source) else text, words, file), []
    if source is None or source.sha256 is None:
        return None, ["The network was converted in Python. The file does not name the weights of the original."]
    words = _source_options(source)
    plan = header.plan
    if len(plan.policy) <= _LONGEST and _is_policy_plan(plan, layers):
        words += ["--lambda", plan.policy]
        basis = bases_of(plan)[0]
        words += ["--basis", basis.name] if basis.name != "dct" else []
        words += ["--normalization", basis.normalization] if basis.normalization != "ortho" else []
    else:
        words += ["--plan", checkpoint]
    notes = []
    if calibration and not _calibrated_by_finetuning(header):
        settings = calibration.get("settings") or {}
        options = ["--calibration-images", str(calibration["inputs"])]
        options += ["--seed", str(settings["seed"])] if settings.get("seed") else []
        options += ["--damping", str(settings["damping"])] if settings.get("damping") is not None else []
        notes.append(
            f"The network was calibrated on {counted(calibration['inputs'], 'input')} that the file does not name: "
            f"give images with --data, and {' '.join(options)}."
        )
    return _line("convert", _source_text(source), words, file), notes


def _calibrated_by_finetuning(header: Header) -> bool:
    """Return whether the first fine-tuning did the calibration, so that its command repeats it."""
    runs = [run for run in header.history.get("training", []) if run.get("stages")]
    return bool(runs) and any(stage["name"] == "calibrated" and stage["evaluation"] for stage in runs[0]["stages"])


def _source_text(source: Source) -> str:
    """Return the source with the tag of its pretrained weights, because timm's default weights change."""
    weights = source.weights or {}
    tagged = source.scheme == "timm" and "tag" in weights and "." not in source.name
    return f"{source}.{weights['tag']}" if tagged else str(source)


def source_words(source: Source) -> list[str]:
    """Return the words that name a network and its weights in a command."""
    return [_source_text(source), *_source_options(source)]


def _source_options(source: Source) -> list[str]:
    words, weights = [], source.weights or {}
    with_config = "config" in source.arguments
    if "architecture" not in source.arguments or with_config:  # timm's repositories contain their own arguments
        for key, value in source.arguments.items():
            words += [] if with_config and key in ("architecture", "config") else ["--model-kwargs", f"{key}={value}"]
    if "file" in weights and source.scheme != "local-dir":
        words += ["--checkpoint", weights["file"]]
        words += ["--checkpoint-key", weights["key"]] if "key" in weights else []
    return words


def _line(command: str, source: str, words: Sequence[str], output: str) -> str:
    return shlex.join(["harmconvert", command, source, *words, "-o", output])


def _is_policy_plan(plan: Plan, layers: Sequence[LayerInfo]) -> bool:
    """Return whether the plan's policy is a lambda that gives exactly this plan."""
    try:
        return make_plan(layers, parse_lambda(plan.policy), basis=bases_of(plan)[0]).layers == plan.layers
    except HarmconvertError:
        return False


def _recipe(recipe: Mapping[str, Any], default: Recipe | None = None) -> list[str]:
    """Return options for the values that differ from ``default``; None: the default recipe of `finetune`."""
    default, words = default or Recipe(), []
    default = replace(default, freeze_bn=default.freeze_bn or recipe.get("distill") == 1)  # the rule of `recipe_named`
    for field in fields(Recipe):
        value, default_value = recipe.get(field.name), getattr(default, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if field.name == "name" or value is None or value == default_value:
            continue
        option = f"--{OPTION_NAMES.get(field.name, field.name).replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        elif field.name == "decay_milestones":
            words += [option, ",".join(map(str, value))]
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _training(run: Mapping[str, Any], header: Header, output: str) -> tuple[str | None, list[str]]:
    """Return the line and the notes of a training from scratch."""
    name = str(run["recipe"].get("name"))
    words = ["--recipe", name if name in RECIPES else "finetune", *_recipe(run["recipe"], RECIPES.get(name))]
    if run.get("command"):
        line = _line("train", run["command"]["source"], [*run["command"]["words"], *words], output)
        return line, []
    source = header.source or "a network that the file does not name"
    return None, [f"{output} was trained from {source}, {' '.join(words)}, on images that the file does not name."]
