"""Messages name only options that exist: those of the command that shows the message, or of a command that it names."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest

from harmconvert.cli import COMMANDS, main
from harmconvert.cli.advice import OPTION, adapted, fitting, option_of, options_of
from harmconvert.errors import Argument, InputError, Message, UsageError

from .commands import run

PACKAGE = Path(__file__).resolve().parents[1] / "harmconvert"
# This module prints whole commands, so each option follows the command that has it.
WRITES_COMMANDS = PACKAGE / "report" / "reproduce.py"


def commands() -> dict[str, click.Command]:
    return {name: command for name in COMMANDS if (command := main.get_command(click.Context(main), name))}


OPTIONS = {name: options_of(command) for name, command in commands().items()}


def texts_of(path: Path) -> Iterator[str]:
    """Yield every string of a file except docstrings; in an f-string, VALUE replaces each value."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    skipped = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and node.body
               and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values]
            skipped |= {id(part) for part in node.values}
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


def foreign(text: str, command: str) -> set[str]:
    """Return the options in a text that belong neither to the command nor to a command that the text names before."""
    wrong = set()
    for match in OPTION.finditer(text):
        words = re.findall(r"\w+", text[: match.start()])
        owners = {command, *(word for word in words[-1:] if word in OPTIONS)}
        owners |= set(re.findall(r"\bharmconvert (\w+) ", text[: match.start()]))
        if not any(match[0] in OPTIONS.get(owner, ()) for owner in owners):
            wrong.add(match[0])
    return wrong


MESSAGES = sorted(
    text for path in PACKAGE.rglob("*.py") if path != WRITES_COMMANDS for text in texts_of(path) if OPTION.search(text)
)


def arguments_of(path: Path) -> Iterator[str]:
    """The names of all arguments that messages in a file name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Argument":
            yield str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else ast.unparse(node.args[0])


# One is computed: the key of a mean or a deviation.
ARGUMENTS = {name for path in PACKAGE.rglob("*.py") for name in arguments_of(path)} - {"key"} | {"mean", "std"}


def test_every_argument_that_a_message_names_has_an_option() -> None:
    known = set().union(*OPTIONS.values())
    assert len(ARGUMENTS) > 40
    for name in ARGUMENTS:
        options = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", option_of(Argument(name)))
        assert options, name
        assert set(options) <= known, name


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_is_named_by_an_option_that_the_command_or_its_owner_has(name: str) -> None:
    for argument in sorted(ARGUMENTS):
        text = fitting(f"give {option_of(Argument(argument, 'VALUE'))} for it", name, OPTIONS)
        assert not foreign(text, name), text


def test_a_message_of_the_library_is_told_in_the_words_of_the_command_that_runs() -> None:
    text = Message("a exists: use ", Argument("force", True), " or ", Argument("example_input"), " and ",
                   Argument("arguments", {"num_classes": 3}), ", force=True itself")  # fmt: skip
    assert text == "a exists: use force=True or example_input and arguments={'num_classes': 3}, force=True itself"
    told = "a exists: use --force or --input-size C,H,W and --model-kwargs num_classes=3, force=True itself"
    assert adapted(text, "convert") == told
    assert adapted(str(text), "convert") == text, "a text of a user's is not looked at"
    assert adapted(Message("name it with ", Argument("teacher", "SOURCE")), "evaluate") == (
        "name it with finetune --teacher SOURCE"
    )


def test_parts_of_a_message_survive_what_is_done_to_messages() -> None:
    argument = Argument("force", True)
    inner = UsageError("a exists: use ", argument)
    outer = InputError("b: ", inner.message, "; or leave it")
    for error in (outer, pickle.loads(pickle.dumps(outer)), copy.deepcopy(outer)):
        assert str(error) == "b: a exists: use force=True; or leave it"
        assert error.message.parts == ("b: ", "a exists: use ", argument, "; or leave it")
    assert json.loads(json.dumps({"why": inner.message})) == {"why": "a exists: use force=True"}


def test_every_option_that_the_package_names_exists() -> None:
    known = set().union(*OPTIONS.values())
    assert len(MESSAGES) > 100
    for text in MESSAGES:
        assert set(OPTION.findall(text)) <= known | {"--help"}, text


@pytest.mark.parametrize("name", COMMANDS)
def test_messages_of_a_command_name_only_options_that_it_has(name: str) -> None:
    for text in MESSAGES:
        assert foreign(fitting(text, name, OPTIONS), name) <= {"--help"}, text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_only_options_that_it_has(name: str) -> None:
    command = commands()[name]
    helps = [parameter.help or "" for parameter in command.params if isinstance(parameter, click.Option)]
    for text in (*texts_of(PACKAGE / "cli" / f"{name}.py"), command.help or "", *helps):
        assert foreign(text, name) <= {"--nproc-per-node"}, text  # an option of torchrun


def test_a_message_names_an_option_of_another_command_together_with_that_command() -> None:
    options = {"convert": {"--checkpoint", "--input-size"}, "train": {"--img-size"}, "compare": {"--json"}}
    text = "give --input-size C,H,W, and the weights with --checkpoint FILE (--jsonl is nobody's)"
    assert fitting(text, "convert", options) == text
    assert fitting(text, "train", options) == (
        "give --img-size SIZE, and the weights with convert --checkpoint FILE (--jsonl is nobody's)"
    )
    behind = "make one with: harmconvert convert NET --checkpoint FILE"
    assert fitting(behind, "compare", options) == behind


def test_the_message_for_a_network_without_a_size_names_an_existing_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    for name in ("evaluate", "train", "benchmark"):
        data = [] if name == "benchmark" else ["--dataset", "sample:mnist5k"]
        result = run(name, "net.py:make", *data)
        assert result.exit_code == 2
        named = OPTION.findall(result.stderr)
        assert named, result.stderr
        assert set(named) <= OPTIONS[name], result.stderr


COUNTED = re.compile(
    r"^ (?:other |test |training |calibration )?(images|layers|inputs|epochs|steps|batches|threads|convolutions|"
    r"classes|processes|frequencies|channels|axes|numbers|parts|positions|plans|tensors|outputs|networks|files)\b(?!/s)"
)
ALWAYS_SEVERAL = {
    "samples",
    "self.images",
    "len(sizes)",
    "source.classes or source.arguments.get('num_classes')",
    "step.images",
    "world_size()",
    "REPLACEMENTS",
    "shapes",
    "channels",
}


def test_messages_use_the_singular_for_one() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            values = node.values if isinstance(node, ast.JoinedStr) else []
            for number, behind in pairwise(values):
                if isinstance(number, ast.FormattedValue) and isinstance(behind, ast.Constant):
                    plural = COUNTED.search(str(behind.value))
                    allowed = not plural or ast.unparse(number.value) in ALWAYS_SEVERAL
                    assert allowed, f"{path.name}:{node.lineno}: use counted(): {ast.unparse(node)}"
