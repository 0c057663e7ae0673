"""Replace a function of the package by a test's own function, in every module that uses it."""

from __future__ import annotations

import sys
from typing import Any

import pytest


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, original: Any, replacement: Any) -> None:
    """Replace ``original`` in each module of the package that has imported it.

    So a test need not know which modules import it.
    """
    found = 0
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "harmconvert"]:
        for name in [name for name, value in vars(module).items() if value is original]:
            monkeypatch.setattr(module, name, replacement)
            found += 1
    assert found, f"no module of the package holds {original}"
