"""Measure what a second modality is worth, on synthetic images. Each modality shows one organ clearly, one faintly.

    python tools/two_modalities.py WORK [--iterations 1000] [--seeds 3]

It makes three data sets below WORK from the same patients: with both channels (510), with the first only (511) and with
the second only (512). Each has 4 labelled, 40 unlabelled and 20 test cases. Then it runs `nnunet_semiseg compare`: with
SupervisedTrainer and SemiCMLTrainer on both channels, with SupervisedTrainer on one channel. Start an interrupted
command again; it continues. The data shows that the code works; it is no benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_semiseg.demo import SPACING, make_case

CLEAR, FAINT = 1.0, 0.2  # contrast to the tissue around
CONTRASTS = {"clear liver": (CLEAR, FAINT), "clear spleen": (FAINT, CLEAR)}
LABELS = {"background": 0, "liver": 1, "spleen": 2}
DATASETS = {510: ("Both", (0, 1)), 511: ("First", (0,)), 512: ("Second", (1,))}
CASES = {"Tr": 4, "Un": 40, "Ts": 20}
CONFIGURATION, PLANS = "3d_fullres", "nnUNetSemiSegSmallPlans"


def make_modalities(rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Make two images and their label map. Each image also has structures that look like organs but are not."""
    _, labels = make_case(rng)
    labels[labels > 2] = 0
    images = []
    for contrasts in CONTRASTS.values():
        image = np.zeros(labels.shape)
        for _ in range(4):
            center, radius = rng.uniform(0, labels.shape), rng.uniform(2, 5)
            distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(labels.shape), center, strict=True)))
            image[distance < radius] = CLEAR * rng.uniform(0.6, 1.2)
        for label, contrast in enumerate(contrasts, 1):
            image[labels == label] = contrast * rng.uniform(0.8, 1.2)
        image = gaussian_filter(image, 0.7) + 0.3 * rng.standard_normal(labels.shape)
        images.append((image + 2 * gaussian_filter(rng.standard_normal(labels.shape), 6)).astype(np.float32))
    return images, labels.astype(np.uint8)


def write(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(file))


def write_datasets(raw: Path) -> None:
    names = list(CONTRASTS)
    for number, (name, channels) in DATASETS.items():
        folder = raw / f"Dataset{number}_{name}"
        for i, (subset, count) in enumerate(CASES.items()):
            for case in range(count):
                images, labels = make_modalities(np.random.default_rng([i, case]))
                for target, channel in enumerate(channels):
                    file = f"{subset.lower()}_{case:03d}_{target:04d}.nii.gz"
                    write(images[channel], folder / f"images{subset}" / file)
                if subset != "Un":
                    write(labels, folder / f"labels{subset}" / f"{subset.lower()}_{case:03d}.nii.gz")
        content = {"channel_names": {str(i): names[c] for i, c in enumerate(channels)}, "labels": LABELS}
        content |= {"numTraining": CASES["Tr"], "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(content, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK", help="folder for data, plans and models")
    parser.add_argument(
        "--iterations",
        type=int,
        default=1000,
        help="iterations of each training, a multiple of 50; default: %(default)s",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each trainer; default: %(default)s")
    args = parser.parse_args()
    work = args.work.absolute()
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **folders, "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    if not (work / "raw" / "Dataset512_Second" / "dataset.json").is_file():
        write_datasets(work / "raw")

    def run(*words) -> None:
        subprocess.run([sys.executable, "-m", "nnunet_semiseg.cli", *map(str, words)], check=True, env=env)

    settings = [f"num_epochs={args.iterations // 50}", "num_iterations_per_epoch=50", "num_val_iterations_per_epoch=2"]
    for number, (name, channels) in DATASETS.items():
        if not (work / "preprocessed" / f"Dataset{number}_{name}" / f"{PLANS}.json").is_file():
            run("plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-pl", "SemiSegPlannerSmall", "-np", 1,
                "--set", *settings, "bfloat16_on_cpu=true", "save_every=5")  # fmt: skip
        trainers = ["SupervisedTrainer", *(["SemiCMLTrainer"] if len(channels) > 1 else [])]
        run("compare", "-d", number, "-c", CONFIGURATION, "-f", "all", "-p", PLANS, "-device", "cpu", "-np", 1,
            "--seeds", args.seeds, "--trainers", *trainers, "--run", "-o", work / f"report_{name.lower()}")  # fmt: skip


if __name__ == "__main__":
    main()
