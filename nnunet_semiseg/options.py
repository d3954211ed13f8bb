"""Options of commands that are fields of a dataclass: name, type, default and help stand in one place, the field.

    @dataclass(frozen=True, kw_only=True)
    class Request:
        seeds: int | None = option("--seeds", metavar="N", help="number of runs of each trainer", default=None)

`add_options(parser, Request)` adds them, and `from_args(Request, args)` makes the request of what was typed.
"""

from __future__ import annotations

import contextlib
import math
import os
import types
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

PLANS = "nnUNetPlans"
"""nnU-Net's own, and its default"""


def option(*flags: str, help: str, default: Any = MISSING, **more) -> Any:
    """A field that `add_options` makes an option of.

    Args:
        flags: how it is typed, such as `--seeds`.
        help: a text; its default is added, where it has one that says something.
        default: without one, the option is required.
        more: of `ArgumentParser.add_argument`, beside what the field's type says: `metavar`, or another `type`.
    """
    return field(default=default, metadata={"flags": flags, "help": help, **more})


def add_options(parser: ArgumentParser, options_class: type) -> None:
    """Add an option for each field that is one, of its type: a list takes several words, true and false none."""
    hints = get_type_hints(options_class)
    for f in fields(options_class):
        if "flags" not in f.metadata:
            continue
        default = f.default
        chosen = {**_of_type(hints[f.name], default), **f.metadata}
        flags, text = chosen.pop("flags"), chosen.pop("help")
        if default is MISSING:
            chosen["required"] = True
        elif not isinstance(default, bool):
            chosen["default"] = list(default) if isinstance(default, tuple) else default
            text += "; default: %(default)s" if default not in (None, ()) and "default:" not in text else ""
        parser.add_argument(*flags, dest=f.name, help=text, **chosen)


def from_args(options_class: type[T], args: Namespace, **more) -> T:
    """The dataclass of what was typed; `more` are fields of no option."""
    given = {f.name: getattr(args, f.name) for f in fields(options_class) if hasattr(args, f.name)}  # pyright: ignore
    return options_class(**{**given, **more})


def _of_type(hint: Any, default: Any) -> dict[str, Any]:
    """What `add_argument` takes for a field of this type."""
    if get_origin(hint) in (Union, types.UnionType):
        hint, *others = (h for h in get_args(hint) if h is not type(None))
        if others:  # a number or a name: as it is typed
            return {}
    if hint is bool:
        return {"action": "store_false" if default else "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is Sequence:
        return {"nargs": "+", **_of_type(get_args(hint)[0], None)}
    return {"type": hint} if hint in (int, float) else {}


# --------------------------------------------------------------------------------------------------- types of numbers


def at_least(minimum: int) -> Callable[[str], int]:
    """A function that reads a whole number, and raises ArgumentTypeError for a smaller one."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(f"{text}: give a whole number, {minimum} or more")
        return int(text)

    return convert


def positive(text: str) -> float:
    """Raises ArgumentTypeError for what is no finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ArgumentTypeError(f"{text}: give a number above 0")


def dataset_id(text: str) -> int:
    """Raises ArgumentTypeError for a number that nnU-Net cannot tell from others: it reads three digits."""
    if text.isdecimal() and 1 <= int(text) <= 999:
        return int(text)
    raise ArgumentTypeError(f"{text}: give a number from 1 to 999")


def cores(at_most: int) -> int:
    """The number of this machine's cores, or this number where that is less."""
    return min(at_most, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------ options that many commands have


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model of a data set.

    Attributes:
        dataset: number or name.
        fold: a number, or `all`.
    """

    dataset: int | str = option("-d", metavar="ID", help="number or name of the dataset")
    configuration: str = option("-c", metavar="CONFIG", help="nnU-Net's configuration, such as 2d or 3d_fullres")
    fold: str = option("-f", metavar="FOLD", help="number of the fold, or all", default="0")
    plans: str = option("-p", metavar="PLANS", help="name of the plans", default=PLANS)


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """How a model predicts.

    Attributes:
        mirroring: nnU-Net's test-time augmentation.
    """

    device: Literal["cuda", "cpu", "mps"] = option("-device", help="what computes: a GPU or the CPU", default="cuda")
    mirroring: bool = option("--disable_tta", help="predict without mirroring: faster, less exact", default=True)


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Where the work is done.

    Attributes:
        executor: `local`, or `slurm`: the work is jobs of its queue.
        slurm: `KEY=VALUE` for them, see docs/cluster.md.
    """

    executor: Literal["local", "slurm"] = option(
        "--executor", default="local", help="where the work is done: on this machine, or by jobs of a SLURM queue"
    )
    slurm: Sequence[str] = option(
        "--slurm", action="extend", metavar="KEY=VALUE", default=(),
        help="options of each SLURM job: partition=gpu hours=12 gpus=1, or any other of sbatch",
    )  # fmt: skip
