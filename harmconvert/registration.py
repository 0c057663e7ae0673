"""The paper's networks in timm's registry after a bare ``import harmconvert``, without importing timm for it.

``timm.create_model("wrn28_10")`` works whichever of the two was imported first; who imports only harmconvert (such as
``harmconvert --help``) waits for neither timm nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def register_with_timm() -> None:
    """Register the networks now if timm is there already, else as soon as it is imported."""
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Waits for the import of timm, lets the other finders find it, and has its loader followed by ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        # Out of the way first: find_spec asks every finder, and this one would ask again without end.
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # not installed, yet
            return None
        spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads timm as its own loader does, then registers the networks."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Others ask a module for its loader (for files that lie beside it): they should find the true one.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()


def _register() -> None:
    # Where harmconvert.models is what imports timm, this finds it half imported, and it registers when it goes on.
    import_module(".models", __package__)
