"""Results of the commands as tables and lines for a terminal; without a terminal, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from ..calibration import ENOUGH_POSITIONS, Calibration
from ..deploy.advice import Benchmark
from ..deploy.export import Exported
from ..errors import Argument, Message, counted, one_line, shortened
from ..metrics.intervals import wilson_interval
from ..network.forms import Factoring
from ..pipeline.convert import Conversion, LayerRecord
from ..pipeline.finetuning import Stage
from ..pipeline.inspect import LAMBDAS, Inspection
from ..pipeline.verify import Verification
from ..plan.cost import Cost
from ..search.dropping import Step
from ..search.records import Search
from ..training.evaluation import Evaluation
from .text import layer_name, megabytes, millions, size_text
from .tradeoff import Tradeoff

# The numbers of bits per weight for which an inspection shows the size.
CODED_BITS = (2, 3, 4)
LONGEST_WORD = 14  # columns that a long name keeps at least when a table is narrowed


def conversion_table(conversion: Conversion) -> Table:
    """Return a row for each kernel larger than 1x1: size, kept parts, energy, error, or why it was skipped."""
    rows = []
    for layer in conversion.layers:
        energy = "" if layer.energy is None else f"{layer.energy:.2%}"
        error = "" if layer.error is None else f"{layer.error:.1e}"
        rows.append([layer_name(layer.name), size_text(layer.kernel), _kept(layer), energy, error, layer.why or ""])
    return fitted_table(["layer", "kernel", "kept", "energy kept", "kernel error", "note"], rows, left={0, 5})


def search_table(search: Search) -> Table:
    """Return a row for each plan that a search under a budget evaluated; the plan that it took is marked."""
    rows = []
    for number, plan in enumerate(search.tried):
        measured = "" if plan.measured is None else f"{plan.measured:.3g}"
        taken = "taken" if number == search.taken else ""
        share = f"{plan.cost / search.whole:.1%}"
        rows.append([plan.origin, f"{plan.cost:,}", share, f"{plan.expected:.3g}", measured, taken])
    headings = ["plan", search.unit, "of the whole", f"{search.scored_by}, summed", "divergence seen", ""]
    return fitted_table(headings, rows, left={0, 5})


def drops_table(drops: Sequence[Step], unit: str = "parameters") -> Table:
    """Return a row for each budget that a search for the largest allowed drop evaluated, in the order of the search."""
    rows = [[f"{step.share:.1%}", f"{step.drop:+.2f}"] for step in drops]
    return fitted_table([unit, "points lost, on the choosing half"], rows, left=set())


def calibration_table(calibration: Calibration) -> Table:
    """Return a row for each cut layer: its output error on held-back inputs, and details of the refit."""
    rows = []
    coded = any(layer.bits is not None for layer in calibration.layers)
    for layer in calibration.layers:
        before, after = ("" if e is None else f"{e:.3f}" for e in (layer.error_before, layer.error_after))
        damping = "" if layer.damping is None else f"{layer.damping:.0e}"
        ratio = f"{layer.positions_per_unknown:.3g}" if layer.positions else ""
        bits = ["" if layer.bits is None else f"{layer.bits:.2f}"] if coded else []
        seconds = f"{layer.seconds:.1f}"
        rows.append([layer.name, layer.decision, before, after, *bits, damping, ratio, seconds, layer.why or ""])
    bits = ["bits"] if coded else []
    errors = ["error, plain rounding", "with feedback"] if coded else ["error, plain cut", "refitted"]
    headings = ["layer", "decision", *errors, *bits, "damping", "positions/unknown", "s", "note"]
    return fitted_table(headings, rows, left={0, 1, len(headings) - 1})


def calibration_lines(calibration: Calibration) -> list[str]:
    """Return the result of the calibration in a few lines."""
    decisions = [layer.decision for layer in calibration.layers]
    counts = ", ".join(f"{decisions.count(d)} {d}" for d in sorted(set(decisions), key=decisions.index))
    inputs = f"{counted(calibration.inputs, 'input')}, {calibration.held_back} of them held back"
    lines = [f"calibrated on {inputs}: {counts or 'no layer is cut'}", *calibration.notes]
    too_few_positions = [
        f"{layer.name} needs {counted(ENOUGH_POSITIONS * layer.unknowns, 'position')} "
        f"({counted(layer.inputs_enough, 'input')})"
        for layer in calibration.layers
        if layer.unknowns and layer.inputs < layer.inputs_enough
    ]
    if too_few_positions:
        lines.append(
            "there are few positions (outputs of a layer over all inputs), so the damping is stronger; give more or "
            f"larger inputs: {shortened(too_few_positions, 3)}"
        )
    what = "plain rounding" if any(layer.bits is not None for layer in calibration.layers) else "plain cut"
    if calibration.plain_divergence is not None and calibration.divergence is not None:
        plain, after = calibration.plain_divergence, calibration.divergence
        lines.append(f"divergence from the original's outputs, held-back inputs: {what} {plain:.3g}, now {after:.3g}")
    if calibration.agreement is not None:
        plain_agreement = calibration.plain_agreement
        before = "" if plain_agreement is None else f" ({what}: {plain_agreement:.1%})"
        low, high = wilson_interval(calibration.agreement, max(calibration.held_back, 1))
        same = (
            f"{calibration.agreement:.1%} of {calibration.held_back} held-back inputs (95 %: {low:.1%} to {high:.1%})"
        )
        lines.append(f"same top-1 as the uncut network on {same}{before}")
    if calibration.kept < 1 and calibration.layers:
        lines.append(f"the refit made the outputs worse: {calibration.kept:.0%} of its change was kept")
    if calibration.batch_norms:
        lines.append(f"{calibration.batch_norms} batch norms re-estimated")
    return lines


def benchmark_rows(benchmark: Benchmark) -> Table:
    """Return a row for each way in which the network was run."""
    rows, metric = [], next((row.measurement.title for row in benchmark.rows if row.measurement is not None), "metric")
    for row in benchmark.rows:
        layout = row.layout.replace("channels_last", "ch. last")
        mode = "compiled" if row.compiled else "eager" if row.runtime == "torch" else row.runtime
        settings = [row.form, mode, row.precision, layout, str(row.batch), str(row.threads)]
        if row.seconds is None or row.examples_per_second is None:
            rows.append([*settings, "", "", "", "", row.note or "", "", ""])
            continue
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        speed = f"{row.examples_per_second:,.1f}"
        error = "" if row.error is None else f"{row.error:.0e}"
        same = "" if row.agreement is None else f"{row.agreement:.1%}"
        time = [f"{1e3 * row.seconds:,.1f}", f"{row.spread or 0:.0%}", speed]
        measured = "" if row.measurement is None else row.measurement.text
        rows.append([*settings, *time, peak, error, same, measured])
    headings = [
        "form",
        "mode",
        "in",
        "layout",
        "batch",
        "thr",
        "ms",
        "+-",
        "per s",
        "MiB",
        "error",
        "same top-1",
        metric,
    ]
    return fitted_table(headings, rows, left={0, 1, 2, 3, 10})


def factored_layers(factoring: Factoring, title: str) -> Table:
    """Return a row for each harmonic convolution: its form, the time of both forms, and the reason for the choice."""
    rows = []
    for layer in factoring.layers:
        dense, factored = (
            "" if seconds is None else f"{1e3 * seconds:.3g}"
            for seconds in (layer.dense_seconds, layer.factored_seconds)
        )
        rows.append([layer_name(layer.name), layer.form, dense, factored, layer.why])
    return fitted_table([f"layer ({title})", "form", "dense ms", "factored ms", "why"], rows, left={0, 1, 4})


def export_lines(exported: Exported, dtype: str) -> list[str]:
    """Return the accuracy and the content of an exported file in a few lines."""
    compared = "compared with the network in torch" if dtype == "float32" else f"rounded to {dtype}"
    compared = compared if exported.held_back is None else f"before the rounding, {compared}"
    top1 = "" if exported.top1_agreement is None else f"; same top-1 on {exported.top1_agreement:.0%}"
    lines = [f"{compared}: outputs differ by {exported.difference:.1e} of the largest{top1}"]
    if exported.factored:
        times = "" if exported.speedup is None else f", {exported.speedup:.2f} times as fast as dense in its runtime"
        lines.append(f"{counted(len(exported.factored), 'layer')} factored{times}")
    if (held := exported.held_back) is not None:
        same = "" if held.agreement is None else f"same top-1 as the network on {held.agreement:.1%} of "
        images = f"{counted(held.inputs, 'input')} held back"
        lines.append(f"{same}{images}, divergence {held.divergence:.3g}")
        if held.float_layers:
            lines.append(f"in floating point: {', '.join(held.float_layers)}")
    return [*lines, *(f"note: {note}" for note in exported.notes)]


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Return the evaluation of a network on a set of images in a few lines."""
    lines = [str(evaluation)]
    if evaluation.top5 is not None and evaluation.loss is not None:
        lines.append(f"top-5 {evaluation.top5:.2%}, loss {evaluation.loss:.4f}")
    if evaluation.agreement is not None and evaluation.top1 is not None:
        lines.append(f"agreement {evaluation.agreement:.2%}, KL {evaluation.divergence:.3g}")
    if evaluation.difference is not None:
        lines.append(f"second network: {evaluation.second_network}")
    speed = evaluation.images_per_second
    lines.append(f"{speed:,.0f} {'images' if evaluation.measurement is None else 'samples'}/s")
    if evaluation.unreadable:
        names = shortened(list(evaluation.unreadable), 3)
        lines.append(f"{counted(len(evaluation.unreadable), 'image')} could not be read: {names}")
    return lines


def stages_table(stages: Sequence[Stage]) -> Table:
    """Return a row for each stage of a fine-tuning: top-1 or a metric with its interval, loss, agreement."""
    rows, headings = [], set()
    for stage in stages:
        evaluation = stage.evaluation
        if evaluation is None:
            rows.append([stage.name, "not known", "", "", "", stage.why or ""])
            continue
        top1 = "" if evaluation.top1 is None else f"{evaluation.top1:.2%}"
        interval = (
            "" if evaluation.interval is None else f"{evaluation.interval[0]:.2%} to {evaluation.interval[1]:.2%}"
        )
        loss = "" if evaluation.loss is None else f"{evaluation.loss:.4f}"
        agreement = "" if evaluation.agreement is None else f"{evaluation.agreement:.2%}"
        heading, measured = "top-1", evaluation.measurement
        if measured is not None:
            heading, top1 = measured.title, measured.in_unit(measured.value)
            bounds = () if measured.interval is None else map(measured.in_unit, measured.interval)
            interval = " to ".join(bounds)
        headings.add(heading)
        rows.append([stage.name, top1, interval, loss, agreement, ""])
    heading = ", ".join(sorted(headings)) or "top-1"
    return fitted_table(["stage", heading, "95 %", "loss", "agreement with uncut", "note"], rows, left={0, 5})


def tradeoff_table(tradeoff: Tradeoff) -> Table:
    """Return a row for each network: what was changed, size, error with its interval, difference from the uncut one."""
    rows = []
    for point in tradeoff.every:
        error = "" if point.error is None else f"{point.error:.2f}"
        interval = "" if point.error_interval is None else "{:.2f} to {:.2f}".format(*point.error_interval)
        macs = "" if point.mac_share is None else f"{point.mac_share:.1%}"
        size = [millions(point.parameters), f"{point.parameter_share:.1%}", macs]
        if tradeoff.coded:
            size = ["" if point.bits is None else f"{point.bits:.3g}", f"{point.bytes:,}", f"{point.byte_share:.1%}"]
        name = point.name + (", calibrated" if point.calibrated else "")
        difference = [f"{point.disagreement:.2f}", f"{point.divergence:.2g}"] if point.converted else ["", ""]
        rows.append([name, *size, error, interval, *difference, point.note or ""])
    headings = ["lambda", "params", "of the whole", "MACs, factored"]
    if tradeoff.coded:
        headings = ["network", "bits per weight", "bytes of the tensors", "of the whole"]
    return fitted_table([*headings, "top-1 error, %", "95 %", "other than uncut, %", "KL", "note"], rows, left={0, 8})


def cost_lines(cost: Cost) -> list[str]:
    """Return the totals: parameters, bytes, MACs of each form, and the share of the kernels larger than 1x1."""
    share = f"convolutions over 1x1 hold {cost.parameter_share:.1%} of {millions(cost.parameters)} parameters"
    if cost.mac_share is not None:
        share += f" and {cost.mac_share:.1%} of the MACs"
    kept = cost.harmonic_parameters / max(cost.parameters, 1)
    return [
        share,
        f"parameters  {millions(cost.parameters)} -> {millions(cost.harmonic_parameters)} ({kept:.1%})",
        f"tensors     {megabytes(cost.bytes)} -> {megabytes(cost.harmonic_bytes)}",
        Message("MACs        ", _macs(cost)),
    ]


def _macs(cost: Cost) -> str:
    if cost.dense_macs is None or cost.factored_macs is None:
        return Message("unknown without an example input (", Argument("example_input"), ")")
    share = cost.factored_macs / max(cost.dense_macs, 1)
    return (
        f"dense {millions(cost.dense_macs)}; harmonic the same plus {millions(cost.merge_macs)} per forward to merge "
        f"kernels; factored {millions(cost.factored_macs)} ({share:.1%})"
    )


def verification_table(verification: Verification) -> Table:
    """Return a row for each convolution: kept parts, kernel error, output error, problem."""
    rows = [
        [
            layer_name(layer.name),
            f"{layer.kept}/{layer.total}",
            f"{layer.kernel_error:.1e}",
            "did not run" if layer.output_error is None else f"{layer.output_error:.1e}",
            layer.problem or "",
        ]
        for layer in verification.layers
    ]
    return fitted_table(["layer", "kept", "kernel, from the plan's", "output error", "problem"], rows, left={0, 4})


def inspection_layers(inspection: Inspection) -> Table:
    """Return a row for each kernel larger than 1x1: share of the parameters, and energy that each lambda keeps."""
    rows = []
    for layer in inspection.layers:
        size = "" if layer.output_size is None else size_text(layer.output_size)
        energies = [""] * len(LAMBDAS) if layer.energy is None else [f"{e:.1%}" for e in layer.energy]
        share = f"{layer.parameters / max(inspection.parameters, 1):.1%}"
        rows.append([layer_name(layer.name), size_text(layer.kernel), size, share, *energies])
    headings = ["layer", "kernel", "output", "parameters", *(f"energy, {lam}" for lam in LAMBDAS)]
    return fitted_table(headings, rows, left={0})


def inspection_policies(inspection: Inspection) -> Table:
    """Return a row for each lambda policy: the size and cost that the network would have."""
    rows = []
    for policy, cost in inspection.policies.items():
        share = f"{cost.harmonic_parameters / max(cost.parameters, 1):.1%}"
        macs = "unknown"
        if cost.dense_macs and cost.factored_macs is not None:
            macs = f"{millions(cost.factored_macs)} ({cost.factored_macs / cost.dense_macs:.1%})"
        rows.append([policy, millions(cost.harmonic_parameters), share, megabytes(cost.harmonic_bytes), macs])
    return fitted_table(["lambda", "parameters", "of the whole", "tensors", "MACs, factored"], rows, left={0})


def _rank_texts(inspection: Inspection) -> list[str]:
    """Return the parameters and MACs that are left with each share of the full rank."""
    texts = []
    for share, cost in inspection.ranks.items():
        left = f"{cost.harmonic_parameters / max(cost.parameters, 1):.1%}"
        if cost.dense_macs and cost.factored_macs is not None:
            left += f" (MACs {cost.factored_macs / cost.dense_macs:.1%})"
        texts.append(f"{share}: {left}")
    return texts


def inspection_lines(inspection: Inspection) -> list[str]:
    """Return the most that a cut can save, and the skipped layers."""
    share = f"{inspection.parameter_share:.1%} of {millions(inspection.parameters)} parameters"
    macs = inspection.mac_share
    lines = [
        f"{counted(len(inspection.layers), 'convolution')} over 1x1 "
        f"{'holds' if len(inspection.layers) == 1 else 'hold'} {share}"
        + (f" and {macs:.1%} of the MACs" if macs is not None else "; MACs are unknown without an input size")
        + ": no cut can save more",
    ]
    if inspection.one_by_one:
        has = "has" if inspection.one_by_one == 1 else "have"
        lines.append(f"{counted(inspection.one_by_one, 'convolution')} of 1x1 {has} no frequencies to cut")
    if inspection.ranks:
        lines.append("parameters by share of the full rank: " + ", ".join(_rank_texts(inspection)))
    if inspection.codable_parameters:
        whole = inspection.policies["full"].bytes
        sizes = ", ".join(
            f"{bits}: {megabytes(size)} ({size / max(whole, 1):.1%})"
            for bits in CODED_BITS
            if (size := inspection.coded_bytes(bits))
        )
        lines.append(
            f"{millions(inspection.codable_parameters)} weights can be coded; size of all tensors by bits per weight: "
            + sizes
        )
    lines += [f"skipped {skip.name or '(root)'} ({skip.kind}): {skip.why}" for skip in inspection.skipped]
    return lines


def file_size(path: str | Path) -> str:
    """Return the size of a file, or of all files in a folder; the .bin file of a model of OpenVINO belongs to it."""
    path = Path(path)
    if path.suffix == ".xml" and path.with_suffix(".bin").exists():
        return megabytes(path.stat().st_size + path.with_suffix(".bin").stat().st_size)
    return megabytes(sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size)


def _kept(layer: LayerRecord) -> str:
    text = f"{layer.kept}/{layer.total}" + (f", {layer.keeps}" if layer.keeps else "")
    return "skipped" if layer.skipped else text


class _FittedTable(Table):
    """A table that fits the terminal: headings and notes are wrapped at words, then long names are folded.

    Rich alone would also break numbers.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths, words = [], []
        for column in self.columns:
            cells = [str(cell).replace("\\[", "[") for cell in column.cells]
            parts = str(column.header).split() + (" ".join(cells).split() if column.justify == "left" else cells)
            widths.append(max(map(cell_len, [str(column.header), *cells])))
            words.append(max(map(cell_len, parts), default=1))
        for floors in (words, [min(least, LONGEST_WORD) for least in words]):
            while sum(widths) + 2 * (len(widths) - 1) > options.max_width:
                slack = [width - floor for width, floor in zip(widths, floors, strict=True)]
                if not any(slack):
                    break
                widths[slack.index(max(slack))] -= 1
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        return super().__rich_console__(console, options)


def fitted_table(headings: list[str], rows: list[list[str]], left: set[int]) -> Table:
    """Return a table without empty columns. ``left``: the columns that are aligned to the left."""
    table = _FittedTable(box=None, pad_edge=False, header_style="bold")
    used = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    for index in used:
        table.add_column(headings[index], justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(row[index]) for index in used))
    return table


def _plain(text: str) -> str:
    """Escape console markup and control characters, because names come from files."""
    return one_line(text).replace("[", "\\[")
