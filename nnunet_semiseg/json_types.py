"""Types of values in JSON files: check whether a value has a type, and name the type in plain words."""

from __future__ import annotations

import math
import types
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value of a number, as in `Annotated[int, Bounds(1)]`. Both values are allowed."""

    least: float
    most: float | None = None

    def include(self, value: float) -> bool:
        return self.least <= value and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"of {self.least} or more" if self.most is None else f"from {self.least} to {self.most}"


def matches(value: Any, hint: Any) -> bool:
    """Whether a value from JSON has this type. A number must be finite; true and false are not numbers."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return matches(value, args[0]) and args[1].include(value)
    if origin in (Union, types.UnionType):
        return any(matches(value, a) for a in args)
    if origin is Literal:
        return value in args and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(matches(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches(v, args[1]) for v in value.values())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """Name a type in plain words, such as `a list of whole numbers`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{in_words(args[0])} {args[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(a) for a in args if a is not NoneType) + (", or null" if NoneType in args else "")
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (list, tuple):
        return f"a list of {in_words(args[0])}"
    if origin is dict:
        return f"an object, and each value in it {in_words(args[1])}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "an object",
        list: "a list",
    }
    return names.get(hint, "null")
