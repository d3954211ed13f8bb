"""Simulate the masks of another model: make the true masks of training cases worse, and add them to a yardstick set.

    python tools/simulated_masks.py --data DATA --work WORK --set la_small --kind good
    python tools/yardstick.py --data DATA --work WORK --sets la_small --trainers SemiSegTrainer MeanTeacherTrainer
        --name good --set external_masks=good

Do the same with `bad`. The masks are made from hidden labels, which no real model knows. So the result shows what masks
of a given quality are worth, and nothing about any real model. `good` shifts each mask by up to 1 voxel along each
axis, erodes or dilates it by 1 voxel or not at all, and gives 1 case in 20 the mask of another case. `bad` erodes by 2
voxels, shifts by 8 to 12 voxels, and gives every second case the mask of another case.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from yardstick_sets import PLANS, SETS, dataset_name, prepare


@dataclass(frozen=True)
class Kind:
    """How a mask is made worse.

    Attributes:
        grow: the possible numbers of dilation steps; a negative number means erosion. One is drawn for each mask.
        shift: the smallest and the largest shift along each axis, in voxels.
        swapped: the share of cases that get the mask of the next one.
    """

    grow: tuple[int, ...]
    shift: tuple[int, int]
    swapped: float


KINDS = {"good": Kind((-1, 0, 1), (0, 1), 0.05), "bad": Kind((-2,), (8, 12), 0.5)}


def worse(label: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Make a label map (*S) worse.

    Each class is dilated or eroded, then all are shifted. Where classes overlap, the higher value stays.
    """
    steps, result = int(rng.choice(kind.grow)), np.zeros_like(label)
    for value in sorted(set(np.unique(label)) - {0}):
        mask = label == value
        if steps:
            change = ndimage.binary_dilation if steps > 0 else ndimage.binary_erosion
            mask = change(mask, iterations=abs(steps))
        result[mask] = value
    low, high = kind.shift
    shift = rng.integers(low, high + 1, label.ndim) * rng.choice((-1, 1), label.ndim)
    return ndimage.shift(result, shift, order=0)


def simulate(labels: dict[str, Path], folder: Path, kind: Kind, seed: int = 0) -> None:
    """Write a mask for each case, on the grid of its image. A swapped mask has the voxels of another case.

    Args:
        labels: the true label file of each case.
    """
    rng = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cases = sorted(labels)
    swapped = set(rng.permutation(cases)[: round(kind.swapped * len(cases))])
    for case, after in zip(cases, [*cases[1:], cases[0]], strict=True):
        own = sitk.ReadImage(str(labels[case]))
        label = sitk.GetArrayFromImage(own)
        if case in swapped:
            label = on_grid_of(sitk.GetArrayFromImage(sitk.ReadImage(str(labels[after]))), label.shape)
        mask = sitk.GetImageFromArray(worse(label, kind, rng))
        mask.CopyInformation(own)
        sitk.WriteImage(mask, str(folder / labels[case].name), useCompression=True)


def on_grid_of(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resize a label map to another shape with nearest neighbours."""
    zoom = [new / old for new, old in zip(shape, label.shape, strict=True)]
    return ndimage.zoom(label, zoom, order=0, grid_mode=True, mode="nearest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder with a folder for each set, such as DATA/la_small"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all files, the same as for tools/yardstick.py"
    )
    parser.add_argument("--set", choices=SETS, default="la_small", help="the data set to work on; default: %(default)s")
    parser.add_argument(
        "--labels",
        default="few",
        help="number of labelled cases, or few or some: the same as for tools/yardstick.py; default: few",
    )
    parser.add_argument("--kind", choices=KINDS, required=True, help="how good the simulated masks are")
    args = parser.parse_args()
    work, count = args.work.absolute(), SETS[args.set].count(args.labels)
    os.environ.update({f"nnUNet_{n}": str(work / n) for n in ("raw", "preprocessed", "results")})
    os.environ.update(nnUNet_def_n_proc="1")
    for name in ("raw", "preprocessed", "results", "logs"):
        (work / name).mkdir(parents=True, exist_ok=True)
    prepare(args.data, work, args.set, count)

    from nnunet_semiseg.data.external_masks import add_masks, table
    from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled

    about, source = SETS[args.set], args.data / args.set
    test = json.loads((source / "protocol.json").read_bytes())["dev_test"]
    raw = work / "raw" / dataset_name(args.set, count)
    images = [f for part in ("imagesTr", "imagesUn") for f in (raw / part).glob(f"*_0000{about.ending}")]
    cases = {file.name.removesuffix(f"_0000{about.ending}") for file in images} - set(test)
    labels = {case: source / "labels" / f"{case}{about.ending}" for case in cases}
    labels = {case: file for case, file in labels.items() if file.is_file()}
    folder = work / "simulated" / f"{raw.name}_{args.kind}"
    simulate(labels, folder, KINDS[args.kind])
    print(table(add_masks(raw.name[7:10], args.kind, folder)))
    preprocess_unlabeled(raw.name[7:10], [about.configuration], PLANS, 1)


if __name__ == "__main__":
    main()
