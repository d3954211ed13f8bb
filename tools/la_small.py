"""Left atrium MRI with 4 labelled and 56 unlabelled volumes, several trainers and seeds, on a CPU; resumable.

    python tools/la_small.py LA_SMALL WORK --trainers SupervisedTrainer TextSemiSegTrainer --seeds 0 1 2

LA_SMALL holds `images/la_000_0000.nii.gz`, ... and `labels/la_000.nii.gz`, ...: the volumes of the 2018 Atrial
Segmentation Challenge at 1.25 mm. Labelled are la_000 to la_003, unlabelled la_004 to la_059 (their labels are not
copied), tested la_060 to la_079. Everything is made below WORK. Training is nnU-Net's command on fold `all`, to the
last checkpoint; a run that was interrupted goes on, a finished one is left alone. Each seed has plans of its own,
which differ in nothing but the seed and the name. The text encoder is untrained (`tower_config`): no numbers made
with it say what text adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

from nnunet_semiseg.evaluation.metrics import evaluate_folder

DATASET, ID, CONFIGURATION, PLANS = "Dataset501_LA", "501", "3d_fullres", "nnUNetSemiSegSmallPlans"
LABELS = {"background": 0, "left atrium": 1}
ITERATIONS_PER_EPOCH = 100


def tower_config() -> dict:
    """A text transformer of width 128 with 4 layers; the image half is never built on."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
    return {"model_cfg": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}


def prepare(args, env: dict) -> None:
    if not Path(env["nnUNet_raw"], DATASET, "dataset.json").exists():
        cases = [f"la_{i:03d}" for i in range(80)]
        (args.work / "split.json").write_text(json.dumps({"train": cases[:60], "test": cases[60:]}))
        subprocess.run(
            [sys.executable, "-m", "nnunet_semiseg.cli", "convert", "folder", "-i", str(args.source), "-d", ID]
            + ["--labels", "left atrium", "--channels", "MRI", "--name", "LA", "--labeled", str(args.labeled)]
            + ["--split", str(args.work / "split.json"), "-np", "2"],
            check=True,
            env=env,
        )
    if not Path(env["nnUNet_preprocessed"], DATASET, f"{PLANS}_{CONFIGURATION}__unlabeled.json").exists():
        subprocess.run(
            [sys.executable, "-m", "nnunet_semiseg.cli", "plan_and_preprocess", "-d", ID, "-c", CONFIGURATION]
            + ["-pl", "SemiSegPlannerSmall", "-overwrite_target_spacing", "2.5", "2.5", "2.5", "-np", "2"],
            check=True,
            env=env,
        )
    tower = args.work / "text_tower"
    tower.mkdir(exist_ok=True)
    (tower / "open_clip_config.json").write_text(json.dumps(tower_config()))


def write_plans(args, env: dict, seed: int) -> str:
    """Plans for one seed, beside those they are a copy of and on the same data."""
    from nnunet_semiseg.settings.plans import parse_assignments, update_settings

    folder = Path(env["nnUNet_preprocessed"], DATASET)
    name = f"{PLANS}_{args.name}{args.iterations}_seed{seed}"
    file = folder / f"{name}.json"
    settings = {
        "num_epochs": args.iterations // ITERATIONS_PER_EPOCH,
        "num_iterations_per_epoch": ITERATIONS_PER_EPOCH,
        "num_val_iterations_per_epoch": 5,
        "save_every": 2,
        "seed": seed,
        "text_model": str(args.work.absolute() / "text_tower"),
        "text_pretrained": "none",
        **parse_assignments(args.set),
    }
    plans = update_settings(json.loads((folder / f"{PLANS}.json").read_text()), settings)
    plans["plans_name"] = name
    if file.exists() and json.loads(file.read_text()) != json.loads(json.dumps(plans)):
        sys.exit(f"error: {file}: there are runs with other settings under this name: choose another --name")
    file.write_text(json.dumps(plans))
    return name


def run(args, env: dict, trainer: str, seed: int) -> tuple[str, int, Path]:
    plans = write_plans(args, env, seed)
    fold = Path(env["nnUNet_results"], DATASET, f"{trainer}__{plans}__{CONFIGURATION}", "fold_all")
    predictions = args.work / "predictions" / f"{trainer}__{plans}"
    log = args.work / "logs" / f"{trainer}__{plans}.txt"
    log.parent.mkdir(exist_ok=True)
    chosen = ["-tr", trainer, "-p", plans, "-device", "cpu"]
    if not (fold / "checkpoint_final.pth").exists():
        resume = ["--c"] if list(fold.glob("checkpoint_*.pth")) else []
        words = [ID, CONFIGURATION, "all", *chosen, *resume]
        nnunet(args, env, log, "nnunetv2.run.run_training", "run_training_entry", words)
    if not (predictions / "la_079.nii.gz").exists():
        words = ["-d", ID, "-c", CONFIGURATION, "-f", "all", *chosen, "-npp", "1", "-nps", "1"]
        words += ["-i", str(Path(env["nnUNet_raw"], DATASET, "imagesTs")), "-o", str(predictions)]
        nnunet(args, env, log, "nnunetv2.inference.predict_from_raw_data", "predict_entry_point", words)
    return trainer, seed, predictions


def nnunet(args, env: dict, log: Path, module: str, entry: str, words: list[str]) -> None:
    """nnU-Net's command, with as many threads as are this job's share: alone it would take all cores."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    limit = f"import multiprocessing; multiprocessing.cpu_count = lambda: {threads}"
    code = f"{limit}; from {module} import {entry}; {entry}()"
    with open(log, "a", encoding="utf-8") as file:
        subprocess.run(
            [sys.executable, "-c", code, *words],
            check=True,
            stdout=file,
            stderr=file,
            env={**env, "OMP_NUM_THREADS": str(threads)},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="LA_SMALL")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--trainers", nargs="+", default=["SupervisedTrainer", "TextSemiSegTrainer"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--labeled", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--name", default="", help="goes into the plans' name, to tell runs with other --set apart")
    parser.add_argument("--set", nargs="+", action="extend", default=[])
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    folders = {f"nnUNet_{n}": str(args.work.absolute() / n) for n in ("raw", "preprocessed", "results")}
    env = {**os.environ, **folders, "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    prepare(args, env)
    print("| trainer | seed | Dice | spread over cases | HD95, mm |\n|---|---|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, args, env, t, s) for s, t in product(args.seeds, args.trainers)]
        for job in jobs:
            trainer, seed, predictions = job.result()
            rows = evaluate_folder(predictions, Path(env["nnUNet_raw"], DATASET, "labelsTs"), LABELS)
            dice, hd95 = (np.array([row[key] for row in rows]) for key in ("dice", "hd95_mm"))
            cells = trainer, seed, f"{dice.mean():.3f}", f"{dice.std(ddof=1):.3f}", f"{hd95.mean():.2f}"
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
