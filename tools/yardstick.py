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
measure new code, give a --name. The encoder of class prompts is untrained (`tower_config`), so no number here says what
prompts add.

Some sets are made of others: `la_foreign` (half of the unlabelled images are those of acdc_small), `acdc_10` and
`acdc_30` (so many unlabelled volumes), and `busi_shuffled` (each case has the text of another).

A step's time is processor time, so other work on the machine counts little. With --equal-time, the first baseline is
trained for as many seconds as the method: its iterations are multiplied by the ratio of the step times. This ratio is
rounded to a multiple of 0.5, so that several methods share a run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import date
from itertools import product
from pathlib import Path

from filelock import FileLock, Timeout
from yardstick_results import (
    Result,
    Run,
    append,
    equal_time,
    known_results,
    print_tables,
    scores_of,
    step_ratio,
    timing,
)
from yardstick_sets import ALL, BASELINE, ITERATIONS_PER_EPOCH, PLANS, ROOT, SETS, command, prepare, tower_config

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
        "bfloat16_on_cpu": True,  # 1.6 times as fast on a CPU with AVX512-BF16; the runs up to v24 were in float32
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
    settings = " ".join(sorted(args.set))
    try:
        with FileLock(args.work / "locks" / f"{run.name}.lock", blocking=False):
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
            write_plans(args.work, run, args.given)
            measured = measure_run(args.work, run)
            made = {"settings": settings, "date": date.today().isoformat(), "commit": commit}
            append(args.csv, Result(**asdict(run), **made, **measured))
    except Timeout:
        raise RuntimeError("another command works on this run: wait until it has ended") from None


def measure_run(work: Path, run: Run) -> dict:
    """Train, predict and evaluate one run, whose plans are written. Returns the columns of the CSV that are measured.

    Raises:
        RuntimeError: a step failed.
    """
    from nnunet_semiseg.evaluation.metrics import evaluate_folder

    about = SETS[run.set]
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
    rows = evaluate_folder(predictions, raw / "labelsTs", about.label_map, about.ending, reader_of(raw))
    return timing(times, run.iterations) | scores_of(rows)


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with a folder for each set, such as DATA/la_small")
    parser.add_argument("--work", type=Path, help="the folder for all files that are made")
    parser.add_argument(
        "--csv",
        type=Path,
        default=ROOT / "docs" / "yardstick.csv",
        help="a CSV file: each run adds its result, and the tables are made from it; default: docs/yardstick.csv of"
        " this repository",
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
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds: all is run once with each; default: 0 1 2"
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
    return parser.parse_args()


def main() -> None:
    args = parse()
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
