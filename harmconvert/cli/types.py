"""Types of option values: sizes, numbers, bytes, KEY=VALUE."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import click

from .groups import Grouped

LARGEST_COUNT = 2**31 - 1  # the largest count that all parts of torch, NumPy and Pillow accept


class OptionalValues(Grouped):
    """A command with options whose value is optional (``--amp``).

    The word after such an option is its value if it is a valid value. Otherwise it is an argument of the command.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        loose = {name: option for option in self.params if value_is_optional(option) for name in option.opts}
        words = list(args)
        for place, (word, behind) in enumerate(pairwise(args)):
            option = loose.get(word)
            if isinstance(option, click.Option) and not behind.startswith("-") and not _fits(option, behind, ctx):
                words[place] = f"{word}={option.flag_value}"
        try:
            return super().parse_args(ctx, list(args))
        except click.UsageError as error:
            if words == args:
                raise
            try:
                return super().parse_args(ctx, words)
            except click.UsageError:
                raise error from None  # the word is a wrong value


def value_is_optional(option: click.Parameter) -> bool:
    """Return whether an option may stand without a value, such as --amp."""
    return bool(getattr(option, "_flag_needs_value", False))


def _fits(option: click.Option, word: str, ctx: click.Context) -> bool:
    try:
        option.type.convert(word, option, ctx)
    except click.BadParameter:
        return False
    return True


class InputSize(click.ParamType):
    """The size of one example: C,H,W (or C,T,H,W, or C,L)."""

    name = "C,H,W"
    example = "3,224,224"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).replace("x", ",").split(",")
        if not all(re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", part, re.ASCII) for part in parts):
            self.fail(f"{value!r} is not a size such as {self.example}", param, ctx)
        return tuple(int(part) for part in parts)


class KernelSize(InputSize):
    """The size of a kernel: KxK, or one number for all axes."""

    name = "KxK"
    example = "3 or 1x7"


class KeyValue(click.ParamType):
    """KEY=VALUE, as in timm's --model-kwargs. The value is read as a Python literal if it is one."""

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
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return key, text


class Count(click.IntRange):
    """A whole number from ``min`` to the largest that torch and NumPy accept."""

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        number = int(super().convert(value, param, ctx))
        if number > LARGEST_COUNT:
            self.fail(f"{value!s:.40} is more than {LARGEST_COUNT:,}", param, ctx)
        return number


class FiniteRange(click.FloatRange):
    """A number in a range, but not NaN or infinity."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Numbers(click.ParamType):
    """Numbers with commas between them, such as 0.485,0.456,0.406."""

    name = "N,N,N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = (math.nan,)
        if not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406", param, ctx)
        return numbers


class Bytes(click.ParamType):
    """A number of bytes, such as 500M or 2G."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)i?B?", str(value).strip(), re.IGNORECASE)
        if not match:
            self.fail(f"{value!r} is not a size such as 500M or 2G", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
