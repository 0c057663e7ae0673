"""The data of a report. The page, its JSON and the comparison are made from these values only.

A value that is neither recorded in the checkpoint nor measured is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import __version__
from ..metrics.metric import Measurement
from ..plan import Plan, bases_text, normalizations_text
from ..storage.checkpoint import Source

REPORT_VERSION = 1


@dataclass(frozen=True)
class Form:
    """One form of the network (dense, harmonic or factored).

    ``macs``: per example. ``seconds``: the median time of a forward pass, in the faster of the memory formats.
    ``spread``: half the distance between the quartiles, divided by the median. ``layout``: the faster memory format.
    The last three are None if the form was not timed; `Report.timing` says how it was timed.
    """

    name: str
    parameters: int
    bytes: int
    macs: int | None
    seconds: float | None = None
    spread: float | None = None
    layout: str | None = None


@dataclass(frozen=True)
class StageFacts:
    """The accuracy of the network at one stage, as shares from 0 to 1, and its value of another metric.

    ``why``: why it was not measured.
    """

    name: str
    images: int | None = None
    top1: float | None = None
    top1_interval: tuple[float, float] | None = None
    loss: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    why: str | None = None
    measurement: Measurement | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; it has a measurement only if there is one."""
        return {key: value for key, value in asdict(self).items() if key != "measurement" or value is not None}


@dataclass(frozen=True)
class LayerFacts:
    """One convolution with a kernel larger than 1x1.

    ``kept``, ``total``: how many parts of its kernel the layer keeps, and of how many; ``kept`` is 0 if the layer was
    skipped. ``keeps``: for each part whether it is kept. ``levels``: the literal lambda that keeps exactly these parts.
    ``kernel_error``: of the kernel after the cut, before calibration. ``output_error_before``,
    ``output_error_after``: on held-back inputs, before and after calibration. ``spectrum``: the mean |coefficient| of
    each part; of the uncut kernel if ``spectrum_uncut``. ``other_axes``: what the layer keeps on axes other than the
    space axis, without axes on which it keeps everything.
    """

    name: str
    kind: str
    kernel: tuple[int, ...]
    kept: int
    total: int
    keeps: tuple[bool, ...]
    levels: int | None
    parameters: int | None = None
    kept_parameters: int | None = None
    macs: int | None = None
    factored_macs: int | None = None
    energy: float | None = None
    kernel_error: float | None = None
    output_error_before: float | None = None
    output_error_after: float | None = None
    decision: str | None = None
    why: str | None = None
    spectrum: tuple[float, ...] | None = None
    spectrum_uncut: bool = False
    other_axes: str = ""

    @property
    def share(self) -> float:
        """Return the share of the kernel that is kept; 1 for a skipped layer."""
        return self.kept / self.total if self.kept else 1.0

    @property
    def cut(self) -> bool:
        """Return whether a part of the kernel is cut."""
        return 0 < self.kept < self.total


@dataclass(frozen=True)
class LayerBytes:
    """What the tensors of one layer need in a file with coded weights.

    ``weights``: the number of coded weights, in ``coded_bytes``. ``plain_bytes``: of the tensors that are not coded,
    with those of norms and other modules between this layer and the next one.
    """

    name: str
    weights: int
    coded_bytes: int
    plain_bytes: int

    @property
    def bits(self) -> float | None:
        """Return the bits per coded weight; None if no weight is coded."""
        return 8 * self.coded_bytes / self.weights if self.weights else None


@dataclass(frozen=True)
class LayerRank:
    """The rank of one layer whose rank is reduced, in each group of channels.

    ``spectrum``: the share of the power of its outputs that is outside the leading k directions, for k from 0 to the
    full rank in equal steps; None if it is not recorded.
    """

    name: str
    rank: int
    full_rank: int
    spectrum: tuple[float, ...] | None = None

    @property
    def share(self) -> float:
        """Return the rank, divided by the full rank."""
        return self.rank / self.full_rank

    @property
    def outside(self) -> float | None:
        """Return the share of the power of the outputs that is outside the rank, or slightly more."""
        return self.outside_at(self.share)

    def outside_at(self, share: float) -> float | None:
        """Return the share of the power outside a share of the full rank, interpolated linearly.

        The spectrum is convex, so the exact value is not larger.
        """
        if self.spectrum is None:
            return None
        place = share * (len(self.spectrum) - 1)
        first = min(int(place), len(self.spectrum) - 2)
        low, high = self.spectrum[first : first + 2]
        return low + (high - low) * (place - first)


@dataclass(frozen=True)
class NextStep:
    """A command that is useful next, and why. The command runs as printed."""

    why: str
    command: str


@dataclass(frozen=True)
class Report:
    """All that is known about a harmonic checkpoint.

    ``calibration``, ``search``, ``drops`` and ``training`` are copied from the checkpoint's history. ``timing``: the
    machine and the settings with which the forms were timed; None if they were not timed. ``coding``: the bytes of each
    layer, in the order of the network; empty if no weight is coded. ``ranks``: the layers whose rank is reduced, in the
    order of the network. ``commands``: they make the checkpoint again, under new names, and run as printed.
    """

    name: str
    source: Source | None
    plan: Plan
    forms: tuple[Form, ...]
    layers: tuple[LayerFacts, ...]
    stages: tuple[StageFacts, ...]
    calibration: Mapping[str, Any] | None
    search: Mapping[str, Any] | None
    drops: tuple[Mapping[str, Any], ...]
    training: tuple[Mapping[str, Any], ...]
    commands: tuple[str, ...]
    versions: Mapping[str, str]
    sha256: str | None = None
    file_bytes: int | None = None
    parameter_share_over_1x1: float | None = None
    timing: Mapping[str, Any] | None = None
    command_notes: tuple[str, ...] = ()
    coding: tuple[LayerBytes, ...] = ()
    ranks: tuple[LayerRank, ...] = ()
    next_steps: tuple[NextStep, ...] = ()

    def form(self, name: str) -> Form:
        """Return the form with this name."""
        return next(form for form in self.forms if form.name == name)

    @property
    def bases(self) -> str:
        """Return the names of the layers' bases."""
        return bases_text(self.plan)

    @property
    def normalizations(self) -> str:
        """Return the normalizations of the bases."""
        return normalizations_text(self.plan)

    @property
    def share(self) -> float:
        """Return the number of parameters, divided by that of the uncut network."""
        return self.form("harmonic").parameters / max(self.form("dense").parameters, 1)

    @property
    def bits(self) -> float | None:
        """Return the bits per coded weight of the whole network; None if no weight is coded."""
        return total_bytes(self.coding).bits

    @property
    def saves_nothing(self) -> bool:
        """Return whether nothing is cut, no rank is reduced and no weight is coded."""
        return self.plan.whole and not self.cut and not self.coding and not self.ranks

    @property
    def from_scratch(self) -> bool:
        """Return whether the network was trained in harmonic form from the beginning, and not converted."""
        return bool(self.training) and not self.training[0].get("stages")

    @property
    def cut(self) -> tuple[LayerFacts, ...]:
        """Return the cut layers."""
        return tuple(layer for layer in self.layers if layer.cut)

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; `Plan.load` reads the plan from it."""
        plain = asdict(replace(self, plan=Plan(())))
        plain["stages"] = [stage.to_json() for stage in self.stages]
        plain["layers"] = [{**asdict(layer), "share": layer.share} for layer in self.layers]
        plain["coding"] = [{**asdict(layer), "bits": layer.bits} for layer in self.coding]
        plain["ranks"] = [{**asdict(layer), "share": layer.share, "outside": layer.outside} for layer in self.ranks]
        return {
            "report_version": REPORT_VERSION, "harmconvert": __version__, **plain,
            "bits": self.bits, "plan": self.plan.to_json(),
        }  # fmt: skip


def total_bytes(layers: Sequence[LayerBytes]) -> LayerBytes:
    """Return the sum over layers."""
    weights, coded, plain = (
        sum(getattr(layer, field) for layer in layers) for field in ("weights", "coded_bytes", "plain_bytes")
    )
    return LayerBytes("all layers", weights, coded, plain)
