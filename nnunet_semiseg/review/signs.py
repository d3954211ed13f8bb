"""Signs of a wrong prediction that need no label: volumes, islands (parts that do not touch), intensities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from skimage import measure

from nnunet_semiseg.review.estimates import Labels, classes_of

QUANTILES = (0.05, 0.5, 0.95)
FAR = 1.5
"""A volume is unusual if it is more than this many times the largest of the labelled cases. It is unusual, too, if the
smallest is more than this many times the volume."""


@dataclass(frozen=True)
class Signs:
    """The signs of one case.

    Attributes:
        volumes: the volume of each class, in ml; for pictures the area in cm2.
        islands: for each class the number of parts that do not touch.
        is_whole: whether no voxel is ignored. Otherwise volumes and islands say nothing about the whole class.
        intensities: for each channel the quantiles `QUANTILES` of the voxels that are not 0, if there are any.
    """

    volumes: dict[str, float]
    islands: dict[str, int]
    intensities: list[list[float]]
    is_whole: bool = True


def see(mask: np.ndarray, image: np.ndarray, labels: Labels, spacing: Sequence[float]) -> Signs:
    """Measure the signs of a case.

    Args:
        mask: a label map (*S), predicted or made by hand.
        image: (C, *S), as read.
        spacing: the voxel spacing along each axis, in mm.
    """
    sides = [s for s, n in zip(spacing, mask.shape, strict=True) if n > 1]
    unit = np.prod(sides) / (1000 if len(sides) > 2 else 100)
    volumes, islands = {}, {}
    for name, label in classes_of(labels).items():
        m = np.isin(mask, label)
        volumes[name] = float(m.sum() * unit)
        parts: Any = measure.label(m, return_num=True)
        islands[name] = int(parts[1])
    quantiles = [np.quantile(c[c != 0] if c.any() else c, QUANTILES).tolist() for c in image]
    return Signs(volumes, islands, quantiles, not (mask == labels.get("ignore", -1)).any())


@dataclass(frozen=True)
class Usual:
    """The usual signs, from labelled cases.

    `volumes`, `islands` and `always` come from labels without ignored voxels. If there are none, they are empty.

    Attributes:
        volumes: the smallest and the largest volume of each class, where it is not missing.
        islands: the largest number of islands of each class.
        always: the classes that no case lacks.
        intensities: (2, C, 3), the smallest and the largest of each quantile.
        unit: the unit of the volumes.
    """

    volumes: dict[str, tuple[float, float]]
    islands: dict[str, int]
    always: set[str]
    intensities: np.ndarray
    unit: str

    @classmethod
    def of(cls, cases: Sequence[Signs], unit: str) -> Usual:
        """Find the usual signs in labelled cases. There must be at least one case."""
        whole = [c for c in cases if c.is_whole]
        names = whole[0].volumes if whole else ()
        there = {name: [c.volumes[name] for c in whole if c.volumes[name]] for name in names}
        quantiles = np.array([c.intensities for c in cases])
        return cls(
            {name: (min(v), max(v)) for name, v in there.items() if v},
            {name: max(c.islands[name] for c in whole) for name in names},
            {name for name, v in there.items() if len(v) == len(whole)},
            np.stack([quantiles.min(0), quantiles.max(0)]),
            unit,
        )

    def missing(self, signs: Signs) -> list[str]:
        """The classes in `always` that this case lacks."""
        return [name for name, volume in signs.volumes.items() if name in self.always and not volume]


def reasons(signs: Signs, usual: Usual, channels: Sequence[str]) -> list[str]:
    """Say how a case differs from the labelled ones: a short sentence for each difference."""
    found = [f"{name} is missing, but all labelled cases have it" for name in usual.missing(signs)]
    for name, volume in signs.volumes.items():
        low, high = usual.volumes.get(name, (volume, volume))
        if volume and not low / FAR <= volume <= high * FAR:
            found.append(f"{name}: {volume:.3g} {usual.unit}, labelled ones have {low:.3g} to {high:.3g}")
        islands, most = signs.islands[name], usual.islands.get(name)
        if most is not None and islands > max(1, most):
            found.append(f"{name}: {islands} islands, labelled ones have at most {most}")
    values = np.array(signs.intensities)
    low, high = usual.intensities
    margin = np.maximum(high - low, 0.1 * np.abs(high[:, [-1]] - low[:, [0]]))
    unlike = ((values < low - margin) | (values > high + margin)).any(1)
    found += [
        f"{name}: intensities unlike the labelled ones" for name, is_it in zip(channels, unlike, strict=True) if is_it
    ]
    return found


def least_agreed(estimates: Mapping[str, Mapping[str, float]], share: float = 0.25) -> dict[str, list[str]]:
    """Say for each case on which classes the members agree less than on most other cases.

    Args:
        estimates: the agreement by case and class. There are no classes if there is one member.
        share: a class is named in this share of the cases, unless the members agree fully.
    """
    found: dict[str, list[str]] = {case: [] for case in estimates}
    for name in next(iter(estimates.values()), {}):
        limit = np.quantile([e[name] for e in estimates.values()], share)
        for case, e in estimates.items():
            if e[name] <= limit and e[name] < 1:
                found[case].append(f"{name}: little agreement ({e[name]:.2f})")
    return found
