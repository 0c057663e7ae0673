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
    """Compare two or more harmonic checkpoints: sizes, recorded accuracies, and differences between the plans.

    >>> import harmconvert as hc
    >>> network = hc.open_source("sample:resnet_mnist5k").model
    >>> comparison = compare(hc.convert(network, 2), hc.convert(network, {"stage3.*": 2}))
    >>> [f"{column.share:.0%}" for column in comparison.columns], comparison.layers["stage1.0.conv1"]
    (['34%', '50%'], ((3, 9), (9, 9)))

    Args:
        models: paths of harmonic checkpoints, requests or harmonic networks.
        all_layers: also list the layers that keep the same number of parts in all checkpoints.
        input_sizes: the size (C, H, W) of each input of one example, on which MACs are counted; default: the sizes that
            the networks declare.
        listener: receives a message for each checkpoint that is read.

    Raises:
        UsageError: there are fewer than two checkpoints, or one is not harmonic.
    """
    check_enough(models)
    for model in models:
        if not is_given(model):
            check_harmonic(text_of(model))
    reports = [report(model, input_sizes=input_sizes, listener=listener).report for model in models]
    return comparison_of(reports, all_layers)
