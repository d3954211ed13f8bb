"""The yardstick: train and test every method in the same way, on the same small real data sets, on a CPU.

    python tools/yardstick.py --data DATA --work WORK --sets la_small --labels few all
    python tools/yardstick.py --data DATA --work WORK --sets la_small --trainers BCPTrainer CPSTrainer --equal-time
    python tools/yardstick.py --data DATA --work WORK --trainers BCPTrainer --name largest --set largest_component=on
    python tools/yardstick.py

The first command makes the two baselines: labelled only and all labels. The second adds methods, the third a variant of
one method. The last prints the tables of all runs, as the others do at their end.

DATA has a folder for each set, with `images/`, `labels/` and `protocol.json`. All files are written below WORK; the
labels of unlabelled cases are never copied there. All runs of a set have the same plans: patch, batch, spacing,
network. A training is nnU-Net's command on fold `all`, in one thread. The last checkpoint is tested on `dev_test`, with
mirroring. An interrupted training continues. A finished one is not repeated, even if the code has changed since: to
measure new code, give a --name. The text encoder is untrained (`tower_config`), so no number here says what text adds.

Some sets are made of others: `la_foreign` (half of the unlabelled images are those of acdc_small), `acdc_10` and
`acdc_30` (so many unlabelled volumes), and `busi_shuffled` (each case has the text of another).

A step's time is processor time, so other work on the machine counts little. With --equal-time, the first baseline is
trained for as many seconds as the method: its iterations are multiplied by the ratio of the step times. This ratio is
rounded to a multiple of 0.5, so that several methods share a run.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from itertools import product
from pathlib import Path
from statistics import mean, median

import pandas as pd
from filelock import FileLock, Timeout

ROOT = Path(__file__).parents[1]
PLANS = "nnUNetSemiSegSmallPlans"  # of SemiSegPlannerSmall: width 16 to 128
BASELINE, ALL = "SupervisedTrainer", "all"
ITERATIONS_PER_EPOCH = 100


@dataclass(frozen=True)
class RealSet:
    """A data set and how it is trained.

    Attributes:
        number: the first digit of its dataset ids. The other digits are the number of labels.
        few, some: the numbers of labels that `few` and `some` stand for in --labels.
        channel: the name of the channel. nnU-Net chooses the normalisation by it.
        spacing: the spacing of `3d_fullres`, in mm. None: that of the data.
        iterations: the iterations of a training, unless --iterations gives another number.
        source: the set whose folder has the cases, if it is not this one.
        shuffled: whether each case has the text of another case.
        unlabelled: the number of unlabelled cases. None: all.
        foreign: a set whose images take the place of half of the unlabelled cases.
    """

    number: int
    few: int
    some: int
    labels: tuple[str, ...]
    channel: str
    configuration: str
    patch: tuple[int, ...]
    batch: int
    spacing: float | None = None
    ending: str = ".nii.gz"
    iterations: int = 2000
    source: str | None = None
    shuffled: bool = False
    unlabelled: int | None = None
    foreign: str | None = None

    def count(self, labels: str) -> str:
        """Convert `few`, `some`, `all` or a number to a number or `all`."""
        return str(getattr(self, labels)) if labels in ("few", "some") else labels

    @property
    def label_map(self) -> dict[str, int]:
        return {name: value for value, name in enumerate(("background", *self.labels))}


SETS = {
    "hippocampus": RealSet(8, 4, 8, ("anterior", "posterior"), "MRI", "3d_fullres", (24, 40, 24), 2, 1.5),
    "acdc_small": RealSet(
        7, 6, 14, ("right ventricle", "myocardium", "left ventricle"), "MRI", "2d", (128, 128), 12
    ),
    "la_small": RealSet(6, 4, 8, ("left atrium",), "MRI", "3d_fullres", (24, 40, 48), 2, 2.5),
    "busi_small": RealSet(9, 24, 24, ("tumour",), "ultrasound", "2d", (128, 128), 12, ending=".png"),
}  # fmt: skip
SETS |= {
    "busi_shuffled": replace(SETS["busi_small"], number=5, source="busi_small", shuffled=True),
    "la_foreign": replace(SETS["la_small"], number=4, source="la_small", foreign="acdc_small"),
    "acdc_10": replace(SETS["acdc_small"], number=3, source="acdc_small", unlabelled=10),
    "acdc_30": replace(SETS["acdc_small"], number=2, source="acdc_small", unlabelled=30),
}


@dataclass(frozen=True)
class Run:
    """One training. `labels` is the number of labelled cases, or `all`."""

    set: str
    labels: str
    trainer: str
    variant: str
    seed: int
    iterations: int

    @property
    def dataset(self) -> str:
        return dataset_name(self.set, self.labels)

    @property
    def plans(self) -> str:
        return f"{self.variant}_{self.iterations}_seed{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.dataset}__{self.trainer}__{self.plans}"

    @property
    def is_plain(self) -> bool:
        """Whether this run is a baseline: labelled only or, with `all`, all labels."""
        return self.trainer == BASELINE and self.variant == "default"

    def fits(self, **values) -> bool:
        return all(getattr(self, name) == value for name, value in values.items())


@dataclass(frozen=True)
class Result(Run):
    """The result of a run: a row of the CSV.

    Attributes:
        settings: the settings given with --set.
        step_ms: the processor time of a step in ms, with the loading of its batch.
        seconds: the processor time of the training.
        dice, hd95_mm: the means over the test cases and the classes.
        dice_of_classes: the Dice of each class, as "NAME DICE; NAME DICE".
        dice_of_cases: the Dice of each test case, as a mean over the classes. Cases are sorted by name.
    """

    settings: str
    date: str
    commit: str
    step_ms: float
    seconds: int
    dice: float
    hd95_mm: float
    dice_of_classes: str
    dice_of_cases: str

    @property
    def run(self) -> Run:
        return Run(**{f.name: getattr(self, f.name) for f in fields(Run)})


# ------------------------------------------------------------------------------------------------------- preparation


def dataset_name(name: str, labels: str) -> str:
    digits = "99" if labels == ALL else f"{int(labels):02d}"
    return f"Dataset{SETS[name].number}{digits}_{name}_{labels}"


def shuffle(texts: dict[str, str]) -> dict[str, str]:
    """Give each case the text of another case, the same one every time."""
    cases = sorted(texts)
    random.Random(0).shuffle(cases)
    return {case: texts[other] for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)}


def split(folder: Path) -> tuple[list[str], list[str]]:
    """The cases for training and for `dev_test` of a folder with `protocol.json`."""
    protocol = json.loads((folder / "protocol.json").read_bytes())
    listed = protocol.get("train") or [*protocol["labelled"], *protocol["unlabelled"]]
    return [case for case in listed if case not in protocol["dev_test"]], protocol["dev_test"]


def make_raw(data: Path, raw: Path, name: str, labels: str) -> None:
    """Copy one set into nnU-Net's layout: the first labelled cases, the other images, and `dev_test`.

    Args:
        data: the folder with a folder for each set: `images`, `labels` and `protocol.json`.
        raw: the folder to make.
        labels: the number of training cases that keep their label, or `all`.
    """
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    about = SETS[name]
    source = data / (about.source or name)
    training, test = split(source)
    labelled = training if labels == ALL else training[: int(labels)]
    unlabelled = [case for case in training if case not in labelled][: about.unlabelled]
    others = split(data / about.foreign)[0][: len(unlabelled) // 2] if about.foreign else []
    unlabelled = unlabelled[: len(unlabelled) - len(others)]
    parts = {"Tr": labelled, "Un": unlabelled, "Ts": test}
    missing = [c for c in (*labelled, *test) if not (source / "labels" / f"{c}{about.ending}").is_file()]
    if missing:
        sys.exit(f"error: {source / 'labels'}: has no {missing[0]}{about.ending}: choose fewer --labels")

    shutil.rmtree(raw, ignore_errors=True)  # what is left of an interrupted beginning
    for part, cases in parts.items():
        kinds = {"images": f"_0000{about.ending}"} | ({} if part == "Un" else {"labels": about.ending})
        for kind, ending in kinds.items():
            (raw / f"{kind}{part}").mkdir(parents=True)
            for case in cases:
                shutil.copyfile(source / kind / f"{case}{ending}", raw / f"{kind}{part}" / f"{case}{ending}")
    for case in others:
        file = f"{case}_0000{about.ending}"
        shutil.copyfile(data / str(about.foreign) / "images" / file, raw / "imagesUn" / file)
    if (source / "texts.json").exists():
        texts = json.loads((source / "texts.json").read_bytes())
        texts = {case: texts[case] for case in training if case in texts}
        (raw / "texts.json").write_text(json.dumps(shuffle(texts) if about.shuffled else texts))
    generate_dataset_json(str(raw), {0: about.channel}, about.label_map, len(labelled), about.ending)


def fit_plans(plans: dict, about: RealSet) -> dict:
    """The plans with the patch size and batch size of the set. The network has as many stages as the patch allows."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    configuration = plans["configurations"][about.configuration]
    _, strides, kernels, patch, _ = get_pool_and_conv_props(configuration["spacing"], about.patch, 4, 999999)
    if tuple(patch) != about.patch:
        sys.exit(f"error: a patch of {about.patch} does not fit a network: {tuple(map(int, patch))} would")
    n = len(strides)
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=n,
        features_per_stage=[min(128, 16 * 2**i) for i in range(n)],
        strides=strides,
        kernel_sizes=kernels,
        n_conv_per_stage=[2] * n,
        n_conv_per_stage_decoder=[2] * (n - 1),
    )
    configuration.update(patch_size=about.patch, batch_size=about.batch)
    return plans


def prepare(data: Path, work: Path, name: str, labels: str) -> None:
    """Make raw data, plans and preprocessed data of one set.

    All numbers of labels use the plans of the smallest one.
    """
    about, dataset = SETS[name], dataset_name(name, labels)
    few = dataset_name(name, str(about.few))
    preprocessed = work / "preprocessed" / dataset
    marker, made_with = preprocessed / "prepared.json", json.dumps(asdict(about))
    if marker.exists():
        if marker.read_text() != made_with:
            sys.exit(f"error: {preprocessed}: was made for other plans: choose another --work, or delete it")
        return
    if dataset != few:
        prepare(data, work, name, str(about.few))
    print(f"preparing {dataset}", flush=True)
    make_raw(data, work / "raw" / dataset, name, labels)
    number, log = dataset[7:10], work / "logs" / f"prepare_{dataset}.txt"
    one = ["-d", number, "-c", about.configuration, "-np", "1"]
    spacing = ["-overwrite_target_spacing", *[str(about.spacing)] * 3] if about.spacing else []
    no_unlabelled = ["--labeled_only"] if labels == ALL else []
    ours = ["-m", "nnunet_semiseg.cli"]
    planner = ["-pl", "SemiSegPlannerSmall", "--no_pp"]
    command(log, *ours, "plan_and_preprocess", *one, *planner, *spacing, *no_unlabelled)
    file = preprocessed / f"{PLANS}.json"
    if dataset == few:
        plans = fit_plans(json.loads(file.read_bytes()), about)
    else:
        plans = json.loads((work / "preprocessed" / few / file.name).read_bytes()) | {"dataset_name": dataset}
    file.write_text(json.dumps(plans, indent=4))
    entry = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry as e; e()"
    command(log, "-c", entry, *one, "-plans_name", PLANS)
    if labels != ALL:
        command(log, *ours, "preprocess_unlabeled", *one, "-plans_name", PLANS, "--clean")
    marker.write_text(made_with)


def tower_config() -> dict:
    """The configuration of a text transformer of width 128 with 4 layers. Its image half is not used."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}
    return {"model_cfg": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}


def command(log: Path, *words: str) -> None:
    """Run Python with these arguments. Its output goes to the log. The command ends when this process ends.

    Raises:
        RuntimeError: the command failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
    with open(log, "ab") as printed:
        with subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=printed,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        ) as process:
            process.wait()  # within: leaving the block closes stdin, and a process that watches it ends
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}; read its output in {log}")


# -------------------------------------------------------------------------------------------------------------- runs


def write_plans(work: Path, run: Run, given: dict) -> None:
    """Write the plans of a run. They differ from those of the set only in the settings and the name.

    Raises:
        RuntimeError: runs with this name have other settings.
    """
    from nnunet_semiseg.settings.plans import update_settings

    folder = work / "preprocessed" / run.dataset
    settings = {
        "num_epochs": run.iterations // ITERATIONS_PER_EPOCH,
        "num_iterations_per_epoch": ITERATIONS_PER_EPOCH,
        "num_val_iterations_per_epoch": 5,
        "save_every": 2,
        "bfloat16_on_cpu": False,  # thin networks are faster in float32: see docs/results.md
        "seed": run.seed,
        "text_model": str(work / "text_tower"),
        "text_pretrained": "none",
        **given,
    }
    base = json.loads((folder / f"{PLANS}.json").read_bytes())
    plans = {**update_settings(base, settings), "plans_name": run.plans}
    file = folder / f"{run.plans}.json"
    if file.exists() and json.loads(file.read_bytes()) != json.loads(json.dumps(plans)):
        raise RuntimeError(f"{file}: there are runs with other settings under this name: choose another --name")
    file.write_text(json.dumps(plans))


def do(args: argparse.Namespace, run: Run, commit: str) -> None:
    """Train, predict and evaluate one run, and store the result. Steps that are done are not repeated.

    Raises:
        RuntimeError: another command works on this run, its settings have changed, or a step failed.
    """
    from nnunet_semiseg.evaluation.metrics import evaluate_folder

    work, about, settings = args.work, SETS[run.set], " ".join(sorted(args.set))
    try:
        with FileLock(work / "locks" / f"{run.name}.lock", blocking=False):
            if there := next((r for r in known_results(args.csv) if r.run == run), None):
                if there.settings != settings:
                    raise RuntimeError(f"was made with other settings ({there.settings}): choose another --name")
                if there.commit != commit:
                    print(
                        f"{run.name}: not repeated: done with commit {there.commit}, and the code is now at {commit}",
                        flush=True,
                    )
                return
            print(f"{run.name} ...", flush=True)
            write_plans(work, run, args.given)
            model = work / "results" / run.dataset / f"{run.trainer}__{run.plans}__{about.configuration}" / "fold_all"
            times, log = work / "times" / f"{run.name}.jsonl", work / "logs" / f"{run.name}.txt"
            if not (model / "checkpoint_final.pth").exists():
                resume = ["--c"] if any(model.glob("checkpoint_*.pth")) else []
                words = [run.dataset, about.configuration, "all", "-tr", run.trainer, "-p", run.plans, *resume]
                command(log, "-c", "import yardstick; yardstick.train()", str(times), *words, "-device", "cpu")
            predictions = work / "predictions" / run.name
            raw = work / "raw" / run.dataset
            if not predictions.exists():
                part = predictions.with_name(f"{run.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                words = ["-d", run.dataset, "-c", about.configuration, "-f", "all", "-tr", run.trainer, "-p", run.plans]
                words += ["-i", str(raw / "imagesTs"), "-o", str(part), "-npp", "0", "-nps", "0", "-device", "cpu"]
                command(log, "-c", "import yardstick; yardstick.predict()", *words)
                part.rename(predictions)
            reader = reader_of(raw)
            rows = evaluate_folder(predictions, raw / "labelsTs", about.label_map, about.ending, reader)
            made = {"settings": settings, "date": date.today().isoformat(), "commit": commit}
            append(args.csv, Result(**asdict(run), **made, **timing(times, run.iterations), **scores_of(rows)))
    except Timeout:
        raise RuntimeError("another command works on this run: wait until it has ended") from None


def reader_of(raw: Path) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    dataset_json = json.loads((raw / "dataset.json").read_bytes())
    example = next((raw / "imagesTs").iterdir())
    return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)


def train() -> None:
    """Run nnU-Net's training command in one thread. `sys.argv` begins with the file for the times.

    The processor time of each epoch, with the loading of batches, is written to that file. The validation after the
    training is skipped: on fold `all` it would predict the training cases.
    """
    from nnunetv2.run.run_training import run_training_entry
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_semiseg.evaluation.worker import end_with_parent

    end_with_parent()
    times = Path(sys.argv.pop(1))
    times.parent.mkdir(parents=True, exist_ok=True)
    begin, end = nnUNetTrainer.on_epoch_start, nnUNetTrainer.on_train_epoch_end
    started = [0.0]

    def on_epoch_start(self):
        started[0] = time.process_time()
        begin(self)

    def on_train_epoch_end(self, train_outputs):
        with open(times, "a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": self.current_epoch, "s": time.process_time() - started[0]}) + "\n")
        end(self, train_outputs)

    nnUNetTrainer.on_epoch_start = on_epoch_start
    nnUNetTrainer.on_train_epoch_end = on_train_epoch_end
    nnUNetTrainer.perform_actual_validation = lambda self, save_probabilities=False: None
    multiprocessing.cpu_count = lambda: 1
    run_training_entry()


def predict() -> None:
    """Run nnU-Net's prediction command in one thread."""
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    from nnunet_semiseg.evaluation.worker import end_with_parent

    end_with_parent()
    multiprocessing.cpu_count = lambda: 1
    predict_entry_point()


def timing(times: Path, iterations: int) -> dict:
    """The seconds of a training, and the milliseconds of a step.

    If an epoch was repeated, only its last time counts.
    """
    lines = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    seconds = sum({line["epoch"]: line["s"] for line in lines}.values())
    return {"step_ms": round(1000 * seconds / iterations, 1), "seconds": round(seconds)}


def scores_of(rows: Sequence[dict]) -> dict:
    """The columns of the CSV for a result, from rows {"case", "label", "dice", "hd95_mm"}. Cases are sorted by name."""
    cases, classes = ({row[key]: [] for row in rows} for key in ("case", "label"))
    for row in rows:
        cases[row["case"]].append(row["dice"])
        classes[row["label"]].append(row["dice"])
    return {
        "dice": round(mean(row["dice"] for row in rows), 4),
        "hd95_mm": round(mean(row["hd95_mm"] for row in rows), 2),
        "dice_of_classes": "; ".join(f"{name} {mean(dices):.4f}" for name, dices in classes.items()),
        "dice_of_cases": " ".join(f"{mean(cases[case]):.4f}" for case in sorted(cases)),
    }


# --------------------------------------------------------------------------------------------------------------- CSV


def read_results(file: Path) -> list[Result]:
    """Read the results in a file. Without a file there are none."""
    if not file.exists():
        return []
    kinds = {"str": str, "int": int, "float": float}
    with open(file, encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    return [Result(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Result)}) for row in rows]


def known_results(file: Path) -> list[Result]:
    """Read the results in a file.

    The baselines of a set are also results of the sets that are made from it, because their labels are the same.
    """
    results = read_results(file)
    plain = [r for r in results if r.is_plain]
    return [*results, *(replace(r, set=name) for name, about in SETS.items() for r in plain if about.source == r.set)]


def append(file: Path, result: Result) -> None:
    """Add a row to the file completely or not at all, even if other processes write to this file."""
    with FileLock(f"{file}.lock"):
        part = file.with_name(f"{file.name}.part")
        with open(part, "w", encoding="utf-8", newline="") as text:
            writer = csv.DictWriter(text, [f.name for f in fields(Result)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in (*read_results(file), result))
        os.replace(part, file)


# ------------------------------------------------------------------------------------------------------------- table


def equal_time(iterations: int, ratio: float) -> int:
    """The number of iterations in which the baseline "labelled only" takes as long as another method.

    `ratio` is the time of a step of the method, divided by that of the baseline "labelled only".
    """
    half = max(ITERATIONS_PER_EPOCH, iterations // 2 // ITERATIONS_PER_EPOCH * ITERATIONS_PER_EPOCH)
    return max(iterations, half * round(ratio * iterations / half))


def step_ratio(results: Sequence[Result], rows: Sequence[Result]) -> float | None:
    """The time of a step in these rows, divided by that of the baseline. None if the baseline was not trained yet."""
    baseline = [r.step_ms for r in results if r.is_plain and r.fits(set=rows[0].set, labels=rows[0].labels)]
    return median(r.step_ms for r in rows) / median(baseline) if baseline else None


def difference(method: Sequence[Result], baseline: Sequence[Result]) -> str:
    """The mean difference over the cases, with its 95 % bootstrap interval.

    The value of a case is its mean over all runs.
    """
    from nnunet_semiseg.evaluation.statistics import differences_from

    rows = [
        {"method": name, "run": result.seed, "case": case, "dice": float(dice)}
        for name, results in (("labelled only", baseline), ("method", method))
        for result in results
        for case, dice in enumerate(result.dice_of_cases.split())
    ]
    d = differences_from("labelled only", pd.DataFrame(rows), "dice").to_dict("index")["method"]
    return f"{d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"


def against(rows: Sequence[Result], baseline: Sequence[Result], all_labels: Sequence[Result]) -> list[str]:
    """The share of the gap between the two baselines that a method closes, and its difference from the lower one."""
    if not baseline:
        return ["-", "-"]
    won = "-"
    if all_labels:
        method, low, high = (mean(r.dice for r in part) for part in (rows, baseline, all_labels))
        won = f"{(method - low) / (high - low):.0%}" if high > low else "no gap"
    return [won, difference(rows, baseline)]


def scores(title: str, rows: Sequence[Result]) -> list[str]:
    """The first cells of a row of the table: Dice of each run, mean, lowest Dice of a class in any run, and HD95.

    The cell with the lowest Dice names the class. If it is 0, one run did not find this class at all.
    """
    classes = [entry.rsplit(" ", 1) for row in rows for entry in row.dice_of_classes.split("; ")]
    lowest, dice = min(classes, key=lambda entry: float(entry[1]))
    dices = " ".join(f"{r.dice:.3f}" for r in sorted(rows, key=lambda r: r.seed))
    hd95 = f"{mean(r.hd95_mm for r in rows):.2f}"
    return [title, dices, f"{mean(r.dice for r in rows):.3f}", f"{float(dice):.3f} {lowest}", hd95]


def table(results: Sequence[Result], name: str, labels: str, iterations: int) -> str:
    """Make a Markdown table of all methods for one set, number of labels and number of iterations."""
    here = [r for r in results if r.fits(set=name, labels=labels)]
    only = [r for r in here if r.is_plain and r.iterations == iterations]
    every = [r for r in results if r.is_plain and r.fits(set=name, labels=ALL, iterations=iterations)]
    methods: dict[str, list[Result]] = {}
    for r in here:
        if r.iterations == iterations and not r.is_plain:
            title = r.trainer if r.variant == "default" else f"{r.trainer}, {r.variant}"
            methods.setdefault(title, []).append(r)

    head = ["method", "Dice of each run", "mean", "lowest class", "HD95, mm", "share won", "difference over cases"]
    head += ["step", "labelled only at equal time", "share won", "difference over cases"]
    lines = [
        head,
        *([*scores(t, rows), *["-"] * 6] for t, rows in (("labelled only", only), ("all labels", every)) if rows),
    ]
    for title, rows in sorted(methods.items(), key=lambda item: -mean(r.dice for r in item[1])):
        line = [*scores(title, rows), *against(rows, only, every)]
        ratio = step_ratio(results, rows)
        if ratio is None:
            line += ["-"] * 4
        else:
            longer = equal_time(iterations, ratio)
            same_time = [r for r in here if r.is_plain and r.iterations == longer]
            dice = f", {mean(r.dice for r in same_time):.3f}" if same_time else ""
            line += [f"{ratio:.2f}", f"{longer:,}{dice}", *against(rows, same_time, every)]
        lines.append(line)
    text = [f"| {' | '.join(line)} |" for line in lines]
    text.insert(1, "|" + "---|" * len(head))
    return f"{name}, {labels} labelled, {iterations:,} iterations\n\n" + "\n".join(text)


def print_tables(results: Sequence[Result], sets: Sequence[str]) -> None:
    """Print a table for each set, number of labels and number of iterations. Runs that --equal-time added have none."""
    for name, labels, iterations in sorted({(r.set, r.labels, r.iterations) for r in results}):
        methods = any(not r.is_plain for r in results if r.fits(set=name, labels=labels, iterations=iterations))
        if name in sets and labels != ALL and (methods or iterations == SETS[name].iterations):
            print(f"\n{table(results, name, labels, iterations)}")


# -------------------------------------------------------------------------------------------------------------- main


def wanted(args: argparse.Namespace) -> list[Run]:
    """The runs that the user asks for: first all with the first seed, then all with the next seed."""
    runs = []
    for seed, trainer, name, labels in product(args.seeds, args.trainers, args.sets, args.labels):
        count = SETS[name].count(labels)
        if count != ALL or trainer == BASELINE:  # nothing is unlabelled there
            variant = args.name or "default"
            runs.append(Run(name, count, trainer, variant, seed, args.iterations or SETS[name].iterations))
    return list(dict.fromkeys(runs))


def equal_time_runs(results: Sequence[Result], asked: Sequence[Run]) -> list[Run]:
    """The longer runs of the baseline "labelled only" that these runs are compared with."""
    longer = []
    for run in asked:
        rows = [r for r in results if replace(r.run, seed=run.seed) == run]
        if rows and run.trainer != BASELINE and (ratio := step_ratio(results, rows)):
            iterations = equal_time(run.iterations, ratio)
            longer.append(replace(run, trainer=BASELINE, variant="default", iterations=iterations))
    return list(dict.fromkeys(longer))


def do_all(jobs: int, runs: Sequence[Run], one: Callable[[Run], None]) -> int:
    """Do all runs, `jobs` at a time. A failed run does not stop the others. Returns the number of failed runs."""
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(one, run): run for run in runs}
        for future, run in futures.items():
            try:
                future.result()
            except KeyboardInterrupt:
                os._exit(130)  # at once, without waiting for the others: the trainings end with us
            except Exception as e:
                failed += 1
                print(f"error: {run.name}: {e}", file=sys.stderr, flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with a folder for each set, such as DATA/la_small")
    parser.add_argument("--work", type=Path, help="the folder for all files that are made")
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "docs" / "yardstick.csv", help="the file with the results of all runs"
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=["hippocampus", "acdc_small", "la_small"],
        help="the data sets to work on; default: hippocampus acdc_small la_small",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        default=["few"],
        help="numbers of labelled cases: a number, all, or few or some, which each data set defines; default: few",
    )
    parser.add_argument(
        "--trainers", nargs="+", default=[BASELINE], help="trainers to measure; default: SupervisedTrainer"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds, one for each run; default: 0 1 2"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        help="iterations of a training, a multiple of 100; default: as the data set defines",
    )
    parser.add_argument("--name", default="", help="name of a variant, for runs with other settings or with other code")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the trainers; needs --name, the name of these runs in the tables",
    )
    parser.add_argument(
        "--equal-time", action="store_true", help="also train with labels only, for as long as each method takes"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of runs at the same time, each with one thread; default: 2"
    )
    args = parser.parse_args()

    failed = 0
    if args.data and args.work:
        failed = measure(args)
    elif args.data or args.work:
        sys.exit("error: give both --data and --work, or neither to print the tables")
    print_tables(known_results(args.csv), args.sets)
    if failed:
        sys.exit(f"error: {failed} runs failed, see above")


def measure(args: argparse.Namespace) -> int:
    """Do the runs that the user asks for. Returns the number of failed runs."""
    if args.set and not args.name:
        sys.exit("error: --set: name these runs with --name")
    if args.iterations and args.iterations % ITERATIONS_PER_EPOCH:
        sys.exit(f"error: --iterations {args.iterations}: must be a multiple of {ITERATIONS_PER_EPOCH}")
    args.work, args.csv = args.work.absolute(), args.csv.absolute()
    os.environ.update({f"nnUNet_{n}": str(args.work / n) for n in ("raw", "preprocessed", "results")})
    os.environ.update(OMP_NUM_THREADS="1", nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1")
    os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="4294967296")  # memory is kept from step to step
    for name in ("raw", "preprocessed", "results", "locks", "predictions", "text_tower"):
        (args.work / name).mkdir(parents=True, exist_ok=True)
    (args.work / "text_tower" / "open_clip_config.json").write_text(json.dumps(tower_config()))

    from nnunet_semiseg.settings.plans import parse_assignments

    args.given = parse_assignments(args.set)
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()

    asked = wanted(args)
    for name, labels in dict.fromkeys((run.set, run.labels) for run in asked):
        with FileLock(args.work / "locks" / f"prepare_{name}.lock"):
            prepare(args.data, args.work, name, labels)
    failed = do_all(args.jobs, asked, lambda run: do(args, run, commit))
    if args.equal_time:
        plain = argparse.Namespace(**{**vars(args), "set": [], "given": {}})
        longer = equal_time_runs(known_results(args.csv), asked)
        failed += do_all(args.jobs, longer, lambda run: do(plain, run, commit))
    return failed


if __name__ == "__main__":
    main()
