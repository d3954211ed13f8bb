"""Options of commands as fields of a dataclass. The field has everything about an option: name, type, default and help.

    @dataclass(frozen=True, kw_only=True)
    class Request:
        seeds: int | None = option("--seeds", metavar="N", help="number of runs of each trainer", default=None)

`add_options(parser, Request)` adds the options to a parser. `from_args(Request, args)` makes a `Request` from what was
typed.
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
"""The name of nnU-Net's own plans, which are the default."""


def option(*flags: str, help: str, default: Any = MISSING, **more) -> Any:
    """Make a field of a dataclass that becomes an option of the command.

    Args:
        flags: what the user types, such as `--seeds`.
        help: the help text. The default is added to it, unless it is None, empty, true or false, or the text names it.
        default: the default. Without one, the option is required.
        more: further arguments of `ArgumentParser.add_argument`, such as `metavar`, or a `type` other than the field's.
    """
    return field(default=default, metadata={"flags": flags, "help": help, **more})


def add_options(parser: ArgumentParser, options_class: type) -> None:
    """Add an option for each field that `option` made. A list takes several words; true or false takes none."""
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
    """Make the dataclass from what was typed. `more` are values of fields that the command has no option for."""
    given = {f.name: getattr(args, f.name) for f in fields(options_class) if hasattr(args, f.name)}  # pyright: ignore
    return options_class(**{**given, **more})


def _of_type(hint: Any, default: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field of this type."""
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
    """Make a function that reads a whole number of `minimum` or more. It raises ArgumentTypeError for other text."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ArgumentTypeError(f"{text}: give a whole number, {minimum} or more")
        return int(text)

    return convert


def positive(text: str) -> float:
    """Read a finite number above 0. Raises ArgumentTypeError for other text."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ArgumentTypeError(f"{text}: give a number above 0")


def dataset_id(text: str) -> int:
    """Read the number of a dataset. Its name is not accepted.

    Raises ArgumentTypeError if the text is not a whole number from 1 to 999. nnU-Net reads three digits only.
    """
    if text.isdecimal() and 1 <= int(text) <= 999:
        return int(text)
    raise ArgumentTypeError(f"{text}: give a number from 1 to 999")


def cores(at_most: int) -> int:
    """The number of cores of this machine, but not more than `at_most`."""
    return min(at_most, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------ options that many commands have


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options that choose a model of a data set.

    Attributes:
        dataset: the number or the name of the dataset.
        fold: the number of the fold, or `all`.
    """

    dataset: int | str = option("-d", metavar="ID", help="number or name of the dataset")
    configuration: str = option("-c", metavar="CONFIG", help="nnU-Net's configuration, such as 2d or 3d_fullres")
    fold: str = option("-f", metavar="FOLD", help="number of the fold, or all", default="0")
    plans: str = option("-p", metavar="PLANS", help="name of the plans", default=PLANS)


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """The options that say how a model predicts.

    Attributes:
        mirroring: whether predictions are averaged over mirrored images (nnU-Net's test-time augmentation).
    """

    device: Literal["cuda", "cpu", "mps"] = option(
        "-device",
        help="where to compute: on an NVIDIA GPU (cuda), on the CPU, or on an Apple GPU (mps)",
        default="cuda",
    )
    mirroring: bool = option(
        "--disable_tta",
        help="predict without mirroring (test-time augmentation): this is faster, but less exact",
        default=True,
    )


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """The options that say where the work is done.

    Attributes:
        executor: `local`: this machine does the work. `slurm`: jobs of the SLURM queue do the work.
        slurm: options of these jobs, as `KEY=VALUE`; see docs/cluster.md.
    """

    executor: Literal["local", "slurm"] = option(
        "--executor", default="local", help="run the work on this machine (local) or as jobs of a SLURM queue (slurm)"
    )
    slurm: Sequence[str] = option(
        "--slurm", action="extend", metavar="KEY=VALUE", default=(),
        help="options of each SLURM job: partition=gpu hours=12 gpus=1, or any other option of sbatch",
    )  # fmt: skip
