"""What the package index and its users get: one version, complete wheels, valid project files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import harmconvert as hc
from harmconvert.cli import main

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    return loaded


def test_the_version_is_in_one_place() -> None:
    assert 'dynamic = ["version"]' in PYPROJECT
    assert 'version = { attr = "harmconvert.__version__" }' in PYPROJECT
    assert not re.search(r'^version = "', PYPROJECT, re.MULTILINE)
    assert CliRunner().invoke(main, ["--version"]).output.split()[-1] == hc.__version__


def test_changelog_and_citation_have_the_version_of_the_package() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == hc.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hc.__version__


def test_changes_are_grouped_as_keep_a_changelog_says() -> None:
    sections = re.findall(r"^### (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_wheel_contains_every_file_of_the_package() -> None:
    """Files that are no Python need a pattern in pyproject.toml; a wheel without the page's template cannot report."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("which files belong to the package is known only in a clone")
    listed = subprocess.run(["git", "ls-files", "harmconvert"], cwd=ROOT, capture_output=True, text=True, check=True)
    table = PYPROJECT.partition("[tool.setuptools.package-data]")[2].partition("\n[")[0]
    patterns = {
        package.strip('"').replace(".", "/"): re.findall(r'"([^"]+)"', globs)
        for package, globs in re.findall(r"^(\S+) = \[(.*)\]$", table, re.MULTILINE)
    }
    included = {
        str(path.relative_to(ROOT)) for package, globs in patterns.items() for glob in globs
        for path in (ROOT / package).glob(glob)
    }  # fmt: skip
    others = {name for name in listed.stdout.split() if not name.endswith(".py")}
    assert len(others) > 5
    assert others <= included


def test_the_workflow_tests_every_python_that_the_package_names() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert workflow()["jobs"]["newest"]["strategy"]["matrix"]["python"] == named
    oldest = re.search(r'^requires-python = ">=(.*)"', PYPROJECT, re.MULTILINE)
    assert oldest is not None
    assert oldest[1] == named[0]


def test_every_make_target_of_the_workflow_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [step.get("run", "") for job in workflow()["jobs"].values() for step in job["steps"]]
    called = {line.split()[1] for line in lines if line.startswith("make ")}
    assert called >= {"test", "test-oldest", "lint"}
    assert called <= targets


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_forms_ask_at_least_one_required_question(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert form["name"]
    assert form["description"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_shell_can_complete_commands_and_options() -> None:
    """The functions of click's completion work through the group's own `main`."""
    for words, expected in (("harmconvert co", "plain,convert"), ("harmconvert convert --lam", "plain,--lambda")):
        environment = {
            "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_HARMCONVERT_COMPLETE": "bash_complete",
        }  # fmt: skip
        result = CliRunner().invoke(main, [], prog_name="harmconvert", env=environment)
        assert expected in result.output.splitlines()


def test_every_extra_is_documented() -> None:
    table = PYPROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = ", table, re.MULTILINE)
    rows = re.findall(r"^\| (`[\w`, ]+`) \|", (ROOT / "docs" / "installation.md").read_text(), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"\w+", row)]
    assert sorted(extras) == sorted(documented)
