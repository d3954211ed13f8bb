"""The meaning of label values that are not 0, 1, 2, ...: `--label-values 205=kidney 420=tumour`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.names import some

Value = int | tuple[int, int, int]
"""A grey value, or the red, green and blue parts of a colour."""
BACKGROUND = "background"


@dataclass(frozen=True)
class LabelValues:
    """What the user says about the values in the labels.

    Args:
        names: for each class its value in the dataset, including `background`.
        grey: a map from values in the files to values in the dataset.
        colours: a map from colours in the files (0 to 255 each) to values in the dataset.
    """

    names: dict[str, int]
    grey: dict[int, int]
    colours: dict[tuple[int, int, int], int]


def parse(words: Sequence[str], labels: Sequence[str] | None = None) -> LabelValues:
    """Read `205=kidney`, `0,1=background` and, for colours, `255/0/0=kidney`.

    Args:
        labels: the classes in the order of their values 1, 2, ... None: in the order in which `words` name them.

    Raises:
        UserError: a word has another form; a value is named twice; a name is not in `labels`.
    """
    pairs: list[tuple[Value, str]] = []
    for word in words:
        values, equals, name = word.partition("=")
        parts = [_value(value) for value in values.split(",")]
        if not (equals and name) or None in parts:
            raise UserError(f"--label-values {word}: write VALUE=NAME, V,V=NAME or, for a colour, RED/GREEN/BLUE=NAME")
        pairs += [(value, name) for value in parts if value is not None]
    twice = [value for value, n in Counter(value for value, _ in pairs).items() if n > 1]
    if twice:
        raise UserError(f"--label-values: {as_text(twice[0])} is named twice: remove one")
    order = list(labels or dict.fromkeys(name for _, name in pairs if name != BACKGROUND))
    if unknown := [name for _, name in pairs if name not in (BACKGROUND, *order)]:
        raise UserError(f"--label-values: {unknown[0]} is not among --labels {' '.join(order)}: give it there, too")
    names = {BACKGROUND: 0, **{name: i for i, name in enumerate(order, 1)}}
    grey = {value: names[name] for value, name in pairs if isinstance(value, int)}
    colours = {value: names[name] for value, name in pairs if isinstance(value, tuple)}
    if colours and not any(grey.values()):  # grey masks beside coloured ones have 0, 1, 2, ...
        grey = {value: value for value in names.values()}
    return LabelValues(names, grey, {(0, 0, 0): 0, **colours} if colours else {})


def _value(text: str) -> Value | None:
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    parts = text.split("/")
    if len(parts) == 3 and all(part.isdecimal() and int(part) < 256 for part in parts):
        red, green, blue = map(int, parts)
        return red, green, blue
    return None


def as_text(value: Value | float) -> str:
    """A value as the user types it after `--label-values`."""
    return "/".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def count(label: sitk.Image) -> Counter:
    """Count voxels by their value, or pixels by their colour (red, green, blue)."""
    voxels = sitk.GetArrayViewFromImage(label)
    if label.GetNumberOfComponentsPerPixel() >= 3:
        values, counts = np.unique(voxels[..., :3].reshape(-1, 3), axis=0, return_counts=True)
        return Counter({tuple(map(int, value)): int(n) for value, n in zip(values, counts, strict=True)})
    values, counts = np.unique(voxels, return_counts=True)
    whole = np.issubdtype(voxels.dtype, np.integer)
    found = (int(v) if whole or float(v).is_integer() else float(v) for v in values)
    return Counter(dict(zip(found, map(int, counts), strict=True)))


def _order(value: Value | float) -> tuple:
    return isinstance(value, tuple), value


def values_text(values: Iterable[Value]) -> str:
    """The ten smallest values at most, such as `0, 1, 205`. Colours come last."""
    return some(map(as_text, sorted(values, key=_order)), 10)


def found_text(counts: Mapping) -> str:
    """The ten most frequent values at most, sorted, such as `0 (900 voxels), 205 (80), 420 (20)`."""
    most = dict(Counter(counts).most_common(10))
    parts = [f"{as_text(value)} ({n})" for value, n in sorted(most.items(), key=lambda pair: _order(pair[0]))]
    more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
    return f"{', '.join(parts)}{more}".replace(")", " voxels)", 1)


def offer(counts: Mapping, labels: Sequence[str] = ()) -> str:
    """The end of a message: what the user can do about these values.

    It shows the option `--label-values`, to be copied into the command. If values are not whole numbers, or if there
    are more than ten classes, it asks for other masks instead.

    Args:
        counts: the values or colours that were found.
        labels: the names of the classes, without the background. They are used if there are as many as values other
            than 0 (or black), else NAME1, NAME2, ...
    """
    values = sorted(counts, key=_order)
    zeros = [value for value in values if value in (0, (0, 0, 0))]  # both, if one of several coloured masks is black
    others = [value for value in values if value not in zeros]
    if any(isinstance(value, float) for value in values) or len(others) > 10:
        return "save masks as whole numbers, without smoothing or lossy compression"
    names = labels if len(labels) == len(others) else [f"NAME{i}" for i in range(1, len(others) + 1)]
    words = [f"{as_text(zero)}={BACKGROUND}" for zero in zeros] + [
        _quoted(f"{as_text(value)}={name}") for value, name in zip(others, names, strict=True)
    ]
    return f"give them names with --label-values {' '.join(words)}"


def _quoted(word: str) -> str:
    """Quote a word for the shell. A space before a minus sign tells the command that -1 is not an option."""
    word = f" {word}" if word.startswith("-") else word
    return word if re.fullmatch(r"[\w./=-]+", word) else f"'{word}'"
