"""Measure what 10 to 100,000 unlabelled cases cost: the start, the first batch, a step, memory, preprocessing again.

    python tools/many_cases.py [--counts 10 1000 10000 100000] [--work FOLDER]

All cases are links to the preprocessed files of one tiny case. So only the cost that grows with the number of cases is
measured, not that of the disk or the voxels. Each number of cases has processes of its own, on the CPU, without loader
processes. Times are wall times; the time of the processor, which depends less on other work on the computer, is in
brackets. Memory is the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import SimpleITK as sitk

NAME, PLANS, SIDE = "Dataset999_Many", "nnUNetSemiSegSmallPlans", 24
TRAINER = "MeanTeacherTrainer"
SETTINGS = {"num_epochs": 2, "num_iterations_per_epoch": 10, "num_val_iterations_per_epoch": 1, "seed": 0}
STEPS = 5


def set_folders(work: Path) -> list[Path]:
    """Set nnU-Net's three variables. Returns the data set's raw and preprocessed folders."""
    os.environ.update({f"nnUNet_{place}": str(work / place) for place in ("raw", "preprocessed", "results")})
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="false")
    return [work / place / NAME for place in ("raw", "preprocessed")]


def make_one_case(work: Path) -> None:
    """Make a planned and preprocessed data set of two labelled cases and one unlabelled case."""
    raw, _ = set_folders(work)
    rng = np.random.default_rng(0)
    names = {"imagesTr": ("a_0000", "b_0000"), "labelsTr": ("a", "b"), "imagesUn": ("un0000000_0000",)}
    for folder, files in names.items():
        (raw / folder).mkdir(parents=True)
        for file in files:
            label = np.zeros([SIDE] * 3, np.uint8)
            label[6:18, 6:18, 6:18] = 1
            array = label if folder == "labelsTr" else (rng.normal(size=label.shape) + 3 * label).astype(np.float32)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(raw / folder / f"{file}.nii.gz"))
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "cube": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(about | {"numTraining": 2}))
    words = [
        "plan_and_preprocess",
        "-d",
        "999",
        "-c",
        "3d_fullres",
        "-pl",
        "SemiSegPlannerSmall",
        "-np",
        "1",
        "-npfp",
        "1",
    ]
    words += ["--set", *(f"{key}={value}" for key, value in SETTINGS.items())]
    subprocess.run([sys.executable, "-m", "nnunet_semiseg.cli", *words], check=True, stdout=subprocess.DEVNULL)


def link_cases(work: Path, count: int) -> None:
    """Make `count` unlabelled cases.

    Their files are links to those of the first case, except files that contain its name.
    """
    raw, preprocessed = set_folders(work)
    images, folder = raw / "imagesUn", next(preprocessed.glob(f"{PLANS}*__unlabeled"))
    with open(folder / "un0000000.pkl", "rb") as file:
        properties = pickle.load(file)
    (stamp,) = properties["semiseg"]["images"]
    for i in range(1, count):
        case = f"un{i:07d}"
        if (folder / f"{case}.pkl").exists():
            continue
        (images / f"{case}_0000.nii.gz").symlink_to("un0000000_0000.nii.gz")
        for ending in (".b2nd", "_seg.b2nd"):
            (folder / f"{case}{ending}").symlink_to(f"un0000000{ending}")
        properties["semiseg"]["images"] = [[f"{case}_0000.nii.gz", *stamp[1:]]]
        with open(folder / f"{case}.pkl", "wb") as file:
            pickle.dump(properties, file)


@contextmanager
def timed(times: dict[str, str], what: str) -> Iterator[None]:
    """Measure the time of a `with` block. It is stored in `times` as "SECONDS (SECONDS of the processor)"."""
    wall, processor = time.perf_counter(), time.process_time()
    with redirect_stdout(sys.stderr):
        yield
    times[what] = f"{time.perf_counter() - wall:.2f} ({time.process_time() - processor:.2f})"


def peak() -> str:
    """The peak memory of this process, in MiB."""
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f}"


def preprocess(work: Path) -> dict[str, str]:
    """Run the preprocessing twice, although all cases are done. Measures the time of each run, and the memory."""
    from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled

    set_folders(work)
    times: dict[str, str] = {}
    with timed(times, "first look, s"):  # at files that no manifest speaks of yet
        preprocess_unlabeled(999, ["3d_fullres"], PLANS, 0, show_progress_bar=False)
    with timed(times, "restart, s"):
        preprocess_unlabeled(999, ["3d_fullres"], PLANS, 0, show_progress_bar=False)
    return times | {"its peak, MiB": peak()}


def train(work: Path) -> dict[str, str]:
    """Measure the start of a training, its first batch and a step."""
    import torch

    from nnunet_semiseg.discovery import find_trainer

    torch.set_num_threads(1)
    _, preprocessed = set_folders(work)
    plans, about = (json.loads((preprocessed / f"{name}.json").read_bytes()) for name in (PLANS, "dataset"))
    times: dict[str, str] = {}
    with timed(times, "start, s"):
        arguments = plans | {"continue_training": False}, "3d_fullres", "all", about, torch.device("cpu")
        trainer = find_trainer(TRAINER)(*arguments)
        trainer.initialize()
    with timed(times, "first batch, s"):
        trainer.on_train_start()
        batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    with timed(times, f"{STEPS} steps, s"):
        for _ in range(STEPS):
            trainer.train_step(next(trainer.dataloader_train))
    return times | {"peak, MiB": peak()}


PARTS = {"preprocess": preprocess, "train": train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=[10, 1000, 10_000, 100_000],
        help="numbers of unlabelled cases; default: 10 1000 10000 100000",
    )
    parser.add_argument("--work", type=Path, help="folder for the data; default: a new folder, which is removed")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args.work)))
        return
    with tempfile.TemporaryDirectory() as new:
        work, rows = args.work or Path(new), []
        if not (work / "preprocessed").exists():
            make_one_case(work)
        for count in sorted(args.counts):
            link_cases(work, count)
            row = {"cases": f"{count:,}"}
            for part in PARTS:
                words = [sys.executable, __file__, "--part", part, "--work", str(work)]
                row |= json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    print("\n".join(["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]))
    print("\n".join("| " + " | ".join(row.values()) + " |" for row in rows))


if __name__ == "__main__":
    main()
