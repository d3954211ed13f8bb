"""``nnunet_semiseg demo``: train with and without unlabelled images on a synthetic data set, in minutes on a CPU.

It runs the commands that a user would type, in processes of their own. Apart from the command `demo`, no other module
of the package uses this one.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import folder_for, make_folder
from nnunet_semiseg.text.static_words import WORDLLAMA

DATASET_ID, DATASET = 999, "Dataset999_SemiSegDemo"
PLANNER, PLANS = "SemiSegPlannerSmall", "nnUNetSemiSegSmallPlans"
TRAINERS = BASELINE, METHOD = "SupervisedTrainer", "SemiSegTrainer"

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}
PROMPTS = {"background": "tissue around the organs", **{k: f"the {k}" for k in LABELS if LABELS[k]}}
SHAPE, SPACING = (24, 24, 24), (3.5, 3.5, 3.5)  # z y x, in mm

METRICS = {"dice": "Dice (higher is better)", "hd95_mm": "95 % Hausdorff distance in mm (lower is better)"}
COLORS = {"liver": "#ff5a4f", "spleen": "#4fd06a", "kidney": "#4fa8ff"}


# ------------------------------------------------------------------------------------------------ the data set


@dataclass(frozen=True)
class Organ:
    """The average shape of an organ in the synthetic abdomen. Every case varies it."""

    center: tuple[float, float, float]  # z y x, in mm from the image's centre
    radii: tuple[float, float, float]  # mm
    brightness: float


ORGANS = {
    LABELS["liver"]: Organ((-4, -4, -16), (24, 26, 20), 0.9),
    LABELS["spleen"]: Organ((8, 6, 24), (16, 19, 16), 1.5),
    LABELS["kidney"]: Organ((-18, 20, 6), (20, 14, 14), 2.1),
}


def make_case(rng: np.random.Generator, *, other_scanner: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Make a synthetic abdomen: deformed superellipsoids among structures that look similar.

    The brightness of an organ differs from case to case, and the tissue has bright structures that are not organs. An
    organ can be recognised by its size, its shape and its place.

    Args:
        rng: the source of all random numbers.
        other_scanner: whether the image has the contrast of another scanner, and is brighter near a coil.

    Returns:
        The image, float32, and the labels, uint8, both of shape `SHAPE`.
    """
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SHAPE, SPACING, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    points += 4 * np.stack([_smooth_noise(rng, 4) for _ in range(3)])  # 4 mm: the deformation

    image = np.where(_superellipsoid(points, (0, 0, 0), (60, 40, 40), Rotation.identity(), 3), 0, -1.5)
    body = image == 0
    image[body] += rng.normal(0, 0.1)
    for _ in range(3):
        center, radii = rng.uniform(-36, 36, 3), rng.uniform(5, 12, 3)
        structure = _superellipsoid(points, center, radii, Rotation.random(rng=rng), rng.uniform(1.5, 4))
        image[structure & body] = rng.uniform(0.4, 2.2)

    labels = np.zeros(SHAPE, np.uint8)
    pose, size, contrast = _tilt(rng, 0.15), rng.uniform(0.85, 1.1), rng.uniform(0.7, 1.2)
    for label, organ in ORGANS.items():
        center = size * pose.apply(organ.center) + rng.normal(0, 3, 3)
        radii = size * np.multiply(organ.radii, rng.uniform(0.75, 1.15, 3))
        inside = _superellipsoid(points, center, radii, pose * _tilt(rng, 0.3), rng.uniform(1.6, 4))
        labels[inside] = label
        image[inside] = contrast * (organ.brightness + rng.normal(0, 0.1))

    if other_scanner:
        bright = image > 0
        image[bright] = 2 * (image[bright] / 2) ** rng.uniform(0.4, 2)
        to_coil = Rotation.random(rng=rng).apply((0, 0, 1))
        image[body] += rng.uniform(0, 1) * np.tensordot(to_coil, points, 1)[body] / 40  # the body ends at about 40 mm

    image = gaussian_filter(image, 0.7)  # partial volumes
    image += 0.3 * _smooth_noise(rng, 8)  # bias field
    image += 0.1 * _smooth_noise(rng, 1) + 0.2 * rng.standard_normal(SHAPE)  # texture and noise
    return image.astype(np.float32), labels


def _smooth_noise(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Gaussian noise with unit variance and a correlation length of sigma voxels."""
    noise = gaussian_filter(rng.standard_normal(SHAPE), sigma, mode="wrap")
    return noise / noise.std()


def _superellipsoid(points: np.ndarray, center, radii, rotation: Rotation, power: float) -> np.ndarray:
    """Whether each point (3, *S) lies inside a superellipsoid: sum |x / r|^power < 1, with x in the rotated frame."""
    x = np.tensordot(rotation.inv().as_matrix(), points - np.reshape(center, (3, 1, 1, 1)), 1)
    return (np.abs(x / np.reshape(radii, (3, 1, 1, 1))) ** power).sum(0) < 1


def _tilt(rng: np.random.Generator, radians: float) -> Rotation:
    return Rotation.from_rotvec(rng.normal(0, radians, 3))


def write_dataset(folder: Path, num_labeled: int, num_unlabeled: int, num_test: int, seed: int = 0) -> None:
    """Write a raw data set for nnU-Net with `imagesUn`. The labels of unlabelled cases are not written anywhere.

    All labelled cases come from one scanner, as often in a hospital. Unlabelled and test cases come from others.
    """
    subsets = {"Tr": num_labeled, "Un": num_unlabeled, "Ts": num_test}
    for subset, count in subsets.items():
        for i in range(count):
            rng = np.random.default_rng([seed, list(subsets).index(subset), i])
            image, labels = make_case(rng, other_scanner=subset != "Tr")
            case = f"{subset.lower()}_{i:03d}"
            _write(folder / f"images{subset}" / f"{case}_0000.nii.gz", image)
            if subset != "Un":
                _write(folder / f"labels{subset}" / f"{case}.nii.gz", labels)
    dataset_json = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": num_labeled,
        "file_ending": ".nii.gz",
        "semiseg": {"prompts": PROMPTS},
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json, indent=2))


def _write(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, file)


# --------------------------------------------------------------------------------------------------- the commands


def run_demo(
    output: str | Path | None = None,
    device: str = "cpu",
    *,
    cases: tuple[int, int, int] = (4, 24, 12),
    num_epochs: int = 10,
    num_iterations_per_epoch: int = 50,
) -> None:
    """Make the data, plan, train both trainers, predict, evaluate, and save a picture.

    Args:
        output: a new or empty folder. Default: `nnunet_semiseg_demo`.
        device: the value for nnU-Net's option `-device`.
        cases: the numbers of labelled, unlabelled and test cases.
        num_epochs, num_iterations_per_epoch: the length of each of the two trainings.

    Raises:
        UserError: the folder is not empty, is a file or cannot be made; a command failed (its last lines are printed).
    """
    output = folder_for(output or "nnunet_semiseg_demo")
    make_folder(output)
    if any(output.iterdir()):
        raise UserError(f"{output}: exists already: remove it, or choose another folder with -o FOLDER")
    console = Console()
    folders = {f"nnUNet_{name}": str(output / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
    raw = Path(folders["nnUNet_raw"], DATASET)

    console.say("making {} labelled cases of one scanner, {} unlabelled and {} test cases of others".format(*cases))
    write_dataset(raw, *cases)

    # The trainings are small: one worker is enough, and compiling would take longer than the time it saves. On shared
    # cores, threads that wait actively made a step four times as long.
    settings = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "OMP_WAIT_POLICY": "PASSIVE"}
    console.say("to type the commands yourself, set")
    for name, value in (folders | settings).items():
        print(f"        export {name}={shlex.quote(value)}")
    runner = Runner(console, output / "logs", os.environ | folders | settings)

    d = str(DATASET_ID)
    runner.run(
        "plan",
        ["nnunet_semiseg", "plan_and_preprocess", "-d", d, "-c", "3d_fullres", "-pl", PLANNER]
        + ["--set", f"num_epochs={num_epochs}", f"num_iterations_per_epoch={num_iterations_per_epoch}"]
        + ["num_val_iterations_per_epoch=2", "seed=0", f"text_model={WORDLLAMA}"],
    )
    for trainer in TRAINERS:
        runner.run(
            f"train_{trainer}",
            ["nnUNetv2_train", d, "3d_fullres", "all", "-tr", trainer, "-p", PLANS, "-device", device],
        )
        runner.run(
            f"predict_{trainer}",
            ["nnUNetv2_predict", "-d", d, "-c", "3d_fullres", "-f", "all", "-tr", trainer, "-p", PLANS]
            + ["-i", str(raw / "imagesTs"), "-o", str(output / "predictions" / trainer)]
            + ["-device", device, "-npp", "0", "-nps", "0", "--disable_tta"],
        )
    console.say("evaluating")
    rows = evaluate(output / "predictions", raw / "labelsTs", output / "metrics.csv")
    save_overlay(raw, output / "predictions", output / "overlay.png")
    print("\n" + format_table(rows) + "\n")
    print(
        f"One run each, with equal iterations: {num_epochs * num_iterations_per_epoch}. The prompts of the organs are"
    )
    print(
        f"in dataset.json: train TextSemiSegTrainer to use them. Its text model: the trained embeddings of {WORDLLAMA}."
    )
    console.say(f"done. Every case: {output / 'metrics.csv'}. Picture: {output / 'overlay.png'}")


class Console:
    """Prints lines with the time since the start."""

    def __init__(self):
        self.start = time.perf_counter()

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self.start), 60)
        print(f"{minutes:4d}:{seconds:02d}  {text}", flush=True)


class Runner:
    """Runs commands. Their output goes to a file, and the console shows the epochs."""

    def __init__(self, console: Console, logs: Path, env: dict[str, str]):
        self.console, self.logs = console, logs
        scripts = sysconfig.get_path("scripts")  # the environment does not have to be activated
        self.env = {**env, "PATH": scripts + os.pathsep + env.get("PATH", ""), "PYTHONUNBUFFERED": "1"}
        logs.mkdir()

    def run(self, name: str, command: list[str]) -> None:
        log = self.logs / f"{name}.txt"
        self.console.say(f"$ {shlex.join(command)}")
        executable = shutil.which(command[0], path=self.env["PATH"])
        if executable is None:
            raise UserError(f"{command[0]}: no such command: install nnunet-semiseg again with pip")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        pipes |= {"encoding": "utf-8", "errors": "replace"}
        with (
            open(log, "w", encoding="utf-8") as file,
            subprocess.Popen([executable, *command[1:]], env=self.env, **pipes) as process,
        ):
            for line in process.stdout:
                file.write(line)
                if epoch := re.search(r"Epoch (\d+)\s*$", line):
                    self.console.say(f"    epoch {epoch[1]}")
                if end := re.search(r"expected end: .*, in (\S+)$", line):
                    self.console.say(f"    {end[1]} left of this training")
        if process.returncode:
            print("".join(f"    | {line}\n" for line in log.read_text(encoding="utf-8").splitlines()[-15:]))
            raise UserError(f"{command[0]} failed with exit status {process.returncode}: read its output in {log}")


# ---------------------------------------------------------------------------------------------------- the results


def evaluate(predictions: Path, references: Path, csv_file: Path) -> list[dict]:
    """Compute the metrics of every trainer, case and organ. Returns them as rows, and writes them to a file."""
    from nnunet_semiseg.evaluation.metrics import evaluate_folder  # MONAI takes seconds to import

    rows = [
        {"trainer": trainer, **row}
        for trainer in TRAINERS
        for row in evaluate_folder(predictions / trainer, references, LABELS)
    ]
    with open(csv_file, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def format_table(rows: list[dict]) -> str:
    """A table of means over the cases, for each organ and for all organs: each trainer, and their difference."""
    organs = [name for name in LABELS if LABELS[name]]
    headings = (*TRAINERS, "difference")

    def line(first: str, cells) -> str:
        return first.ljust(15) + "".join(c.rjust(len(h) + 2) for c, h in zip(cells, headings, strict=True))

    lines = [line(f"{len({row['case'] for row in rows})} test cases", headings)]
    for metric, title in METRICS.items():
        lines.append(title)
        means = np.array([
            [np.nanmean([r[metric] for r in rows if (r["trainer"], r["label"]) == (t, o)]) for t in TRAINERS]
            for o in organs
        ])
        for name, (baseline, method) in zip((*organs, "mean"), (*means, means.mean(0)), strict=True):
            digits = 3 if metric == "dice" else 2
            cells = f"{baseline:.{digits}f}", f"{method:.{digits}f}", f"{method - baseline:+.{digits}f}"
            lines.append(line(f"  {name}", cells))
    return "\n".join(lines)


def save_overlay(raw: Path, predictions: Path, png_file: Path, num_cases: int = 4) -> None:
    """Save the middle slices of the first test cases, with contours of the reference and of each prediction."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    def read(file: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(file))[SHAPE[0] // 2]

    cases = sorted(file.name for file in (raw / "labelsTs").iterdir())[:num_cases]
    columns = {"reference": raw / "labelsTs", **{trainer: predictions / trainer for trainer in TRAINERS}}
    figure = Figure(figsize=(2.6 * len(cases), 8.2), layout="constrained")
    axes = figure.subplots(len(columns), len(cases), squeeze=False)
    for row, (title, folder) in zip(axes, columns.items(), strict=True):
        row[0].set_ylabel(title)
        for ax, case in zip(row, cases, strict=True):
            ax.imshow(read(raw / "imagesTs" / case.replace(".nii.gz", "_0000.nii.gz")), cmap="gray")
            reference, labels = read(raw / "labelsTs" / case), read(folder / case)
            for name, color in COLORS.items():
                ax.contour(reference == LABELS[name], [0.5], colors="white", linewidths=0.7)
                ax.contour(labels == LABELS[name], [0.5], colors=color, linewidths=1.5)
            ax.set(xticks=[], yticks=[])
    handles = [Line2D([], [], color=color, label=name) for name, color in COLORS.items()]
    handles.append(Line2D([], [], color="white", linewidth=1, label="reference"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), facecolor="gray", labelcolor="white")
    figure.savefig(png_file, dpi=110)
