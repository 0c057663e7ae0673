"""harmconvert: pretrained CNNs to harmonic form, exactly or with the high frequencies cut away.

>>> import harmconvert as hc
>>> network = hc.open_source("sample:resnet_mnist5k").model
>>> conversion = hc.convert(network, lam="progressive")
>>> hc.verify(network, conversion.model).as_planned
True
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .models.registration import register_with_timm as _register_with_timm

if TYPE_CHECKING:
    from .calibration import CalibrationSettings, reestimate_batch_norm
    from .data.datasets import DataRequest
    from .errors import HarmconvertError
    from .layers.block import HarmonicBlock2d
    from .network.forms import factor, fuse
    from .pipeline.benchmark import benchmark
    from .pipeline.convert import Conversion, convert
    from .pipeline.convert_to_file import convert_to_file
    from .pipeline.evaluate import evaluate
    from .pipeline.export import export
    from .pipeline.finetune import finetune
    from .pipeline.inspect import inspect
    from .pipeline.listener import Listener
    from .pipeline.saving import save
    from .pipeline.train import train
    from .pipeline.verification import Verification
    from .pipeline.verify import verify
    from .plan.plan import Plan
    from .report.compare import compare
    from .report.figure import TradeoffSettings, figure
    from .report.push import push
    from .report.report import report
    from .sources.opening import load, open_source
    from .sources.request import SourceRequest
    from .training.recipe import Recipe

__version__ = "0.2.0"

__all__ = [
    "CalibrationSettings",
    "Conversion",
    "DataRequest",
    "HarmconvertError",
    "HarmonicBlock2d",
    "Listener",
    "Plan",
    "Recipe",
    "SourceRequest",
    "TradeoffSettings",
    "Verification",
    "benchmark",
    "compare",
    "convert",
    "convert_to_file",
    "evaluate",
    "export",
    "factor",
    "figure",
    "finetune",
    "fuse",
    "inspect",
    "load",
    "open_source",
    "push",
    "reestimate_batch_norm",
    "report",
    "save",
    "train",
    "verify",
]

_HOME = {
    "CalibrationSettings": "calibration",
    "Conversion": "pipeline.convert",
    "DataRequest": "data.datasets",
    "HarmconvertError": "errors",
    "HarmonicBlock2d": "layers.block",
    "Listener": "pipeline.listener",
    "Plan": "plan.plan",
    "Recipe": "training.recipe",
    "SourceRequest": "sources.request",
    "TradeoffSettings": "report.figure",
    "Verification": "pipeline.verification",
    "benchmark": "pipeline.benchmark",
    "compare": "report.compare",
    "convert": "pipeline.convert",
    "convert_to_file": "pipeline.convert_to_file",
    "evaluate": "pipeline.evaluate",
    "export": "pipeline.export",
    "factor": "network.forms",
    "figure": "report.figure",
    "finetune": "pipeline.finetune",
    "fuse": "network.forms",
    "inspect": "pipeline.inspect",
    "load": "sources.opening",
    "open_source": "sources.opening",
    "push": "report.push",
    "reestimate_batch_norm": "calibration",
    "report": "report.report",
    "save": "pipeline.saving",
    "train": "pipeline.train",
    "verify": "pipeline.verify",
}


class _Package(ModuleType):
    """Names are fetched when first used, so that `harmconvert --help` need not wait for torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing harmconvert.convert would bind the module over the function of that name.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
_register_with_timm()
