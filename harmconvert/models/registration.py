"""Register the paper's networks with timm after a bare ``import harmconvert``, without importing timm for that.

``timm.create_model("wrn28_10")`` then works, whichever of the two packages is imported first. A program that needs
harmconvert alone (such as ``harmconvert --help``) imports neither timm nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def register_with_timm() -> None:
    """Register the networks now if timm is imported, and otherwise as soon as it is."""
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Finds timm once, as the other finders do, and lets its loader register the networks at the end."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        # find_spec asks every finder: this one must not be asked again.
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # timm is not installed yet
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    for module in ("resnet", "wide_resnet"):
        import_module(f".{module}", __package__)
