"""compare(): harmonic checkpoints side by side."""

from __future__ import annotations

from ..arguments import check_harmonic
from ..pipeline.inputs import Sizes
from ..pipeline.listener import SILENT, Listener
from ..pipeline.networks import Openable, is_given, text_of
from .comparison import Comparison, check_enough, comparison_of
from .report import report


def compare(
    *models: Openable, all_layers: bool = False, input_sizes: Sizes = (), listener: Listener = SILENT
) -> Comparison:
    """Compare two harmonic checkpoints or more: sizes, accuracies as they are recorded, and where the plans differ.

    >>> import harmconvert as hc
    >>> network = hc.open_source("sample:resnet_mnist5k").model
    >>> found = compare(hc.convert(network, 2), hc.convert(network, {"stage3.*": 2}))
    >>> [f"{column.share:.0%}" for column in found.columns], found.layers["stage1.0.conv1"]
    (['34%', '50%'], ((3, 9), (9, 9)))

    Args:
        models: paths of harmonic checkpoints, requests or harmonic networks.
        all_layers: show layers of which all keep as much, too.
        input_sizes: of each input of one example, (C, H, W), to count MACs on; default: the networks' own.
        listener: is told what is read.

    Raises:
        UsageError: fewer than two, or one that is not harmonic.
    """
    check_enough(models)
    for model in models:
        if not is_given(model):
            check_harmonic(text_of(model))
    reports = [report(model, input_sizes=input_sizes, listener=listener).report for model in models]
    return comparison_of(reports, all_layers)
