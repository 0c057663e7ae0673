"""Networks of the reference implementation with weights from a seed, so that only their outputs need to be recorded.

record_reference.py runs that implementation. test_reference.py reads the recording and does not need it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RECORDING = Path(__file__).parent / "data" / "reference.npz"


@dataclass(frozen=True)
class Case:
    """A network of the reference implementation: its module, function and arguments, the input, and our equivalent.

    ``kept`` is the set of numbers of frequencies in its merged layers.
    """

    module: str
    arguments: Mapping[str, Any]
    size: int
    architecture: str
    kept: frozenset[int] = frozenset()
    pool: str | None = None
    maker: str = "resnet"
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def input(self) -> Tensor:
        """Return two images."""
        return normal((2, 3, self.size, self.size), "input")


def _imagenet(maker: str, architecture: str, kept: set[int], pool: str | None = None, **arguments: Any) -> Case:
    return Case("imagenet", {"pool": pool, **arguments}, 64, architecture, frozenset(kept), pool, maker)


def _cifar(module: str, depth: int, width: int, classes: int, architecture: str, kept: set[int], **level: int) -> Case:
    arguments = {"depth": depth, "width": width, "num_classes": classes, "dropout": 0.3, **level}
    return Case(module, arguments, 32, architecture, frozenset(kept))


CASES = {
    "harm_resnet50": _imagenet("resnet50", "resnet50_nomaxpool", {9}, harm_root=True, harm_res_blocks=True),
    "harm_resnet50_progressive_avg": _imagenet(
        "resnet50", "resnet50_nomaxpool", {9, 6, 3}, "avg",
        harm_root=True, harm_res_blocks=True, levels=[None, None, 3, 2], num_classes=12,
    ),
    "harm1_resnet50_max": _imagenet(
        "resnet50", "resnet50.tv_in1k", set(), "max", harm_root=True, harm_res_blocks=False, num_classes=12
    ),
    "resnet50_harm_blocks": _imagenet(
        "resnet50", "resnet50_nomaxpool", {8, 6, 3, 1},
        harm_root=False, harm_res_blocks=True, levels=[4, 3, 2, 1], num_classes=12,
    ),
    "harm_wrn10_1": _cifar("harm_wrn", 10, 1, 10, "wrn", {9}),
    "harm_wrn16_4_lambda3": _cifar("harm_wrn", 16, 4, 100, "wrn16_4", {6}, level=3),
    "harm_wrn10_2_lambda2": _cifar("harm_wrn", 10, 2, 10, "wrn", {3}, level=2),
    "harm1_wrn10_1": _cifar("harm1_wrn", 10, 1, 10, "wrn", set()),
    "harm_wrn22_1_progressive": _cifar("harm_wrn_progrlambda", 22, 1, 7, "wrn22_1", {9, 6, 3}),
    "wrn10_2": _cifar("wrn", 10, 2, 10, "wrn", set()),
}  # fmt: skip


def normal(shape: tuple[int, ...], name: str) -> Tensor:
    """Return normal numbers that depend only on the name; RandomState gives the same in every version of numpy."""
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(draw, np.float32))


def random_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor for a key of a state dict, scaled so that the activations of deep networks stay moderate."""
    last = key.split(".")[-1]
    if last == "num_batches_tracked":
        return torch.tensor(7)
    drawn = normal(shape, key)
    if last == "running_var":
        # On photographs, responses to high frequencies vary so little that the eps of their batch norm matters.
        return drawn.abs() * 1e-2 + 1e-4 if key.startswith("harm") else drawn.abs() * 0.3 + 0.7
    if len(shape) == 1:
        return drawn * 0.1 + 0.8 if last == "weight" else drawn * 0.03
    return drawn * (2 / drawn[0].numel()) ** 0.5 * (3 if len(shape) == 5 else 1)
