"""Measure on a CPU what `review` is worth. Two commands test its estimates of Dice, and its lists of cases to label.

    python tools/review_check.py estimates --data DATA --work WORK --sets acdc_small la_small
    python tools/review_check.py loop --data DATA --work WORK --set acdc_small

Both need models that tools/yardstick.py has trained below the same WORK, and do not change them. The true labels of
unlabelled cases are read from DATA. Start an interrupted command again; it continues.

`estimates` reviews all unlabelled cases with each kind of ensemble. For each estimate it prints Spearman's correlation
with the true Dice (a mean over the classes), and which share of the ten worst cases is among the ten with the lowest
estimate.

`loop` begins with a model of few labels. In each round a list chooses cases, their true labels are accepted as
corrected ones (`accept`), and a new model is trained. With --train_on, the training goes on from the last weights. It
prints the Dice on `dev_test` before the first round and after each round. The list for labelling, the list for
correction and random lists all begin with the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr
from yardstick import reader_of
from yardstick_results import Run, scores_of
from yardstick_sets import SETS, RealSet, command, tower_config

WORST = 10


def true_dice(masks: Path, labels: Path, about: RealSet, cases: Sequence[str], raw: Path) -> dict[str, float]:
    """The true Dice of each case, as a mean over the classes."""
    from nnunet_semiseg.evaluation.metrics import evaluate_folder

    rows = evaluate_folder(masks, labels, about.label_map, about.ending, reader_of(raw), cases=cases)
    return pd.DataFrame(rows).groupby("case")["dice"].mean().to_dict()


def agreement_with_truth(table: pd.DataFrame, truth: dict[str, float], estimates: Sequence[str]) -> list[list[str]]:
    """A row for each estimate: its name, Spearman's correlation, and the share of the ten worst cases that it finds.

    Args:
        table: a table with the column `case` and a column for each estimate.
    """
    true = table["case"].map(truth)
    worst = set(true.nsmallest(WORST).index)
    rows = []
    for name in estimates:
        found = len(worst & set(table[name].nsmallest(WORST).index)) / WORST
        rows.append([name, f"{spearmanr(table[name], true)[0]:.2f}", f"{found:.1f}"])
    return rows


def review(root: Path, run: Run, ensemble: str, output: Path, *more: str) -> pd.DataFrame:
    """Review the model of this run below the folder `root`. Returns its `cases.csv`."""
    words = ["review", "-d", run.dataset, "-c", SETS[run.set].configuration, "-f", "all", "-p", run.plans]
    words += ["-tr", run.trainer, "-device", "cpu", "--ensemble", ensemble, "-o", str(output), "--no_pbar", *more]
    set_folders(root)
    command(root / "logs" / f"review_{output.name}.txt", "-m", "nnunet_semiseg.cli", *words)
    return pd.read_csv(output / "cases.csv")


def set_folders(root: Path) -> None:
    os.environ.update({f"nnUNet_{n}": str(root / n) for n in ("raw", "preprocessed", "results")})


def check_estimates(args: argparse.Namespace) -> None:
    """Print a table of the estimates for each set and ensemble."""
    for name in args.sets:
        run, about = run_of(args, name), SETS[name]
        raw = args.work / "raw" / run.dataset
        n, lines = 0, [["ensemble", "estimate", "Spearman", f"of the {WORST} worst"]]
        for ensemble in args.ensembles:
            output = args.work / "review" / f"{run.name}__{ensemble}"
            try:
                table = review(args.work, run, ensemble, output, *(["--disable_tta"] if args.disable_tta else []))
            except RuntimeError as error:  # perhaps the model has no such members: the log says so
                print(f"{name}, {ensemble}: {error}", file=sys.stderr)
                continue
            truth = true_dice(output / "masks", args.data / name / "labels", about, list(table["case"]), raw)
            known = [c for c in ("combined", "agreement", "expected", "certainty") if c in table]
            lines += [[ensemble, *row] for row in agreement_with_truth(table, truth, known)]
            n = len(table)
        if len(lines) == 1:
            continue
        print(f"\n{run.name}: {n} unlabelled cases; {WORST / n:.2f} of the worst by chance\n\n{markdown(lines)}")


# --------------------------------------------------------------------------------------------------------------- loop


def check_loop(args: argparse.Namespace) -> None:
    """Do all rounds for each list (`one_round`), and print the Dice before the first round and after each round.

    There are `--draws` random lists. All this takes hours, because each round trains a model.
    """
    run = run_of(args, args.set)
    first = score(args.work, args.work / "review" / f"{run.name}__first", run, args)
    lines = [["list", *[f"{int(run.labels) + i * args.add} labels" for i in range(args.rounds + 1)]]]
    names = [n for n in args.lists if n != "random"]
    names += [f"random{draw}" for draw in range(args.draws)] if "random" in args.lists else []
    for name in names:
        dices = [first]
        root = args.work / "loop" / f"{run.name}__{name}{'__on' if args.train_on else ''}"
        copy_of_model(args.work, root, run)
        for i in range(1, args.rounds + 1):
            dices.append(one_round(root, run, name, i, args))
        lines.append([name, *(f"{dice:.4f}" for dice in dices)])
        print(f"{name}: {' '.join(f'{dice:.4f}' for dice in dices)}", flush=True)
    print(f"\n{run.name}, {args.add} cases a round\n\n{markdown(lines)}")


def copy_of_model(work: Path, root: Path, run: Run) -> None:
    """Copy the data set and the model for one list, because accepting cases changes both."""
    if (root / "copied").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    unlocked = shutil.ignore_patterns("*.lock")  # another training may use the same cases now
    for place in ("raw", "preprocessed"):
        shutil.copytree(work / place / run.dataset, root / place / run.dataset, ignore=unlocked)
    shutil.copytree(model_of(work, run), model_of(root, run))
    (root / "copied").touch()


def one_round(root: Path, run: Run, name: str, i: int, args: argparse.Namespace) -> float:
    """Choose cases, correct and accept them, and train. Steps that are done are not repeated. Returns the Dice."""
    from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

    before = round_of(run, i - 1)
    chosen = root / f"chosen_{i}.json"
    if not chosen.exists():
        if name.startswith("random"):  # another draw each time and each round
            images = root / "raw" / run.dataset / "imagesUn"
            cases = sorted(get_identifiers_from_splitted_dataset_folder(str(images), SETS[run.set].ending))
            random.Random(100 * int(name.removeprefix("random")) + i).shuffle(cases)
        else:
            cases = list(review(root, before, args.ensemble, root / f"review_{i}", "--for", name)["case"])
        chosen.write_text(json.dumps(cases[: args.add]))
    cases = json.loads(chosen.read_text())
    accepted = root / f"accepted_{i}"
    if not accepted.exists():
        corrected = root / f"corrected_{i}"
        corrected.mkdir(exist_ok=True)
        for case in cases:
            file = f"{case}{SETS[run.set].ending}"
            shutil.copyfile(args.data / run.set / "labels" / file, corrected / file)
        set_folders(root)
        described = json.loads((root / "raw" / run.dataset / "dataset.json").read_bytes())
        # if they are accepted already, this tool was killed right after `accept`
        if cases[0] not in described.get("semiseg", {}).get("accepted", {}):
            words = ["accept", "-d", run.dataset, "-i", str(corrected), "--no_pbar"]
            command(root / "logs" / "accept.txt", "-m", "nnunet_semiseg.cli", *words)
        accepted.touch()
    now = round_of(run, i)
    folder = root / "preprocessed" / run.dataset
    plans = json.loads((folder / f"{run.plans}.json").read_bytes())
    if args.train_on:
        from nnunet_semiseg.settings.plans import update_settings
        from nnunet_semiseg.training_command import fewer_epochs

        first = model_of(root, run) / "fold_all" / "checkpoint_final.pth"
        plans = update_settings(plans, {"num_epochs": fewer_epochs(first)})
    (folder / f"{now.plans}.json").write_text(json.dumps({**plans, "plans_name": now.plans}))
    return score(root, root / f"scored_{i}", now, args, model_of(root, before) if args.train_on else None)


def model_of(root: Path, run: Run) -> Path:
    """The folder of a trained model."""
    return root / "results" / run.dataset / f"{run.trainer}__{run.plans}__{SETS[run.set].configuration}"


class Round(Run):
    """The training after a round. It is the same run, with plans of another name."""

    round: int = 0

    @property
    def plans(self) -> str:
        return super().plans + (f"_round{self.round}" if self.round else "")


def round_of(run: Run, i: int) -> Run:
    later = Round(run.set, run.labels, run.trainer, run.variant, run.seed, run.iterations)
    object.__setattr__(later, "round", i)
    return later


def score(root: Path, output: Path, run: Run, args: argparse.Namespace, start: Path | None = None) -> float:
    """Train if this was not done yet. Then predict the test cases (`dev_test`), and return their mean Dice.

    Args:
        start: the model whose weights the training starts from. None: it starts from random weights.
    """
    from nnunet_semiseg.evaluation.metrics import evaluate_folder
    from nnunet_semiseg.training.checkpoint import CONTINUE_FROM

    about, raw = SETS[run.set], root / "raw" / run.dataset
    if not (output / "dice.json").exists():
        set_folders(root)
        output.mkdir(parents=True, exist_ok=True)
        log = root / "logs" / f"{run.name}.txt"
        words = ["-c", about.configuration, "-f", "all", "-tr", run.trainer, "-p", run.plans, "-device", "cpu"]
        model = model_of(root, run) / "fold_all"
        if not (model / "checkpoint_final.pth").exists():
            os.environ[CONTINUE_FROM] = str(start / "fold_all" / "checkpoint_final.pth") if start else ""
            resume = ["--c"] if any(model.glob("checkpoint_*.pth")) else []
            training = [run.dataset, about.configuration, "all", "-tr", run.trainer, "-p", run.plans, *resume]
            training = [str(output / "times.jsonl"), *training, "-device", "cpu"]
            command(log, "-c", "import yardstick; yardstick.train()", *training)
        predictions = ["-d", run.dataset, "-i", str(raw / "imagesTs"), "-o", str(output / "dev_test")]
        command(log, "-c", "import yardstick; yardstick.predict()", *predictions, *words, "-npp", "0", "-nps", "0")
        rows = evaluate_folder(output / "dev_test", raw / "labelsTs", about.label_map, about.ending, reader_of(raw))
        (output / "dice.json").write_text(json.dumps(scores_of(rows)))
    return json.loads((output / "dice.json").read_text())["dice"]


# --------------------------------------------------------------------------------------------------------------- main


def run_of(args: argparse.Namespace, name: str) -> Run:
    """The run of tools/yardstick.py whose model is reviewed."""
    about = SETS[name]
    return Run(name, about.count(args.labels), args.trainer, args.name, args.seed, args.iterations or about.iterations)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    estimates = commands.add_parser("estimates", help="compare the estimates with the true Dice")
    loop = commands.add_parser("loop", help="label cases in several rounds, and measure the Dice after each round")
    for each in (estimates, loop):
        each.add_argument(
            "--data", type=Path, required=True, help="the folder with a folder for each set, such as DATA/la_small"
        )
        each.add_argument(
            "--work", type=Path, required=True, help="folder in which tools/yardstick.py has written its files"
        )
        each.add_argument(
            "--labels",
            default="few",
            help="number of labelled cases: a number, or few or some, which each data set defines; default: few",
        )
        each.add_argument("--trainer", default="SupervisedTrainer", help="trainer of the model; default: %(default)s")
        each.add_argument("--name", default="default", help="name of the variant in tools/yardstick.py")
        each.add_argument("--seed", type=int, default=0, help="seed of the model; default: %(default)s")
        each.add_argument(
            "--iterations", type=int, help="iterations of the model's training; default: as the data set defines"
        )
    estimates.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=["acdc_small", "la_small"],
        help="the data sets to work on; default: acdc_small la_small",
    )
    estimates.add_argument(
        "--ensembles",
        nargs="+",
        default=["seeds", "teacher", "snapshots", "mirroring"],
        help="kinds of ensembles to compare; default: seeds teacher snapshots mirroring",
    )
    estimates.add_argument(
        "--disable_tta", action="store_true", help="predict without mirroring: four (2d) or eight (3d) times faster"
    )
    estimates.set_defaults(run=check_estimates)
    loop.add_argument("--set", choices=SETS, default="acdc_small", help="the data set to work on; default: %(default)s")
    loop.add_argument("--rounds", type=int, default=2, help="number of rounds; default: %(default)s")
    loop.add_argument(
        "--add", type=int, default=4, help="number of cases that are labelled in each round; default: %(default)s"
    )
    loop.add_argument(
        "--lists",
        nargs="+",
        default=["labelling", "correction", "random"],
        help="kinds of lists that choose the cases; default: labelling correction random",
    )
    loop.add_argument("--draws", type=int, default=3, help="number of random lists; default: %(default)s")
    loop.add_argument(
        "--train_on",
        action="store_true",
        help="train each round from the weights of the last one, for a quarter of the epochs, as train --continue_from"
        " does; by default each round trains a new model from the beginning",
    )
    loop.add_argument("--ensemble", default="mirroring", help="kind of ensemble of the review; default: %(default)s")
    loop.set_defaults(run=check_loop)
    args = parser.parse_args()
    args.data, args.work = args.data.absolute(), args.work.absolute()
    os.environ.update(OMP_NUM_THREADS="1", nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1")
    (args.work / "text_tower").mkdir(parents=True, exist_ok=True)
    (args.work / "text_tower" / "open_clip_config.json").write_text(json.dumps(tower_config()))
    args.run(args)


if __name__ == "__main__":
    main()
