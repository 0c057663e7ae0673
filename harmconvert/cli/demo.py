"""harmconvert demo"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import click

from . import next_step, options
from .listening import CommandLine

if TYPE_CHECKING:
    from ..pipeline import Step, Verification


@click.command(name="demo")
@options.common
def command(as_json: bool) -> None:
    """Convert two real networks, offline, and print the results. Every number is measured in this run.

    \b
    Example:
      harmconvert demo
    """
    from ..pipeline import demo

    with ExitStack() as waiting:
        spinner = partial(options.busy, "measuring") if sys.stderr.isatty() else nullcontext

        def say(line: str) -> None:
            waiting.close()
            (options.say if as_json else click.echo)(line)
            waiting.enter_context(spinner())

        waiting.enter_context(spinner())
        result = demo(_StepPrinter(say))
    if as_json:
        options.print_json(result.to_json())
    else:
        next_step.after_demo(options.console())


class _StepPrinter(CommandLine):
    """Print the measurements of each step in one or two lines."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        super().__init__()
        self.print_line = print_line
        self.uncut = 0.0

    def result(self, result: object) -> None:
        from ..pipeline import Step

        if isinstance(result, Step):
            for line in self._lines(result):
                self.print_line(line)

    def _lines(self, step: Step) -> list[str]:
        from ..pipeline.demo import CODED, PHOTOGRAPHS, TRAINING_STEPS

        if step.why is not None:
            return [f"{'  ' if step.name == TRAINING_STEPS else 'sample:'}{step.name}: left out: {step.why}"]
        if step.name == "uncut":
            self.uncut = step.accuracy or 0.0
            right = f"{step.accuracy:.1%} of {step.images:,} held-back images right"
            return [f"sample:resnet_mnist5k, trained on handwritten digits: {right}"]
        if step.name == PHOTOGRAPHS:
            return _photograph_lines(step)
        if step.name == CODED:
            return _coded_lines(step)
        return _cut_lines(step, self.uncut) if step.cost is not None else _refined_lines(step)


def _cut_lines(step: Step, uncut: float) -> list[str]:
    from ..report.tables import megabytes, millions

    assert step.cost is not None
    kept, whole = step.cost.harmonic_parameters, step.cost.parameters
    size = f"{millions(kept)} of {millions(whole)} parameters, {megabytes(step.bytes or 0)}"
    if step.check is not None:
        same = f"the same prediction on {step.agreement:.1%} of the images,"
        return [f"  whole basis: {size}; {same}", f"    {_exactness(step.check)}"]
    points = ((step.accuracy or 0.0) - uncut) * 100
    plain = f"{step.accuracy:.1%} right ({points:+.1f} points), the same prediction on {step.agreement:.1%}"
    return [f"  lambda {step.name}: {size} ({kept / whole:.0%});", f"    the plain cut: {plain}"]


def _coded_lines(step: Step) -> list[str]:
    from ..pipeline.demo import CODED_BITS
    from ..report.text import bytes_text

    assert step.cost is not None
    size = f"{bytes_text(step.bytes or 0)} of {bytes_text(step.cost.bytes)} ({(step.bytes or 0) / step.cost.bytes:.0%})"
    right = f"{step.accuracy:.1%} right, the same prediction on {step.agreement:.1%}"
    return [f"  {CODED_BITS} bits per weight, no training: {size};", f"    {right}"]


def _refined_lines(step: Step) -> list[str]:
    from ..errors import counted
    from ..report.tables import megabytes

    if step.name == "calibrated":
        what = f"calibrated on {step.images} other images, no labels, no training"
        return [
            f"    the same cut {what}: {step.accuracy:.1%} right,", f"    the same prediction on {step.agreement:.1%}",
        ]  # fmt: skip
    if step.name == "fine-tuned":
        trained = f"{counted(step.epochs or 0, 'epoch')} on 4,000 images, {step.seconds:.0f} s"
        return [f"    and fine-tuned for {trained}: {step.accuracy:.1%} right"]
    size = megabytes(step.bytes or 0)
    return [f"    exported as plain convolutions, {size}: the same prediction on {step.agreement:.1%}"]


def _photograph_lines(step: Step) -> list[str]:
    from ..report.tables import millions

    assert step.cost is not None
    assert step.check is not None
    share = f"{step.cost.over_1x1_parameters / step.cost.parameters:.1%} in kernels over 1x1"
    same = f"{step.images} crops of two photographs: same top-1 on {step.check.top1_agreement:.0%}"
    return [
        f"sample:efficientnet_lite0, ImageNet weights, {millions(step.cost.parameters)} parameters, {share}",
        f"  whole basis, {same},",
        f"    {_exactness(step.check)}",
    ]


def _exactness(check: Verification) -> str:
    verdict = "exact" if check.ok else "NOT EXACT"
    return f"logits within {check.max_relative_error:.1e} of the original's: {verdict}"
