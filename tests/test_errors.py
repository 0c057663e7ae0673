from __future__ import annotations

import pytest
from torch import nn

from harmconvert.errors import InputError, UsageError, one_line
from harmconvert.pipeline import convert


def test_a_message_is_one_line_without_control_characters() -> None:
    network = nn.Sequential()
    network.add_module("two\nlines \x1b[31mred\x1b[0m \u202eback \udc80 é漢", nn.Conv2d(3, 4, 3))
    nn.init.constant_(next(network.parameters()), float("nan"))
    with pytest.raises(InputError) as caught:
        convert(network)
    name = r"two\nlines \x1b[31mred\x1b[0m \u202eback \udc80 é漢"
    assert str(caught.value).startswith(f"{name}.weight holds NaN or infinite values")


def test_printable_text_is_unchanged() -> None:
    for text in ("", "layer1.0 [x] 'é漢' <b> \\n", "a" * 5000):
        assert one_line(text) is text
        assert str(UsageError(text)) == text
    assert one_line("a\tb\r\0") == r"a\tb\r\x00"
