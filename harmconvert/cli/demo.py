"""harmconvert demo"""

from __future__ import annotations

import click

from . import options


@click.command(name="demo")
@options.common
def command(as_json: bool) -> None:
    """Convert two real networks offline and tell what happened, every number measured now.

    \b
    Example:
      harmconvert demo
    """
    from ..demo import tell

    facts = tell(options.say if as_json else click.echo)
    if as_json:
        options.print_json(facts)
