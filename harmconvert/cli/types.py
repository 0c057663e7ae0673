"""What an option's text may say: sizes, numbers, bytes, KEY=VALUE."""

from __future__ import annotations

import re
from typing import Any

import click


class InputSize(click.ParamType):
    """C,H,W (or C,T,H,W, or C,L): one example's size."""

    name = "C,H,W"
    example = "3,224,224"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).replace("x", ",").split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a size such as {self.example}", param, ctx)
        return tuple(int(part) for part in parts)


class KernelSize(InputSize):
    """KxK, or one number: that along every axis."""

    name = "KxK"
    example = "3 or 1x7"


class KeyValue(click.ParamType):
    """KEY=VALUE, the value read as Python where it can be (timm's --model-kwargs)."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        import ast

        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


class Numbers(click.ParamType):
    """0.5 or 0.485,0.456,0.406."""

    name = "N,N,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406", param, ctx)


class Bytes(click.ParamType):
    """A number of bytes: 500M, 2G."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", str(value).strip(), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size such as 500M or 2G", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
