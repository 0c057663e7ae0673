"""The commands that make a checkpoint again, from what its header says."""

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

# Options that are not called as their field of the recipe.
OPTION_NAMES = {"ema": "model-ema-decay", "temperature": "distill-temperature"}

_LONGEST = 200  # letters of a lambda that is still a thing to read


@dataclass(frozen=True)
class Reproduction:
    """Shell lines that make a checkpoint again, each of which runs as it is, and in words what no line can say."""

    lines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def reproduction(header: Header, name: str, layers: Sequence[LayerInfo]) -> Reproduction:
    """A line for each step that the command line did, or that follows from the plan."""
    output = f"{short_name(name)}.safetensors"
    runs = header.history.get("training", [])
    tuned = [run for run in runs if run.get("stages")]
    names = [_input_of(run, number) for number, run in enumerate(tuned)] + [output]
    names = [f"cut-{name}" if name == output and number < len(tuned) else name for number, name in enumerate(names)]
    if runs and runs[0] not in tuned:
        line, notes = _of_training(runs[0], header, names[0])
    else:
        line, notes = _of_conversion(header, names[0], output, layers)
    lines = [line] if line else []
    for run, first, then in zip(tuned, names, names[1:], strict=False):
        if run.get("command"):
            lines.append(_line("finetune", first, [*run["command"]["words"], *_recipe(run["recipe"])], then))
        else:
            words = " ".join(_recipe(run["recipe"]))
            notes.append(
                f"{first} was fine-tuned to {then} on images that the file does not name: give them to harmconvert "
                f"finetune with --data-dir" + (f", and {words}" if words else "")
            )
    if lines:
        notes.append("Paths are as they were given. A file that exists is replaced with --force only.")
    return Reproduction(tuple(lines), tuple(notes))


def commands(header: Header, name: str, layers: Sequence[LayerInfo]) -> tuple[str, ...]:
    """The lines of `reproduction`."""
    return reproduction(header, name, layers).lines


def _input_of(run: Mapping[str, Any], number: int) -> str:
    """What the checkpoint was called that a fine-tuning began with."""
    if run.get("command"):
        return str(run["command"]["source"])
    return f"finetuned-{number}.safetensors" if number else "cut.safetensors"


def _of_conversion(
    header: Header, first: str, output: str, layers: Sequence[LayerInfo]
) -> tuple[str | None, list[str]]:
    command, source, calibration = header.history.get("command"), header.source, header.history.get("calibration")
    if command is not None:
        words = list(command["words"])
        if "--plan" in words:  # that file may have changed: this one holds the plan
            words[words.index("--plan") + 1] = output
            first = f"again-{output}" if first == output else first
        given, key = command["source"], (source.weights or {}).get("key") if source else None
        if key and "--checkpoint" in words and "--checkpoint-key" not in words:  # which weights were taken unasked
            place = words.index("--checkpoint") + 2
            words[place:place] = ["--checkpoint-key", key]
        return _line("convert", _source_text(source) if source and given == str(source) else given, words, first), []
    if source is None or source.sha256 is None:
        return None, ["It was converted in Python from a network whose weights the file does not name."]
    words = _from_source(source)
    plan = header.plan
    if len(plan.policy) <= _LONGEST and _gives(plan, layers):
        words += ["--lambda", plan.policy]
        basis = bases_of(plan)[0]
        words += ["--basis", basis.name] if basis.name != "dct" else []
        words += ["--normalization", basis.normalization] if basis.normalization != "ortho" else []
    else:
        words += ["--plan", output]
        first = f"again-{output}" if first == output else first
    notes = []
    if calibration and not _by_finetuning(header):
        settings = calibration.get("settings") or {}
        options = ["--calibration-images", str(calibration["inputs"])]
        options += ["--seed", str(settings["seed"])] if settings.get("seed") else []
        options += ["--damping", str(settings["damping"])] if settings.get("damping") is not None else []
        notes.append(
            f"It was calibrated on {counted(calibration['inputs'], 'input')} that the file does not name: give images "
            f"with --calibrate, and {' '.join(options)}."
        )
    return _line("convert", _source_text(source), words, first), notes


def _by_finetuning(header: Header) -> bool:
    """Whether the first fine-tuning calibrated, which it does again."""
    runs = [run for run in header.history.get("training", []) if run.get("stages")]
    return bool(runs) and any(stage["name"] == "calibrated" and stage["evaluation"] for stage in runs[0]["stages"])


def _source_text(source: Source) -> str:
    """The source with the tag of its pretrained weights: timm's defaults change."""
    weights = source.weights or {}
    tagged = source.scheme == "timm" and "tag" in weights and "." not in source.name
    return f"{source}.{weights['tag']}" if tagged else str(source)


def _from_source(source: Source) -> list[str]:
    words, weights = [], source.weights or {}
    if "architecture" not in source.arguments:  # hubs and folders say theirs themselves
        for key, value in source.arguments.items():
            words += ["--model-kwargs", f"{key}={value}"]
    if "file" in weights and source.scheme != "local-dir":
        words += ["--checkpoint", weights["file"]]
        words += ["--checkpoint-key", weights["key"]] if "key" in weights else []
    return words


def _line(command: str, source: str, words: Sequence[str], output: str) -> str:
    return shlex.join(["harmconvert", command, source, *words, "-o", output])


def _gives(plan: Plan, layers: Sequence[LayerInfo]) -> bool:
    """Whether the plan's policy is a lambda, and gives this plan."""
    try:
        return make_plan(layers, parse_lambda(plan.policy), basis=bases_of(plan)[0]).layers == plan.layers
    except HarmconvertError:
        return False


def _recipe(recipe: Mapping[str, Any], default: Recipe | None = None) -> list[str]:
    """Options of what differs from the recipe that `finetune` has unasked."""
    default, words = default or Recipe(), []
    default = replace(default, freeze_bn=default.freeze_bn or recipe.get("distill") == 1)  # as `recipe_named` has it
    for field in fields(Recipe):
        value, usual = recipe.get(field.name), getattr(default, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if field.name == "name" or value is None or value == usual:
            continue
        option = f"--{OPTION_NAMES.get(field.name, field.name).replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        elif field.name == "decay_milestones":
            words += [option, ",".join(map(str, value))]
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _of_training(run: Mapping[str, Any], header: Header, output: str) -> tuple[str | None, list[str]]:
    """A network that `train` made from scratch."""
    named = str(run["recipe"].get("name"))
    words = ["--recipe", named if named in RECIPES else "finetune", *_recipe(run["recipe"], RECIPES.get(named))]
    if run.get("command"):
        line = _line("train", run["command"]["source"], [*run["command"]["words"], *words], output)
        return line, []
    source = header.source or "a network that the file does not name"
    return None, [f"{output} was trained from {source}, {' '.join(words)}, on images that the file does not name."]
