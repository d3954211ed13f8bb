"""Measure which part of the predictions is outside the largest component, and the scores without this part.

    python tools/islands.py REFERENCES PREDICTIONS [PREDICTIONS ...] --label "left atrium=1"

For each folder of predictions it prints the mean Dice and HD95, before and after nnU-Net's post-processing of one
label. It also lists the cases in which post-processing removes more than 300 voxels, with HD95 before and after. This
explains a score. Which post-processing to use must be decided by nnU-Net's cross-validation, not on a test set.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK as sitk
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing_to_folder,
    remove_all_but_largest_component_from_segmentation,
)

from nnunet_semiseg.evaluation.metrics import evaluate_folder

MANY = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("references", type=Path, help="folder of the true labels")
    parser.add_argument(
        "predictions",
        type=Path,
        nargs="+",
        help="folders of predictions in .nii.gz that nnU-Net wrote, with their plans.json and dataset.json",
    )
    parser.add_argument(
        "--label",
        default="left atrium=1",
        metavar="NAME=VALUE",
        help="name and value of the label to measure; default: %(default)s",
    )
    args = parser.parse_args()

    name, value = args.label.rsplit("=", 1)
    labels = {"background": 0, name: int(value)}
    print("| predictions | Dice | HD95 | Dice, largest | HD95, largest | case: voxels outside (HD95) |")
    print("|---|---|---|---|---|---|")
    for folder in args.predictions:
        with TemporaryDirectory() as largest:
            functions = [remove_all_but_largest_component_from_segmentation]
            options = [{"labels_or_regions": labels[name]}]
            apply_postprocessing_to_folder(str(folder), largest, functions, options, num_processes=1)
            before, after = (evaluate_folder(f, args.references, labels) for f in (folder, largest))
            means = (np.mean([row[key] for row in rows]) for rows in (before, after) for key in ("dice", "hd95_mm"))
            cells = [f"{mean:.3f}" for mean in means]
            many = []
            for one, other in zip(before, after, strict=True):
                file = f"{one['case']}.nii.gz"
                whole, part = (sitk.GetArrayFromImage(sitk.ReadImage(str(Path(f, file)))) for f in (folder, largest))
                if (n := int((whole != part).sum())) > MANY:
                    many.append(f"{one['case']}: {n} ({one['hd95_mm']:.0f} to {other['hd95_mm']:.0f})")
        print(f"| {folder.name} | {' | '.join(cells)} | {', '.join(many)} |", flush=True)


if __name__ == "__main__":
    main()
