"""Record the outputs of the reference implementation: python -m tests.record_reference PATH-OF-ITS-CHECKOUT

The script imports github.com/matej-ulicny/harmonic-networks from a checkout and loads the weights of reference_cases.py
into its networks. It writes their outputs, the names and shapes of their tensors, and their DCT kernels to
data/reference.npz. Run it again only when a case is added.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .reference_cases import CASES, RECORDING, Case, random_tensor


def main(checkout: Path) -> None:
    """Run every case and write the recording."""
    sys.path.insert(0, str(checkout))
    sys.modules["nested_dict"] = _nested_dict()
    arrays: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        shapes, dct, output = _imagenet(case, checkout) if case.module == "imagenet" else _cifar(case, checkout)
        arrays[f"{name}/shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
        arrays[f"{name}/output"] = output.numpy()
        for key, value in dct.items():
            if value.shape[1] > 1:  # the basis is repeated for every channel, or shared by layers of the same size
                key, value = f"{value.shape[1]}", value[:1]
            arrays[f"dct/{key}"] = value.numpy()
        print(name, f"{output.abs().max():.3f}")
    RECORDING.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDING, **arrays)


def _imagenet(case: Case, checkout: Path) -> Any:
    _use_utils_of(checkout / "imagenet")
    model = getattr(import_module("models.resnet"), case.maker)(**case.arguments).eval()
    state = model.state_dict()
    dct = {key: value for key, value in state.items() if key.endswith("dct")}
    drawn = {key: random_tensor(key, tuple(value.shape)) for key, value in state.items() if key not in dct}
    model.load_state_dict({**drawn, **dct})
    with torch.no_grad():
        output = model(case.input())
    return {key: list(value.shape) for key, value in state.items()}, dct, output


def _cifar(case: Case, checkout: Path) -> Any:
    _use_utils_of(checkout / "cifar")
    network, params = import_module(f"models.{case.module}").resnet(**case.arguments)
    dct = {key: value for key, value in params.items() if "dct" in key}
    drawn = {key: random_tensor(key, tuple(value.shape)) for key, value in params.items() if key not in dct}
    with torch.no_grad():
        output = network(case.input(), {**drawn, **dct}, False)
    return {key: list(value.shape) for key, value in drawn.items()}, {}, output


def _use_utils_of(folder: Path) -> None:
    """Remove imported `utils` and `models`: both parts of the checkout have modules with these names."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("utils", "models")]:
        del sys.modules[name]
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).name not in ("imagenet", "cifar"))]


def _nested_dict() -> ModuleType:
    """Return a module with the only function of the package nested_dict that the checkout uses."""

    def items(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in tree.items():
            yield from items(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]

    module = ModuleType("nested_dict")
    module.nested_dict = lambda tree: type("Flat", (), {"items_flat": lambda self: items(tree)})()  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
