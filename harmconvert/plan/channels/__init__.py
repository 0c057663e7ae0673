"""The channel axis: the rank of a layer's weight, as a map from the responses of its inputs to its outputs.

What belongs here: what a layer keeps on this axis, the setting from which a plan is made, and the cost. What does not:
the mathematics (`kernels.ranks`), the layers (`layers.ranked`), and the fit to data (`calibration`).
"""

from .axis import ChannelAxis
from .ranks import Rank, RankSetting

__all__ = ["ChannelAxis", "Rank", "RankSetting"]
