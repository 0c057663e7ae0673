"""harmconvert demo"""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from functools import partial

import click

from . import options


@click.command(name="demo")
@options.common
def command(as_json: bool) -> None:
    """Convert two real networks, offline, and print the results. Every number is measured in this run.

    \b
    Example:
      harmconvert demo
    """
    from ..report.demo import tell

    with ExitStack() as waiting:
        spinner = partial(options.busy, "measuring") if sys.stderr.isatty() else nullcontext

        def say(line: str) -> None:
            waiting.close()
            (options.say if as_json else click.echo)(line)
            waiting.enter_context(spinner())

        waiting.enter_context(spinner())
        facts = tell(say)
    if as_json:
        options.print_json(facts)
