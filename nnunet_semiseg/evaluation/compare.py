"""`nnunet_semiseg compare`: train what is missing, predict, evaluate, and write a report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.cluster import do_all_in_queue, parameters_of, refuse_unused, slurm_executor, starter
from nnunet_semiseg.evaluation.jobs import (
    LOGS,
    alone,
    do_all,
    is_predicted,
    prediction_job,
    predictions_folder,
    training_job,
)
from nnunet_semiseg.evaluation.report import Results, write_report
from nnunet_semiseg.evaluation.request import (
    Request,
    TestSet,
    check_disjoint,
    check_numbers,
    check_sizes,
    find_devices,
    find_test_set,
    make_runs,
)
from nnunet_semiseg.evaluation.scores import evaluate
from nnunet_semiseg.files import folder_for
from nnunet_semiseg.runs import Run, unequal_conditions


def compare(request: Request, output: str | Path | None = None, run: bool = False) -> Path:
    """Compare trainers on one dataset.

    Args:
        output: the folder for predictions, logs and the report. Default: a folder in the dataset's results.
        run: first train the models that are missing.

    Returns:
        The report, a page of HTML.

    Raises:
        UserError: the options are wrong; there are no references (see `find_test_set`); a model is not trained, and
            `run` is False; a training or prediction failed.
    """
    check_numbers(request)
    runs, upper_bound = make_runs(request)
    test_set = find_test_set(request)
    check_sizes(request, runs[0])
    if upper_bound:
        check_disjoint(test_set, upper_bound[0])
    devices = find_devices(request)
    refuse_unused(request)
    parameters = parameters_of(request.slurm, request.device)
    everything = [*runs, *upper_bound]
    # with a test set, nnU-Net's validation is not used: it may be incomplete, or of an older checkpoint
    missing = [r for r in everything if not (r.is_validated if test_set.is_validation else r.is_trained)]
    if missing and not run:
        first = missing[0]
        what, why = "not trained", f"no {first.checkpoint}"
        if first.is_trained:
            what = "not validated with the last checkpoint"
            why = f"{first.validation / 'summary.json'} is missing or too old"
        names = "; ".join(r.title for r in missing if r.is_trained == first.is_trained)
        raise UserError(f"{what}: {names} ({why}): add --run")
    if output is None:
        output = runs[0].model_folder.parent / "comparison" / f"{runs[0].configuration}__fold_{request.fold}"
    output = folder_for(output)
    for r in missing:
        r.check()

    with alone(output):
        for r in missing:
            r.write_plans()
        if request.executor == "local":
            work = partial(do_all, devices=devices, logs=output / LOGS, start=starter(output / LOGS))
        else:
            executor = slurm_executor(output / LOGS, parameters)
            work = partial(do_all_in_queue, executor=executor, logs=output / LOGS)
        work([training_job(r, request.device) for r in missing])
        if not test_set.is_validation:
            jobs = [
                prediction_job(r, noise, request, test_set, output)
                for r in everything
                for noise in noise_levels(request, r, upper_bound)
            ]
            work([job for job in jobs if not is_predicted(job, test_set)])
        return write_report(collect(request, runs, upper_bound, test_set, output), output)


def noise_levels(request: Request, run: Run, upper_bound: Sequence[Run]) -> tuple[float, ...]:
    """The noise levels for which the report shows the predictions of this run."""
    noisy = run in upper_bound or run.num_labeled == request.main_size
    return (0.0, *request.noise) if noisy else (0.0,)


def collect(request: Request, runs: list[Run], upper_bound: list[Run], test_set: TestSet, output: Path) -> Results:
    """Evaluate the predictions of every run, with and without noise, against the references of the test set."""
    everything = [*runs, *upper_bound]
    folders = {
        run: run.validation if test_set.is_validation else predictions_folder(run, 0.0, output) for run in everything
    }
    tables = []
    for i, run in enumerate(everything):
        for noise in noise_levels(request, run, upper_bound):
            folder = predictions_folder(run, noise, output) if noise else folders[run]
            print(f"evaluating {run.title}{f', noise {noise:g}' if noise else ''} ({run.dataset})", flush=True)
            cache = output / "scores" / f"{predictions_folder(run, noise, output).name}.json"
            rows = evaluate(folder, test_set, request, cache)
            tables.append(pd.DataFrame(rows).assign(run=i, noise=noise))
    scores, warnings = pd.concat(tables, ignore_index=True), unequal_conditions(runs, upper_bound)
    return Results(request, runs, upper_bound, test_set, scores, warnings, folders)
