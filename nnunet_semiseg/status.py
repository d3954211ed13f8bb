"""`nnunet_semiseg status`: what exists of a dataset, from the raw cases to the reports, and the next command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import count as count_up
from pathlib import Path

from nnunet_semiseg.data.half_accepted import journals
from nnunet_semiseg.data.known_reviews import PAGE, known_reviews
from nnunet_semiseg.data.labeled_cases import labeled_images
from nnunet_semiseg.data.preprocessed import check_labeled_data, number_of, preprocess_again
from nnunet_semiseg.data.unlabeled_manifest import load_manifest, output_of
from nnunet_semiseg.devices import device_option
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import LOCK, dataset_folder, is_held, read_json
from nnunet_semiseg.planning_request import proposed_planning
from nnunet_semiseg.runs import Run
from nnunet_semiseg.schema import load_plans, names_of_plans, read_dataset_json

COMPARISONS, OTHER_REPORTS = "comparison/*/report.html", "text_effect/*/report.html"
FIRST = "3d_fullres"
"""The configuration that is proposed if there are several."""
RECIPE, LABELS_ONLY = "SemiSegTrainer", "SupervisedTrainer"
"""The trainers that are proposed: with unlabelled cases and, after all were accepted, without any."""


@dataclass(frozen=True)
class Cases:
    """The numbers of labelled, unlabelled and test cases."""

    num_labeled: int
    num_unlabeled: int
    num_test: int

    def __str__(self) -> str:
        return f"cases: {self.num_labeled} labelled, {self.num_unlabeled} unlabelled, {self.num_test} test"


@dataclass(frozen=True)
class Prepared:
    """A configuration of a plans file, and whether it is preprocessed.

    Attributes:
        is_there: whether the labelled cases are preprocessed.
        problem: what is not up to date, and the command that fixes it. Empty if all is up to date or not preprocessed.
        fix: the command in `problem`, or else the one that preprocesses again. Empty if nothing is preprocessed.
    """

    plans: str
    configuration: str
    is_there: bool
    problem: str = ""
    fix: str = ""

    def __str__(self) -> str:
        state = self.problem or "preprocessed and up to date"
        return f"{self.plans}, {self.configuration}: {state if self.is_there else 'not preprocessed'}"


@dataclass(frozen=True)
class Training:
    """One training, finished or not.

    Attributes:
        epoch, epochs: the number of epochs that began, and of those that are planned.
    """

    run: Run
    is_running: bool
    epoch: int
    epochs: int

    def __str__(self) -> str:
        state = "running" if self.is_running else "done" if self.run.is_trained else "interrupted"
        how_far = "" if self.run.is_trained else f", epoch {self.epoch} of {self.epochs}"
        how_far += ", no checkpoint" if state == "interrupted" and not self.run.is_begun else ""
        run = self.run
        return f"{run.trainer}, {run.base_plans}, {run.configuration}, fold {run.fold}: {state}{how_far}"


def status(dataset: int | str) -> list[str]:
    """The lines that `nnunet_semiseg status` prints. The last one is the next command, or says what to do.

    Raises:
        UserError: the dataset does not exist, a variable of nnU-Net is not set, or a JSON file is damaged.
    """
    raw, preprocessed, results = (dataset_folder(f"nnUNet_{p}", dataset) for p in ("raw", "preprocessed", "results"))
    cases = count(raw)
    prepared = list(configurations(raw, preprocessed, cases.num_unlabeled > 0))
    trained = list(trainings(results))
    reviews = {page: model for folder, model in known_reviews(results).items() if (page := folder / PAGE).is_file()}
    compared = sorted(results.glob(COMPARISONS))
    reports = [*compared, *sorted(results.glob(OTHER_REPORTS)), *sorted(reviews)]
    lines = [raw.name, str(cases), "plans:", *(f"  {p}" for p in prepared or ["none"])]
    lines += ["trainings:", *(f"  {t}" for t in trained or ["none"])]
    lines += ["reports:", *(f"  {file}" for file in reports or ["none"])]
    todo = what_is_next(raw, cases, prepared, trained, bool(compared), reviews)
    return [*lines, f"next: {todo}"]


def count(raw: Path) -> Cases:
    """Count the cases of a raw dataset, by the files of their first channel."""
    dataset_json = read_dataset_json(raw)
    folders = (raw / name for name in ("imagesUn", "imagesTs"))
    others = (len(list(folder.glob(f"*_0000{dataset_json['file_ending']}"))) for folder in folders)
    return Cases(len(labeled_images(raw, dataset_json)), *others)


def configurations(raw: Path, preprocessed: Path, with_unlabeled: bool) -> Iterator[Prepared]:
    """All configurations in the plans that `names_of_plans` finds. No image is opened.

    Args:
        with_unlabeled: whether unlabelled cases must be preprocessed, too.
    """
    plan_again = f"plan again with nnunet_semiseg plan_and_preprocess -d {number_of(raw.name)}"
    for name in names_of_plans(preprocessed):
        plans = load_plans(preprocessed / f"{name}.json", plan_again)
        for configuration in plans["configurations"]:
            folder = output_of(preprocessed, plans, configuration)[0]
            if not any(folder.with_name(folder.name.removesuffix("__unlabeled")).glob("*")):
                yield Prepared(name, configuration, False)
                continue
            problem, fix = "", preprocess_again(plans, configuration) + ("" if with_unlabeled else " --labeled_only")
            try:
                check_labeled_data(preprocessed, raw, plans, configuration)
                if with_unlabeled:
                    load_manifest(preprocessed, plans, configuration, raw.name)
            except UserError as error:
                problem = str(error).partition("\n")[0]
                if with_unlabeled and (named := re.search(r"run nnunet_semiseg .*", problem)):
                    fix = named[0]
            yield Prepared(name, configuration, True, problem, fix.removeprefix("run "))


def trainings(results: Path) -> Iterator[Training]:
    """All trainings of the dataset: every fold of every model."""
    for folder in sorted(results.glob("*__*__*/fold_*")):
        trainer, plans, configuration = folder.parent.name.split("__", 2)
        run = Run(results.name, configuration, folder.name.removeprefix("fold_"), trainer, plans)
        logs = sorted(folder.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime)
        begun = re.findall(r"Epoch (\d+)\b", logs[-1].read_text(encoding="utf-8", errors="replace")) if logs else []
        about = folder / "debug.json"
        epochs = int(read_json(about, "remove it").get("num_epochs", 0)) if about.is_file() else 0
        yield Training(run, is_held(folder / LOCK), int(begun[-1]) + 1 if begun else 0, epochs)


def what_is_next(
    raw: Path, cases: Cases, prepared: list[Prepared], trained: list[Training], compared: bool, reviews: dict[Path, str]
) -> str:
    """The next command to type. If there is none, a sentence that says what to do.

    Args:
        reviews: the model of each review, by its page. The newest page is the last.
    """
    number = number_of(raw.name)
    usable = sorted((p for p in prepared if p.is_there and not p.problem), key=lambda p: p.configuration != FIRST)
    done = [t.run for t in trained if t.run.is_trained]
    # beside a finished training, one without a checkpoint is probably a false start
    stopped = [t.run for t in trained if not t.is_running and not t.run.is_trained and (t.run.is_begun or not done)]
    if not cases.num_unlabeled:
        stopped = [run for run in stopped if run.trainer.startswith((LABELS_ONLY, "nnUNet"))]
    accepted = journals(raw)
    if not cases.num_unlabeled and not accepted:
        return f"put the images without labels into {raw / 'imagesUn'}"
    if not any(p.is_there for p in prepared):
        return proposed_planning(number, read_dataset_json(raw)["file_ending"], not cases.num_unlabeled)
    if not usable:
        return next(p.fix for p in prepared if p.problem)
    train, device = f"nnunet_semiseg train {number}", device_option()
    if stopped:
        run = stopped[0]
        return f"{train} {run.configuration} {run.fold} -tr {run.trainer} -p {run.base_plans}{device} --c"
    if not trained:
        trainer = RECIPE if cases.num_unlabeled else LABELS_ONLY
        return f"{train} {usable[0].configuration} 0 -tr {trainer} -p {usable[0].plans}{device}"
    if not done:
        return "wait until the training has ended"
    # `share` and `distill` make models of others, PLANS_from_TRAINER
    newest = max(done, key=lambda run: ("_from_" not in run.base_plans, _time(run.checkpoint)))
    if accepted and _time(accepted[-1]) > _time(newest.checkpoint):
        run, taken = _reviewed(reviews, done), {p.plans for p in prepared}
        return _train_on(number, run, len(accepted), taken, run.trainer if cases.num_unlabeled else LABELS_ONLY)
    if not cases.num_unlabeled:
        return f"put further images without labels into {raw / 'imagesUn'}"
    run = newest if accepted else done[0]
    model = f"-d {number} -c {run.configuration} -f {run.fold} -p {run.base_plans}"
    if not compared and not accepted:  # a model that trained on would be compared with one from the beginning
        return f"nnunet_semiseg compare {model} --run{device}"
    if reviews and (not accepted or max(map(_time, reviews)) > _time(accepted[-1])):
        return f"nnunet_semiseg accept -d {number} -i FOLDER"
    return f"nnunet_semiseg review {model}{device}"


def _train_on(number: int | str, run: Run, rounds: int, taken: Container[str], trainer: str) -> str:
    """The command that trains on from a model, after this many calls of `accept`.

    Args:
        taken: names of plans that exist. The new training gets another name.
        trainer: the trainer of the new model.
    """
    name = next(name for n in count_up(rounds + 1) if (name := f"round{n}") not in taken)
    return (
        f"nnunet_semiseg train {number} {run.configuration} {run.fold} -tr {trainer} -p {run.base_plans}"
        f" --as {name} --continue_from {shlex.quote(str(run.model_folder))}{device_option()}"
    )


def _reviewed(reviews: dict[Path, str], done: list[Run]) -> Run:
    """The trained model that was reviewed last. Without a review, the first one."""
    models = {run.fold_name: run for run in done}
    return next((models[model] for model in reversed(reviews.values()) if model in models), done[0])


def _time(file: Path) -> int:
    return file.stat().st_mtime_ns
