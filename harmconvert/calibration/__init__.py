"""Refit a converted network on unlabelled inputs, layer after layer.

What belongs here: measuring layers on inputs, and the least-squares problems that use the measurements. What does not:
labels and training (`training`), and deciding which frequencies a layer keeps (`plan`, `search`).

The files, from the whole network to its parts:

- calibrating.py: calibrate a network
- refit.py: refit one layer after the other
- layers.py: the kernel of one layer, and the choice among solutions
- tied_layers.py: which layers share coefficients, and the original's outputs for them
- equations.py, solvers.py: the least-squares problem of one layer, and three ways to solve it
- cuts.py, moments.py, collecting.py: the equations of every possible cut of a layer from one run of the whole network
- responses.py: responses of an input to the basis kernels
- capture.py, holding.py: run a network up to a layer, and continue from there
- repeatability.py: whether repeated runs give the same results
- reading.py, inputs.py, memory_format.py: batches of a loader, the calibration set, its memory format
- coding.py: the distribution of bits over the weights; weight_coding.py: rounding of one weight with feedback
- ranks.py: reduce the rank of a weight in the metric of its inputs
- coding_metrics.py, sensitivity.py: the metric of each weight's errors, and their effect on the network's outputs
- batch_norm.py: batch-norm statistics
- divergence.py: how far outputs are from those of the original
- limits.py: free memory and threads of this machine
"""

from .batch_norm import reestimate_batch_norm
from .calibrating import blend, calibrate, digests, never_worse
from .capture import ConvCall, watch_convolutions
from .coding import Coder
from .coding_metrics import ErrorMetric, QuickEquations, measured_moments, moments_of, pooled
from .context import CalibrationContext
from .cuts import WholeLayer, whole_layers
from .divergence import Divergence
from .equations import Change, Problem
from .holding import Forwards
from .inputs import HELD_BACK, Batch, CalibrationSet, calibration_set
from .layers import Kernel, RefitError, choose
from .limits import memory_for
from .memory_format import with_best_memory_format
from .moments import Moments, response_moments
from .reading import Reader, items
from .records import ENOUGH_POSITIONS, Calibration, CalibrationSettings, LayerCalibration, Progress
from .refit import DAMPINGS, Refit, dampings
from .responses import outputs, pick_positions
from .sensitivity import squared_changes
from .solvers import NormalEquations, Operator, Samples, solver
from .weight_coding import Shrinkage, best_shrinkage

__all__ = [
    "DAMPINGS",
    "ENOUGH_POSITIONS",
    "HELD_BACK",
    "Batch",
    "Calibration",
    "CalibrationContext",
    "CalibrationSet",
    "CalibrationSettings",
    "Change",
    "Coder",
    "ConvCall",
    "Divergence",
    "ErrorMetric",
    "Forwards",
    "Kernel",
    "LayerCalibration",
    "Moments",
    "NormalEquations",
    "Operator",
    "Problem",
    "Progress",
    "QuickEquations",
    "Reader",
    "Refit",
    "RefitError",
    "Samples",
    "Shrinkage",
    "WholeLayer",
    "best_shrinkage",
    "blend",
    "calibrate",
    "calibration_set",
    "choose",
    "dampings",
    "digests",
    "items",
    "measured_moments",
    "memory_for",
    "moments_of",
    "never_worse",
    "outputs",
    "pick_positions",
    "pooled",
    "reestimate_batch_norm",
    "response_moments",
    "solver",
    "squared_changes",
    "watch_convolutions",
    "whole_layers",
    "with_best_memory_format",
]
