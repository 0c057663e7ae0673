"""The package as a whole: imports go one way, the public list is short, documents are true."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import harmconvert as hc

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "harmconvert"

# Each may import those before it, and its own folder.
ORDER = [
    "errors", "documents", "files", "arguments", "user_code",
    "kernels", "codecs", "layers", "network", "plan", "calibration", "search", "storage",
    "models", "samples", "data", "metrics", "sources", "training", "deploy", "pipeline", "report", "cli",
]  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Return the folders and modules of the package that a file imports, anywhere in it."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names} - {"__version__"}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("harmconvert"):
            raise AssertionError(f"{path} imports its own package absolutely")
    return found


def sources() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.name not in ("__main__.py",) and p != PACKAGE / "__init__.py"]


def test_every_file_is_listed_in_the_import_order() -> None:
    assert {room(path) for path in sources()} == set(ORDER)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    position = ORDER.index(room(path))
    own = {room(path)} if path.parent != PACKAGE else set()
    assert imports_of(path) <= set(ORDER[:position]) | own


# Folders that are imported at start, and the folder of commands.
LIGHT = {"cli", "models"}
FOLDERS = [name for name in ORDER if (PACKAGE / name / "__init__.py").is_file() and name not in LIGHT]


def names_from(node: ast.AST, folder: str) -> list[str]:
    """Return the names that a statement imports from a file inside a folder of the package."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(f"harmconvert.{folder}."):
        return []
    return [f"{node.module}.{alias.name}" for alias in node.names]


@cache
def users() -> list[tuple[Path, list[ast.AST]]]:
    """Return all files of tests and benchmarks, with their import statements."""
    paths = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    return [
        (path, [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]) for path in paths
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_tests_and_benchmarks_import_only_from_folders(folder: str) -> None:
    """They import names from the folder and not from a file in it, so that names can move between files."""
    module = importlib.import_module(f"harmconvert.{folder}")
    names = getattr(module, "__all__", [])
    assert [*names] == sorted(set(names), key=lambda n: (not n.isupper(), n[0].islower(), n))
    assert not [name for name in names if name.startswith("_") or not hasattr(module, name)]
    for path, nodes in users():
        for node in nodes:
            deep = [name for name in names_from(node, folder) if name.rpartition(".")[2] in names]
            assert not deep, f"{path.name}: harmconvert.{folder} has {deep}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_a_folder_import_one_another_directly(folder: str) -> None:
    """A file that imports the ``__init__`` of its own folder would be half of an import cycle."""
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and not node.module:
                above = path.parents[node.level - 1]
                for alias in node.names:
                    if alias.name == "__version__":
                        continue
                    assert list(above.glob(f"{alias.name}*")), f"{path}: {alias.name} is no file of {above.name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "over 400 lines a file is asking to be two"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            body = (
                node.end_lineno - node.body[0].end_lineno if ast.get_docstring(node) else node.end_lineno - node.lineno
            )
            assert body <= 60, f"{node.name} has {body} lines"


# These modules print commands for readers of a report or a card, so they must name options.
WRITES_COMMANDS = {PACKAGE / "report" / name for name in ("reproduce.py", "card.py", "next_steps.py")}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def test_the_library_names_no_option_of_the_command_line() -> None:
    """A message names an argument (`harmconvert.errors.Argument`); the command line has the option for it."""
    for path in sources():
        if room(path) == "cli" or path in WRITES_COMMANDS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = set(FLAG.findall(node.value)) - {"--help"}
                assert not named, f"{path.relative_to(PACKAGE)}:{node.lineno} names {named}"


def test_the_public_names_are_those_of_the_list() -> None:
    assert hc.__all__ == sorted(hc.__all__, key=lambda n: (n.islower(), n))
    for name in hc.__all__:
        value = getattr(hc, name)
        assert value.__doc__, name
        assert value.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hc.nothing


@pytest.mark.slow
def test_functions_keep_their_names_when_their_modules_are_imported() -> None:
    code = "import harmconvert.pipeline.convert, harmconvert as hc; assert callable(hc.convert) and callable(hc.verify)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_benchmarks_name_their_command_and_machine() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert script.name in text, script.name
        assert ast.get_docstring(ast.parse(script.read_text())), script.name


def test_the_sample_is_small_and_has_a_readme() -> None:
    folder = PACKAGE / "samples"
    assert (folder / "resnet_mnist5k.safetensors").stat().st_size < 1.5e6
    card = (folder / "README.md").read_text()
    for word in ("Apache-2.0", "harmconvert train", "held back", "CC BY-SA 3.0"):
        assert word in card, word


def test_every_dependency_has_an_oldest_version_that_is_tested() -> None:
    """`make test-oldest` installs these versions."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listed
    names = re.findall(r'^ *"(\w+)', listed[1], re.MULTILINE)
    dry = subprocess.run(["make", "-n", "-B", "test-oldest"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"(\w+)==[0-9.]+", dry.stdout)) == set(names) >= {"torch", "timm", "numpy"}


def test_tests_named_in_documents_exist() -> None:
    text = (ROOT / "tests" / "faults" / "README.md").read_text()
    named = set(re.findall(r"::(test_\w+)", text))
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert named
    assert named <= there
