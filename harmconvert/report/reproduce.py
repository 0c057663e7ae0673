"""The commands that make a checkpoint again, from what its header says."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ..checkpoint import Header
from ..errors import HarmconvertError
from ..files import short_name
from ..plan import ConvSite, Plan, make_plan, parse_lambda
from ..training.recipe import RECIPES, Recipe

# Options that are not called as their field of the recipe.
_OPTIONS = {"ema": "model-ema-decay", "temperature": "distill-temperature"}

_LONGEST = 200  # letters of a lambda that is still a thing to read


def commands(header: Header, name: str, sites: Sequence[ConvSite]) -> tuple[str, ...]:
    """A shell line for each step; DATA stands for images, of which a file does not say where they lie.

    A lambda is named only where it gives this very plan, and is short; otherwise the plan is, which the report holds.
    """
    if header.source is None:
        return ()
    base = f"{short_name(name)}.safetensors"
    recorded = [entry for entry in header.history.get("training", []) if entry.get("stages")]
    if not header.plan.layers or header.source.sha256 is None:
        return _of_training(header, base)
    first = base if not recorded else "cut.safetensors"
    lines = [shlex.join(["harmconvert", "convert", *_conversion(header, sites), "-o", first])]
    for number, entry in enumerate(recorded):
        last = number == len(recorded) - 1
        output = base if last else f"finetuned-{number + 1}.safetensors"
        words = ["harmconvert", "finetune", first, *_training(entry["recipe"]), "-o", output]
        words += ["--model", header.source.name] if header.source.scheme == "code" else []
        words += ["--num-classes", str(header.source.classes)] if header.source.classes and not number else []
        lines.append(shlex.join(words))
        first = output
    return tuple(lines)


def _conversion(header: Header, sites: Sequence[ConvSite]) -> list[str]:
    source, plan = header.source, header.plan
    assert source is not None
    weights = source.weights or {}
    tagged = source.scheme == "timm" and "tag" in weights and "." not in source.name
    words = [f"{source}.{weights['tag']}" if tagged else str(source)]
    if "architecture" not in source.arguments:  # hubs and folders say theirs themselves
        for key, value in source.arguments.items():
            words += ["--model-kwargs", f"{key}={value}"]
    if "file" in weights and source.scheme != "local-dir":
        words += ["--checkpoint", weights["file"]]
        words += ["--checkpoint-key", weights["key"]] if "key" in weights else []
    if len(plan.policy) <= _LONGEST and _gives(plan, sites):
        words += ["--lambda", plan.policy]
        words += ["--basis", plan.basis] if plan.basis != "dct" else []
        words += ["--normalization", plan.normalization] if plan.normalization != "ortho" else []
    else:
        words += ["--plan", "plan.json"]
    calibration = header.history.get("calibration")
    if calibration:
        settings = calibration.get("settings") or {}
        words += ["--calibrate", "DATA", "--calibration-images", str(calibration["inputs"])]
        words += ["--seed", str(settings["seed"])] if settings.get("seed") else []
        words += ["--damping", str(settings["damping"])] if settings.get("damping") is not None else []
    return words


def _gives(plan: Plan, sites: Sequence[ConvSite]) -> bool:
    """Whether the plan's policy is a lambda, and gives this plan."""
    try:
        return make_plan(sites, parse_lambda(plan.policy), family=plan.family).layers == plan.layers
    except HarmconvertError:
        return False


def _training(recipe: Mapping[str, Any], default: Recipe | None = None) -> list[str]:
    """Options of what differs from the recipe that `finetune` has unasked."""
    default, words = default or Recipe(), ["--data-dir", "DATA"]
    default = replace(default, freeze_bn=default.freeze_bn or recipe.get("distill") == 1)  # as `recipe_named` has it
    for field in fields(Recipe):
        value, usual = recipe.get(field.name), getattr(default, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if field.name == "name" or value is None or value == usual:
            continue
        option = f"--{_OPTIONS.get(field.name, field.name).replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-"))
        elif field.name == "decay_milestones":
            words += [option, ",".join(map(str, value))]
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def _of_training(header: Header, output: str) -> tuple[str, ...]:
    """A network that `train` made from scratch; which layers were asked to be harmonic is not recorded in so many
    words, so that the reader has to say them."""
    runs = header.history.get("training", [])
    if not runs or header.source is None:
        return ()
    recipe = runs[0]["recipe"]
    named = str(recipe.get("name"))
    words = ["harmconvert", "train", str(header.source), "--recipe", named if named in RECIPES else "finetune"]
    return (shlex.join([*words, *_training(recipe, RECIPES.get(named)), "-o", output]),)
