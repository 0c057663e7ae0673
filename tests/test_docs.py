"""README and the pages of docs/: every command and every block of Python runs here, or says why it cannot."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

import harmconvert as hc
from harmconvert.cli import COMMANDS, main

from .commands import ok

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (not run|file|output): ([^\n]+) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
LANGUAGES = ("console", "sh", "python", "text", "yaml")


@dataclass(frozen=True)
class Block:
    """A block of code.

    ``mark``: 'not run' with a reason in ``text``, 'file' with its name, or 'output' for what the block above prints.
    """

    mark: str
    text: str
    language: str
    code: str


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    found = [Block(*(part or "" for part in match)) for match in FENCE.findall(page.read_text())]
    return tuple(block for block in found if block.language in LANGUAGES)


def test_the_blocks_of_a_page_are_found() -> None:
    page = blocks(DOCS / "index.md")
    assert [(block.mark, block.language) for block in page] == [("", "console"), ("not run", "console"), ("", "python")]
    assert [words[0] for words, _ in commands(page[0])] == ["inspect", "convert", "verify", "export"]


def lines(block: Block) -> list[tuple[str, list[str]]]:
    """Return each line of commands with the lines of its output. In `console`, commands begin with a dollar sign."""
    found: list[tuple[str, list[str]]] = []
    for line in filter(str.strip, block.code.replace("\\\n", " ").splitlines()):
        if block.language == "console" and not line.startswith("$ "):
            found[-1][1].append(line)
        elif block.language in ("console", "sh"):
            found.append((line.removeprefix("$ "), []))
    return found


def commands(block: Block) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the words of each harmconvert command of a block, and the lines of its output."""
    for line, output in lines(block):
        words = shlex.split(line, comments=True)
        if "harmconvert" in words and words[0] in ("harmconvert", "torchrun"):
            yield words[words.index("harmconvert") + 1 :], output


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_name_commands_and_options_that_exist(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.mark == "file":  # a recipe file is read before the other options
            Path(block.text).write_text(block.code)
        for words, _ in commands(block):
            command = main.get_command(click.Context(main), words[0])
            assert command is not None, words
            command.make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_that_are_no_commands_of_harmconvert_say_that_they_are_not_run(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("console", "sh") and block.mark != "not run":
            assert len(lines(block)) == len(list(commands(block))), block.code


# The pages that take more than about ten seconds.
SLOW = {
    "docs/index.md", "docs/how-to/read-the-report.md", "docs/how-to/recipes.md", "docs/tutorials/byte-budget.md",
    "docs/tutorials/calibrate.md", "docs/tutorials/deploy.md",
}  # fmt: skip
RUNNABLE = [
    pytest.param(page, id=page_name(page), marks=[pytest.mark.slow] if page_name(page) in SLOW else [])
    for page in PAGES
    if any(block.mark != "not run" and block.language != "text" for block in blocks(page))
]


@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in re.findall(r"(?:^import |--format )(onnx|openvino)", page.read_text(), re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    values: dict[str, Any] = {}
    for block in blocks(page):
        if block.mark == "not run":
            continue
        if block.mark == "file":
            Path(block.text).write_text(block.code)
        elif block.mark == "output":
            assert capsys.readouterr().out == block.code
        elif block.language == "python":
            exec(compile(block.code, page_name(page), "exec"), values)
        for words, output in commands(block):
            printed = ok(*words).stdout.splitlines()
            assert set(output) <= set(printed), printed
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
)
def test_links_to_files_of_the_repository_lead_somewhere(name: str) -> None:
    """mkdocs checks the links between the pages of docs/."""
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_site_has_every_page() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_reference_lists_every_public_name_and_the_command_line() -> None:
    listed = re.findall(r"^::: harmconvert\.[\w.]+\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(hc.__all__)
    assert ":module: harmconvert.cli" in (DOCS / "reference" / "commands.md").read_text()


def test_the_readme_is_short_and_names_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500
    for name in COMMANDS:
        assert f"`{name}`" in text, name


def script(name: str) -> ModuleType:
    """Import a script of docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_results_say() -> None:
    tables = script("tables")
    used = []
    for page in tables.PAGES:
        text = page.read_text()
        used += [match[1] for match in tables.BLOCK.findall(text)]
        assert tables.updated(text) == text, f"run docs/tables.py: {page.name} is stale"
    assert sorted(used) == sorted(tables.TABLES)


def test_every_picture_is_drawn_and_used(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = script("pictures")
    assert {path.stem for path in (DOCS / "images").iterdir()} == set(pictures.PICTURES)
    used = set(re.findall(r"images/([\w-]+)\.svg", "".join(page.read_text() for page in PAGES)))
    assert used == set(pictures.PICTURES)
    for name in pictures.PICTURES:
        assert pictures.draw(name, tmp_path).stat().st_size > 5000


def test_the_site_is_strict() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["strict"] is True
