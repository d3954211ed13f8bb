"""The report of a comparison: its tables, tests, figures and findings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_semiseg.evaluation import figures
from nnunet_semiseg.evaluation.jobs import PREDICT_AGAIN
from nnunet_semiseg.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from nnunet_semiseg.evaluation.page import Report, Section, write, write_csv
from nnunet_semiseg.evaluation.request import Request, TestSet
from nnunet_semiseg.evaluation.statistics import SIGNIFICANT, caution, differences_from, spreads
from nnunet_semiseg.files import read_json
from nnunet_semiseg.runs import RECORD, Run, TrainedRun
from nnunet_semiseg.training.loss_term_logger import PREFIX

DIGITS = {metric: 3 if metric in HIGHER_IS_BETTER else 2 for metric in METRICS}
COMPARED = ("dice", "hd95_mm")
"""The metrics that are tested. They are few, because each further test may find a difference by chance."""

METRIC_NOTE = (
    "Means over the classes of a case, then over cases. If a class is in neither prediction nor reference, overlaps and"
    " NSD are 1 and distances 0; if it is in only one of them, overlaps and NSD are 0 and distances are the image's"
    " diagonal. HD95: 95 % Hausdorff distance; ASD: average distance of the prediction's surface to the reference's;"
    " NSD: share of both surfaces within the tolerance of the other. All are computed by MONAI."
)
TEST_NOTE = (
    "The pairs are the cases; each value is a mean over a method's runs. Wilcoxon's signed-rank test, two-sided,"
    " corrected with Holm's method for the number of methods; bootstrap intervals (95 %, 9,999 resamples of the cases);"
    " d_z is the mean of the differences divided by their standard deviation (0.2 small, 0.5 medium, 0.8 large). Tests"
    " and intervals say how these trained models differ on other cases; the spread over runs, how trainings differ."
)


@dataclass(frozen=True)
class Results:
    """Everything that the report shows.

    Attributes:
        runs, upper_bound: the compared runs, and those of the upper bound.
        scores: one row for each `run`, `noise`, `case` and `label`, with the metrics. `run` is the index of the run in
            `[*runs, *upper_bound]`.
        warnings: conditions that differ although they should be the same.
        predictions: the folder of each run's predictions, without noise.
    """

    request: Request
    runs: list[Run]
    upper_bound: list[Run]
    test_set: TestSet
    scores: pd.DataFrame
    warnings: list[str]
    predictions: dict[Run, Path]

    @property
    def everything(self) -> list[Run]:
        """The compared runs, then those of the upper bound."""
        return [*self.runs, *self.upper_bound]


def write_report(results: Results, output: Path) -> Path:
    """Write the report of `compare`. `cases.csv`, `runs.csv` and `differences.csv` hold the numbers of its tables.

    Means over classes, cases or runs that are not in a file can be computed from `cases.csv`. With one trainer there is
    no `differences.csv`. Returns the page.
    """
    scores = tidy(results)
    write_csv(scores, output / "cases.csv")
    clean = scores[scores["noise"] == 0]
    runs = run_table(results)
    write_csv(runs, output / "runs.csv")

    request = results.request
    size = request.main_size
    scores = scores[(scores["num_labeled"] == size_name(size)) | scores["is_upper_bound"]]
    main = scores[scores["noise"] == 0]
    of_case = per_case(main)
    compared = of_case[~of_case["is_upper_bound"]]
    baseline = request.trainers[0]
    tested = COMPARED if len(request.trainers) > 1 else ()
    differences = {metric: differences_from(baseline, compared, metric) for metric in tested}
    case_charts = {f"cases_{metric}": metric for metric in COMPARED}
    sections = [
        summary_section(of_case, request.tolerance),
        *(difference_section(baseline, table, metric) for metric, table in differences.items()),
        class_section(main),
        runs_section(runs),
        cost_section(runs),
        Section("Every case", charts={n: figures.box_plots(main, m, METRICS[m], n) for n, m in case_charts.items()}),
    ]
    if len(request.sizes) > 1:
        sections.append(share_section(per_case(clean)))
    if request.noise:
        sections.append(noise_section(per_case(scores)))
    names = {run: run.title for run in results.runs if run.num_labeled == size}
    names |= {run: f"{run.title}, all labels ({run.dataset})" for run in results.upper_bound}
    logs = {name: TrainedRun(run).curves for run, name in names.items()}
    sections.append(Section("Training", charts={"training": figures.training_curves(logs, PREFIX, "training")}))
    sections += overlay_sections(results, compared, size)
    facts = {
        "data": f"{results.runs[0].dataset}, {request.configuration}, fold {request.fold}, plans {request.plans}",
        "evaluated on": f"{results.test_set.title}, last checkpoint, "
        + ("with" if request.mirroring or results.test_set.is_validation else "without")
        + " mirroring",
        "classes": ", ".join(main["label"].unique()),
        "made with": " ".join(["nnunet_semiseg", *sys.argv[1:]]),
    }
    if request.sizes:
        facts["labelled cases"] = f"{size_name(size)}, except in the curve and in the tables of every run"
    title = f"{', '.join(request.trainers)} on {results.runs[0].dataset}"
    findings = [finding(baseline, table, metric) for metric, table in differences.items()]
    if differences:
        table = pd.concat(differences, names=["metric", "method"]).reset_index()
        write_csv(table, output / "differences.csv")
        findings += caution(compared["case"].nunique())
    return write(Report(title, facts, sections, results.warnings, findings), output)


def size_name(num_labeled: int | None) -> str:
    """The number of labelled cases as the tables show it. None gives `all`."""
    return "all" if num_labeled is None else str(num_labeled)


def tidy(results: Results) -> pd.DataFrame:
    """A copy of `Results.scores` that says in further columns which run each row is of.

    `method` is its trainer and, for the upper bound, also its dataset. `run` is its seed, see `Run.repetition`.
    `num_labeled` is its number of labelled cases as a text, such as "8"; "all" if `--labeled` gives no number.
    `is_upper_bound` is True if the run is one of `Results.upper_bound`.
    """
    bound = len(results.runs)
    about = pd.DataFrame(
        {
            "method": run.trainer if i < bound else f"{run.trainer}, all labels ({run.dataset})",
            "run": run.repetition,
            "num_labeled": size_name(run.num_labeled),
            "is_upper_bound": i >= bound,
        }
        for i, run in enumerate(results.everything)
    )
    scores = results.scores.rename(columns={"run": "index"})
    return about.merge(scores, left_index=True, right_on="index").drop(columns="index").reset_index(drop=True)


def per_case(scores: pd.DataFrame) -> pd.DataFrame:
    """For every run, noise and case, the means over the labels."""
    keys = ["method", "run", "num_labeled", "is_upper_bound", "noise", "case"]
    return scores.groupby(keys, sort=False)[list(METRICS)].mean().reset_index()


def number(metric: str, value: float) -> str:
    """Format a value with as many digits as its metric needs. NaN gives a dash."""
    return "–" if np.isnan(value) else f"{value:.{DIGITS[metric]}f}"


def summary_section(of_case: pd.DataFrame, tolerance: float) -> Section:
    """The section with the means. For the tested metrics it also has the spread over runs and the spread over cases."""
    rows: dict[str, list[str]] = {}
    for metric in sorted(METRICS, key=lambda metric: metric not in COMPARED):
        for method, s in spreads(of_case, metric).iterrows():
            row = rows.setdefault(method, [method, f"{s['runs']:.0f}"])
            row.append(number(metric, s["mean"]))
            if metric in COMPARED:
                row[-1] += f" ± {number(metric, s['over_runs'])} / {number(metric, s['over_cases'])}"
    headings = METRICS | {"nsd": f"NSD, {tolerance:g} mm"}
    headers = ["method", "runs", *(f"{headings[m]}: ± runs / cases" for m in COMPARED)]
    headers += [headings[m] for m in METRICS if m not in COMPARED]
    note = f"± standard deviation over runs / over the {of_case['case'].nunique()} cases. {METRIC_NOTE}"
    return Section("Result", [note], headers, list(rows.values()))


def difference_section(baseline: str, differences: pd.DataFrame, metric: str) -> Section:
    """The section with the differences of a metric from the baseline: one row for each method, with the tests."""
    rows = [
        [
            method,
            f"{d['difference']:+.{DIGITS[metric]}f}",
            interval(metric, d),
            "–" if np.isnan(d["effect"]) else f"{d['effect']:+.2f}",
            f"{d['better']:.0%}",
            *("–" if np.isnan(p) else f"{p:.2g}" for p in (d["p"], d["p_holm"])),
        ]
        for method, d in differences.iterrows()
    ]
    share = "cases with a higher value" if metric in HIGHER_IS_BETTER else "cases with a larger distance"
    headers = ["method", "difference", "95 % interval", "effect d_z", share, "p", "p, Holm"]
    notes = [TEST_NOTE] if metric == COMPARED[0] else []
    return Section(f"{METRICS[metric]}: difference from {baseline}", notes, headers, rows)


def finding(baseline: str, differences: pd.DataFrame, metric: str) -> str:
    """Put the table into words: a sentence for each method, and more if its interval and its p-value disagree."""
    sentences = []
    for method, d in differences.iterrows():
        if np.isnan(d["p"]):
            sentences.append(f"{method} does not differ from {baseline} in any case.")
            continue
        difference = f"{d['difference']:+.{DIGITS[metric]}f}"
        effect = "" if np.isnan(d["effect"]) else f"d_z = {d['effect']:+.2f}; "
        sentences.append(
            f"{method} minus {baseline}: {difference} ({interval(metric, d)}; {effect}p = {d['p_holm']:.2g})."
            + why_they_disagree(d)
        )
    return f"{METRICS[metric]}: " + " ".join(sentences)


def why_they_disagree(d: pd.Series) -> str:
    """An explanation if only one of interval and p-value shows a difference (0 is outside the interval, p is small).

    Else empty.
    """
    if np.isnan(d["low"]):
        return ""
    excludes_zero, is_small = d["low"] > 0 or d["high"] < 0, d["p_holm"] < SIGNIFICANT
    if excludes_zero == is_small:
        return ""
    if excludes_zero:
        return (
            f" The interval excludes 0, but p is not below {SIGNIFICANT}: they disagree. The interval is of the mean,"
            " which a few cases can move, and it is not corrected for the number of methods; p asks whether the cases"
            " change in one direction. So this comparison does not show a difference: test more cases."
        )
    return (
        f" The interval includes 0, but p is below {SIGNIFICANT}: they disagree. Most cases change in one direction,"
        " and a few change so much in the other that the mean may be 0. So the mean does not show a difference: look at"
        " the single cases."
    )


def interval(metric: str, d: pd.Series) -> str:
    """The bounds of the 95 % interval with their signs, or `no interval`."""
    if np.isnan(d["low"]):
        return "no interval"
    return " to ".join(f"{d[key]:+.{DIGITS[metric]}f}" for key in ("low", "high"))


def class_section(main: pd.DataFrame) -> Section:
    """The section with the means over runs and cases, for every method and class."""
    rows = []
    for (method, label), group in main.groupby(["method", "label"], sort=False):
        rows.append([method, label, *(number(metric, group[metric].mean()) for metric in METRICS)])
    return Section("Every class", headers=["method", "class", *METRICS.values()], rows=rows)


def run_table(results: Results) -> pd.DataFrame:
    """A table with one row for each run: its means, its time and its memory."""
    rows = []
    for i, run in enumerate(results.everything):
        trained = TrainedRun(run)
        memory = trained.peak_memory
        record = results.predictions[run] / RECORD
        seconds = read_json(record, PREDICT_AGAIN).get("seconds_per_case", np.nan) if record.is_file() else np.nan
        of_run = results.scores[(results.scores["run"] == i) & (results.scores["noise"] == 0)]
        means = of_run.groupby("case")[list(METRICS)].mean().mean()
        rows.append({
            "run": run.title + (f" ({run.dataset})" if run in results.upper_bound else ""),
            **means,
            "iterations": trained.iterations,
            "training_hours": trained.hours,
            "peak_memory_mib": memory[0] if memory else np.nan,
            "memory": memory[1] if memory else "",
            "parameters": trained.parameters,
            "seconds_per_case": seconds,
        })
    return pd.DataFrame(rows)


def runs_section(runs: pd.DataFrame) -> Section:
    """The section with the means over the cases, for every run."""
    rows = [[r["run"], *(number(m, r[m]) for m in METRICS)] for _, r in runs.iterrows()]
    return Section("Every run", headers=["run", *METRICS.values()], rows=rows)


def cost_section(runs: pd.DataFrame) -> Section:
    """The section with time, memory and parameters of every run. A dash means "not measured"."""

    def missing_or(form: Callable[[float], str], value: float) -> str:
        return "–" if np.isnan(value) else form(value)

    rows = [
        [
            r["run"],
            f"{r['iterations']:,}",
            f"{r['training_hours']:.2f}",
            missing_or(lambda v, r=r: f"{v:,.0f} ({r['memory']})", r["peak_memory_mib"]),
            f"{r['parameters'] / 1e6:.2f}",
            missing_or(lambda v: f"{v:.1f}", r["seconds_per_case"]),
        ]
        for _, r in runs.iterrows()
    ]
    headers = ["run", "iterations", "hours", "peak memory, MiB", "parameters, 10⁶", "prediction, s a case"]
    note = (
        "Hours are those of the epochs. Memory is the most that the training process held on the GPU or, without one,"
        " in RAM; – if this command did not start the training. Parameters are those of the deployed network."
    )
    return Section("What every run took", [note], headers, rows)


def curve_points(of_case: pd.DataFrame, column: str) -> pd.DataFrame:
    """The mean Dice, its spread over trainings and its spread over cases, for each method and value of `column`."""
    points = [
        spreads(group, "dice").assign(x=x)
        for _, of_method in of_case.groupby("method", sort=False)
        for x, group in of_method.groupby(column, sort=False)
    ]
    return pd.concat(points).rename_axis("method").reset_index()


def curve_section(
    title: str, note: str, points: pd.DataFrame, xlabel: str, line_at: tuple[str, float] | None = None
) -> Section:
    """The section with a table of Dice against `xlabel`, and the figure of it."""
    rows = [
        [p["method"], f"{p['x']}", *(number("dice", p[k]) for k in ("mean", "over_runs", "over_cases"))]
        for _, p in points.iterrows()
    ]
    name = title.lower().replace(" ", "_")
    chart = figures.curves(points, xlabel, "Dice", name, line_at)
    headers = ["method", xlabel, "Dice", "± over runs", "± over cases"]
    return Section(title, [note], headers, rows, {name: chart})


def share_section(of_case: pd.DataFrame) -> Section:
    """The section with Dice against the number of labelled cases.

    A horizontal line shows the Dice with all labels: that of the upper bound or, without one, of the first method that
    was trained with all labels.
    """
    is_bound = of_case["is_upper_bound"]
    points = curve_points(of_case[~is_bound], "num_labeled")
    all_labels = curve_points(of_case[is_bound], "num_labeled") if is_bound.any() else points[points["x"] == "all"]
    line_at = None
    if len(all_labels):
        name = all_labels["method"].iloc[0]
        line_at = name if is_bound.any() else f"{name}, all labels", all_labels["mean"].iloc[0]
    note = (
        "The plans, and so the intensity statistics, are those of all labelled cases of the dataset, at every size."
        " Cases without their label are used as unlabelled ones. Bars: spread over runs."
    )
    return curve_section("Share of labels", note, points, "labelled cases", line_at)


def noise_section(of_case: pd.DataFrame) -> Section:
    """The section with Dice against the noise on the test images."""
    note = (
        "Gaussian noise, the same for all methods, is added to the test images after nnU-Net's normalisation and"
        " resampling; its standard deviation is in units of the normalised image. Bars: spread over runs."
    )
    return curve_section("Noise", note, curve_points(of_case, "noise"), "standard deviation of the noise")


def overlay_sections(results: Results, compared: pd.DataFrame, size: int | None) -> list[Section]:
    """The sections with pictures of three cases: the best, the median and the worst by the mean Dice of all methods."""
    ranked = compared.groupby("case")["dice"].mean().dropna().sort_values(ascending=False)
    if ranked.empty:
        return []
    chosen: dict[str, Run] = {}
    for run in results.runs:
        if run.num_labeled == size:
            chosen.setdefault(run.trainer, run)
    sections = []
    for title, i in (("Best case", 0), ("Median case", len(ranked) // 2), ("Worst case", -1)):
        case = ranked.index[i]
        of_case = compared[compared["case"] == case].groupby("method", sort=False)["dice"].mean()
        note = f"{case}: Dice " + ", ".join(f"{method} {value:.3f}" for method, value in of_case.items())
        legend = {"reference": figures.REFERENCE_COLOR, **figures.color_of(list(chosen))}
        images = overlays(results, case, {method: results.predictions[run] for method, run in chosen.items()})
        sections.append(Section(title, [note], legend=legend, images=images))
    return sections


def overlays(results: Results, case: str, folders: Mapping[str, Path]) -> dict[str, str]:
    """Draw the slice with the largest reference and the one with the most errors, cropped to the foreground.

    Returns each picture by its caption.
    """
    test, reader = results.test_set, results.test_set.reader()
    volume, properties = reader.read_images(test.images[case][:1])
    reference = reader.read_seg(str(test.references / f"{case}{test.file_ending}"))[0][0]
    predictions = {m: reader.read_seg(str(folder / f"{case}{test.file_ending}"))[0][0] for m, folder in folders.items()}
    labels = [value for name, value in test.labels.items() if name not in ("background", "ignore")]
    # along the axis with the thickest slices: the plane that radiologists look at
    axis = int(np.argmax(properties["spacing"])) if len(volume[0]) > 1 else 0
    volume, reference = np.moveaxis(volume[0], axis, 0), np.moveaxis(reference, axis, 0)
    predictions = {method: np.moveaxis(p, axis, 0) for method, p in predictions.items()}
    height, width = (s for i, s in enumerate(properties["spacing"]) if i != axis)

    values = np.concatenate([np.atleast_1d(value) for value in labels])
    foreground = [np.isin(x, values) for x in (reference, *predictions.values())]
    amount = foreground[0].sum((1, 2))
    errors = sum((p != reference).sum((1, 2)) for p in predictions.values())
    anywhere = np.argwhere(np.logical_or.reduce(foreground).any(0))
    margin = max(8, min(volume.shape[1:]) // 10)
    if not len(anywhere):
        anywhere = np.array([[0, 0], volume.shape[1:]])
    window = tuple(slice(max(0, a - margin), b + margin) for a, b in zip(anywhere.min(0), anywhere.max(0), strict=True))
    pictures = {}
    for caption, index in (("most of the reference", amount.argmax()), ("most errors", errors.argmax())):
        cut = [x[index][window] for x in (volume, reference, *predictions.values())]
        caption = f"slice {index}: {caption}" if len(volume) > 1 else "the image"
        pictures[caption] = figures.overlay(
            cut[0], cut[1], dict(zip(predictions, cut[2:], strict=True)), labels, float(height / width)
        )
    return pictures
