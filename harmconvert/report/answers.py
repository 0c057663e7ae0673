"""The answers on the first screen of the page: how much smaller, how much worse, how fast."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import counted
from .facts import Form, Report, StageFacts
from .text import bytes_text, millions, milliseconds, percent

# A smaller relative difference of sizes or of times is called none.
_SAME = 0.02


@dataclass(frozen=True)
class Answer:
    """The answer to one question: a short value, and sentences that explain it. ``known``: False if not measured."""

    question: str
    value: str
    details: tuple[str, ...]
    known: bool = True


def answers(report: Report) -> tuple[Answer, ...]:
    """Return the answers to how much smaller and worse a network became, and how fast it is."""
    return smaller(report), worse(report), faster(report)


def smaller(report: Report) -> Answer:
    """Return how much smaller the file is than the uncut tensors; for a network without a file, its tensors."""
    dense, harmonic = report.form("dense"), report.form("harmonic")
    size = report.file_bytes or harmonic.bytes
    details = [f"{bytes_text(harmonic.bytes)} of tensors, uncut {bytes_text(dense.bytes)}"]
    if report.file_bytes:
        header = max(report.file_bytes - harmonic.bytes, 0)
        details.insert(0, f"the file: {bytes_text(report.file_bytes)}, of which {bytes_text(header)} are the header")
    if harmonic.parameters != dense.parameters:
        count = f"{millions(harmonic.parameters)} of {millions(dense.parameters)} parameters"
        details.append(f"{count} ({percent(report.share)})")
    if report.bits is not None:
        details.append(f"{report.bits:.2f} bits per coded weight")
    return Answer("How much smaller?", _size_text(size, dense.bytes), tuple(details))


def _size_text(now: int, before: int) -> str:
    ratio = now / before if before else 1.0
    if ratio > 1 + _SAME:
        return f"{percent(ratio - 1)} larger"
    if ratio > 1 - _SAME:
        return "same size"
    return f"{_times(1 / max(ratio, 1e-9))} smaller" if ratio < 0.8 else f"{percent(1 - ratio)} smaller"


def worse(report: Report) -> Answer:
    """Return how much worse the network became: by the last measurement of labels, else of agreement."""
    question = "How much worse?"
    measured = [stage for stage in report.stages if _is_measured(stage)]
    uncut = next((stage for stage in measured if stage.name == "uncut"), None)
    if measured and measured[-1] is not uncut:
        return Answer(question, *_measured(measured[-1], uncut))
    record = report.calibration or {}
    trained = any(run.get("epochs") for run in report.training)
    if record.get("agreement") is not None and not trained:
        details = [f"of the {counted(record['held_back'], 'calibration input')} that were held back"]
        if record.get("plain_agreement") is not None:
            details.append(f"without calibration: {percent(record['plain_agreement'])}")
        details.append("Accuracy on labels was not measured.")
        return Answer(question, _agreement(record["agreement"]), tuple(details))
    if report.saves_nothing and not report.training:
        return Answer(question, "not worse", ("Nothing is cut: the outputs are the original's, up to rounding.",))
    details = ["The accuracy was not measured."]
    if not record and not trained:
        details.append("The cut was not calibrated. Calibration reduces its error, without labels.")
    return Answer(question, "not known", tuple(details), known=False)


def _agreement(share: float) -> str:
    return f"same class on {percent(share, 0 if share == 1 else 1)}"


def _is_measured(stage: StageFacts) -> bool:
    return any(value is not None for value in (stage.top1, stage.agreement, stage.measurement))


def _measured(stage: StageFacts, uncut: StageFacts | None) -> tuple[str, tuple[str, ...]]:
    """Return the value and the details of a measured stage."""
    if stage.measurement is not None:
        other = uncut.measurement.text if uncut and uncut.measurement else "not measured"
        one = stage.measurement
        where = counted(one.samples, "sample") + (f" of {one.data}" if one.data else "")
        return f"{one.title} {one.in_unit(one.value)}", (f"{one.text}, {where}", f"uncut: {other}")
    if stage.top1 is None:
        return _agreement(stage.agreement or 0.0), (
            f"of {counted(stage.images or 0, 'image')} without labels, compared with the uncut network",
        )
    top1, details = percent(stage.top1, 2), [f"{stage.name}, measured on {counted(stage.images or 0, 'image')}"]
    low, high = stage.top1_interval or (stage.top1, stage.top1)
    details.append(f"95 % interval: {percent(low, 2)} to {percent(high, 2)}")
    if uncut is None or uncut.top1 is None:
        return f"top-1 {top1}", tuple(details)
    points = 100 * (uncut.top1 - stage.top1)
    value = (
        "no difference" if abs(points) < 0.005 else f"{abs(points):.2f} points {'worse' if points > 0 else 'better'}"
    )
    inside = low <= uncut.top1 <= high
    details[1] += ", which includes the uncut network's" if inside else ""
    return value, (f"top-1 {top1}, uncut {percent(uncut.top1, 2)}", *details)


def faster(report: Report) -> Answer:
    """Return how fast the faster of the two forms for use is: the dense form, or the factored form."""
    question, dense, factored = "How fast?", report.form("dense"), report.form("factored")
    if dense.seconds is not None and report.timing:
        batch = report.timing["batch"]
        return Answer(question, *_timed(dense, factored, f"median of a batch of {batch}, on this machine"))
    plain = "The time was not measured."
    if dense.macs and factored.macs is not None and factored.macs < (1 - _SAME) * dense.macs:
        details = ("in the factored form", "The dense form is as fast as the original.", plain)
        return Answer(question, f"{percent(factored.macs / dense.macs, 0)} of the multiply-adds", details)
    return Answer(question, "same speed", ("The dense form has the original's layers.", plain))


def _timed(dense: Form, factored: Form, how: str) -> tuple[str, tuple[str, ...]]:
    """Return the value and the details of measured times."""
    original = dense.seconds or 0.0
    ours = f"dense form, as the original: {milliseconds(original)}"
    if factored.seconds is None:
        return "same speed", (ours, "The factored form was not measured.", how)
    gain, noise = original / factored.seconds - 1, (dense.spread or 0.0) + (factored.spread or 0.0)
    other = f"factored form: {milliseconds(factored.seconds)}"
    if gain > max(noise, _SAME):
        return f"{_times(1 + gain)} as fast", (other, ours, how)
    verdict = "no faster" if gain > -max(noise, _SAME) else "slower"
    return "same speed", (ours, f"{other}, {verdict}", how)


def _times(ratio: float) -> str:
    """Return a ratio with two or three digits.

    >>> _times(2.345), _times(12.34)
    ('2.3x', '12x')
    """
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
