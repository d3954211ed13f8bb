"""The results of tools/yardstick.py: one row of a CSV file for each run, and the tables of all runs."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, median

import pandas as pd
from filelock import FileLock
from yardstick_sets import ALL, BASELINE, ITERATIONS_PER_EPOCH, SETS, dataset_name


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


# --------------------------------------------------------------------------------------------------------------- CSV


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
