"""An extension of griffe: the examples in docstrings (lines after `>>>`) become blocks of code on the API's page."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An example begins with a prompt and ends at an empty line or at the end of the text.
EXAMPLE = re.compile(r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\n|\Z)", re.DOTALL)


class Doctests(griffe.Extension):
    """Put each example into a fence."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\1\n```", obj.docstring.value)
