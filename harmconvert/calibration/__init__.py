"""Data-aware refit of a converted network, layer after layer, from unlabelled inputs.

What belongs here: what is learnt from inputs about layers, and the least squares that use it. No labels and no training
(`training`); which frequencies a layer keeps is decided elsewhere (`plan`, `search`).

From the whole to the parts: calibrating.py, the network; refit.py, one layer after the other; layers.py, one layer's
kernel and the choice of a solution; equations.py and solvers.py, the least squares; cuts.py, those of all cuts of a
layer at once; responses.py, DCT responses; capture.py, running a network up to a layer; holding.py, going on from
there; repeating.py, whether runs repeat; reading.py and inputs.py, what loaders yield and the calibration set;
layout.py, the memory format of inputs; limits.py, the memory that is left on this machine.
"""

from .batch_norm import reestimate_batch_norm
from .calibrating import Known, blend, calibrate, digests, never_worse
from .capture import ConvCall, watch_convolutions
from .cuts import WholeLayer, whole_layers
from .divergence import Divergence
from .equations import Change, Problem
from .holding import Forwards
from .inputs import HELD_BACK, Batch, CalibrationSet, calibration_set
from .layers import Kernel, RefitError, choose
from .layout import laid_out
from .limits import memory_for
from .moments import Moments, response_moments
from .reading import Reader, items
from .records import ENOUGH_POSITIONS, Calibration, CalibrationSettings, LayerCalibration, Progress
from .refit import DAMPINGS, Refit, dampings
from .responses import from_groups, outputs, pick_positions, to_groups
from .solvers import NormalEquations, Operator, Samples, solver

__all__ = [
    "DAMPINGS",
    "ENOUGH_POSITIONS",
    "HELD_BACK",
    "Batch",
    "Calibration",
    "CalibrationSet",
    "CalibrationSettings",
    "Change",
    "ConvCall",
    "Divergence",
    "Forwards",
    "Kernel",
    "Known",
    "LayerCalibration",
    "Moments",
    "NormalEquations",
    "Operator",
    "Problem",
    "Progress",
    "Reader",
    "Refit",
    "RefitError",
    "Samples",
    "WholeLayer",
    "blend",
    "calibrate",
    "calibration_set",
    "choose",
    "dampings",
    "digests",
    "from_groups",
    "items",
    "laid_out",
    "memory_for",
    "never_worse",
    "outputs",
    "pick_positions",
    "reestimate_batch_norm",
    "response_moments",
    "solver",
    "to_groups",
    "watch_convolutions",
    "whole_layers",
]
