from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings

from harmconvert.deploy import benchmark
from harmconvert.samples import SAMPLES, mnist5k_held_back

# For two cores: one process with two threads, or (pytest-xdist) two processes with one thread each; the same for child
# processes. With more threads than cores, threads wait long for one another.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# Hypothesis uses the same examples in every run, and no test fails because of its time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _no_hub() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use an empty cache for times of layers and the compiled kernel, separate from the user's cache."""
    os.environ["HARMCONVERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _few_images_to_verify_on() -> Iterator[None]:
    """Let commands verify the sample network on one image of each digit instead of five: a third of the time."""
    sample = SAMPLES["resnet_mnist5k"]
    SAMPLES["resnet_mnist5k"] = replace(sample, images=lambda: mnist5k_held_back()[0][::100])
    yield
    SAMPLES["resnet_mnist5k"] = sample


@pytest.fixture(autouse=True, scope="session")
def _times_need_not_be_exact() -> None:
    """Time runs at once, without waiting until the threads of other runtimes are at rest."""
    benchmark.SETTLING = 0.0


@pytest.fixture(autouse=True, scope="session")
def _operators_of_onnx_are_read_once() -> Iterator[None]:
    """Keep what torch.onnx reads in each export, its table of operators: a second for each of many exports."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the import takes longer than one export
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = ONNXRegistry.from_torchlib.__func__
    tables: dict[Any, ONNXRegistry] = {}

    def from_torchlib(cls: type[ONNXRegistry], *version: Any, **named: Any) -> ONNXRegistry:
        key = (version, *named.items())
        if key not in tables:
            tables[key] = read(cls, *version, **named)
        table = copy.copy(tables[key])
        table.functions = {operator: list(ways) for operator, ways in table.functions.items()}
        return table

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)
    yield
    ONNXRegistry.from_torchlib = classmethod(read)
