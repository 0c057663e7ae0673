"""Metrics: how good the outputs of a network are, with an interval over the samples.

What belongs here: a file for each kind of metric, their registry, and the one pass over the data that measures them.
What does not: reading the data (`data`), and the order of the measurements in a flow (`pipeline`).
"""

from .classification import AGREEMENT, KL, LOSS, TOP1, TOP5, check_labels
from .drops import NetworkMetric, measured_on, metric_on, network_metric
from .intervals import bootstrap_interval, wilson_interval
from .measuring import Collected, Measured, TaskBatches, measure, measure_whole, run_on, samples_in
from .metric import Measurement, Metric, Outcome, mean_of
from .outputs import class_logits, main_output
from .registry import METRICS, MetricLike, metric_of
from .user import higher_is_better, number_of, takes_network, user_metric

__all__ = [
    "AGREEMENT",
    "KL",
    "LOSS",
    "METRICS",
    "TOP1",
    "TOP5",
    "Collected",
    "Measured",
    "Measurement",
    "Metric",
    "MetricLike",
    "NetworkMetric",
    "Outcome",
    "TaskBatches",
    "bootstrap_interval",
    "check_labels",
    "class_logits",
    "higher_is_better",
    "main_output",
    "mean_of",
    "measure",
    "measure_whole",
    "measured_on",
    "metric_of",
    "metric_on",
    "network_metric",
    "number_of",
    "run_on",
    "samples_in",
    "takes_network",
    "user_metric",
    "wilson_interval",
]
