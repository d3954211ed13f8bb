"""`nnunet_semiseg accept`: turn unlabelled cases into labelled ones, completely or not at all. It can be undone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnunet_semiseg.data.half_accepted import FOLDER, journals
from nnunet_semiseg.data.image_problems import IMAGES_FOLDER
from nnunet_semiseg.data.known_reviews import known_reviews
from nnunet_semiseg.data.labeled_cases import labeled_images
from nnunet_semiseg.data.preprocessed import REFERENCES
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, disk_errors, only_one, rewriting
from nnunet_semiseg.review import journal
from nnunet_semiseg.review.journal import Roots, Staging
from nnunet_semiseg.review.labels import NewLabel, choose, predictions_of, problems_of, write_label
from nnunet_semiseg.review.preprocessing import find_preprocessed, stage, stage_fingerprint
from nnunet_semiseg.schema import DATASET_SECTION, read_dataset_json, read_splits

ACCEPTED = "accepted"
"""A key in the section `semiseg` of dataset.json: it says for each accepted case where its label comes from."""
SPLITS = "splits_final.json"


def accept(
    dataset: int | str, given: str | Path | None = None, all_of: str | Path | None = None, show_progress: bool = True
) -> list[NewLabel]:
    """Make labelled cases of unlabelled ones: move them, add their labels, and preprocess them.

    If an earlier call was interrupted, it is finished first. If no folder is given, nothing else is done.

    Args:
        given: a folder of labels. Their names are those of their cases, with the file ending of the data set.
        all_of: the folder of a review. Its masks of the other unlabelled cases are accepted, too, as they are.

    Returns:
        The accepted labels. There are none if only an earlier call was finished.

    Raises:
        UserError: labels are missing or wrong, one line for each; another process uses the data set; `imagesUn` is on
            another disk than `imagesTr`; a case cannot be preprocessed; or the disk is full. The data set is then as it
            was before, or the next call finishes the change.
    """
    with _alone(dataset) as (roots, ended):
        if given is None and all_of is None:
            if not ended:
                raise UserError("accept: give a folder of labels with -i, or a review with --all-of")
            return []
        raw, dataset_json = roots["raw"], read_dataset_json(roots["raw"])
        reader = determine_reader_writer_from_dataset_json(dataset_json, _example(raw, dataset_json), verbose=False)
        review = Path(all_of).absolute() if all_of else None
        reviews = [r for r in known_reviews(dataset_folder("nnUNet_results", dataset)) if r != review]
        reviews += [review] if review else []
        known = predictions_of(reviews, dataset_json["file_ending"])
        cases = find_unlabeled_cases(raw, dataset_json)
        folder = Path(given).absolute() if given else None
        labels, problems = choose(folder, review, known, cases.keys(), dataset_json, reader)
        for label in labels:
            problems += _misplaced(label, cases, raw, dataset_json) or problems_of(
                label, cases[label.case], dataset_json, reader
            )
        if problems:
            raise UserError("\n".join(problems))
        _refuse_two_disks(raw)
        staging = Staging.begin(roots)
        try:
            stage_change(staging, labels, {label.case: cases[label.case] for label in labels}, reader, show_progress)
        except BaseException:
            journal.recover(roots)  # removes all of it
            raise
        journal.finish(staging.commit({label.case: label.origin for label in labels}), roots)
        return labels


def undo(dataset: int | str) -> list[str]:
    """Undo the last call of `accept`. Returns the cases, which are unlabelled again.

    Raises:
        UserError: nothing was accepted; a file of the raw data set was changed after that; or another process uses the
            data set.
    """
    with _alone(dataset) as (roots, _):
        there = journals(roots["raw"])
        if not there:
            raise UserError(f"{roots['raw'] / FOLDER}: nothing was accepted, so there is nothing to undo")
        cases = sorted(journal.read_journal(there[-1])["cases"])
        journal.undo(there[-1], roots)
        return cases


@contextmanager
def _alone(dataset: int | str) -> Iterator[tuple[Roots, bool]]:
    """Lock the data set and finish an interrupted change.

    Yields the folders of the data set, and whether there was something to finish.
    """
    roots = {root: dataset_folder(f"nnUNet_{root}", dataset) for root in ("raw", "preprocessed")}
    raw = roots["raw"]
    with disk_errors(raw), only_one(raw / ".accept.lock", "accepts cases of this data set"), ExitStack() as stack:
        for folder in filter(Path.is_dir, roots["preprocessed"].glob("*")):  # a training may use what will change
            stack.enter_context(rewriting(folder))
        yield roots, journal.recover(roots)


def _example(raw: Path, dataset_json: dict) -> str:
    return next(iter(labeled_images(raw, dataset_json).values()), [""])[0]


def _misplaced(label: NewLabel, cases: Mapping[str, list[str]], raw: Path, dataset_json: dict) -> list[str]:
    if label.case in cases:
        return []
    if label.case in labeled_images(raw, dataset_json):
        return [f"{label.file}: {label.case} is a labelled case already: change its label in {raw / 'labelsTr'}"]
    return [f"{label.file}: {label.case} is not a case of {raw / IMAGES_FOLDER}: give the file the name of its case"]


def _refuse_two_disks(raw: Path) -> None:
    target = raw / "imagesTr"
    if (raw / IMAGES_FOLDER).stat().st_dev != target.stat().st_dev:
        raise UserError(f"{raw / IMAGES_FOLDER}: is on another disk than {target}: move both folders to one disk")


def stage_change(
    staging: Staging, labels: Sequence[NewLabel], cases: Mapping[str, list[str]], reader: type, show_progress: bool
) -> None:
    """Prepare everything that changes with these labels: raw data, splits, `dataset.json`, preprocessed data.

    Args:
        cases: the image files of each new case.

    Raises:
        UserError: the raw dataset.json has other labels than the preprocessed data; see also `find_preprocessed` and
            `stage`.
    """
    raw, preprocessed = staging.roots["raw"], staging.roots["preprocessed"]
    dataset_json = read_dataset_json(raw)
    ending, files = dataset_json["file_ending"], {}
    folders = list(find_preprocessed(preprocessed))
    with_labels = read_dataset_json(preprocessed) if folders else dataset_json
    if with_labels["labels"] != dataset_json["labels"]:
        raise UserError(
            f"{raw / 'dataset.json'}: its labels are not those that {preprocessed} was made with: run nnunet_semiseg"
            " plan_and_preprocess first"
        )
    for label in labels:
        name = f"{label.case}{ending}"
        new = staging.new_content(f"raw/labelsTr/{name}")
        write_label(label, cases[label.case][0], new, reader)
        if folders:
            shutil.copy2(new, staging.new_content(f"preprocessed/{REFERENCES}/{name}"))
        for image in cases[label.case]:
            image_name = os.path.basename(image)
            staging.move(f"raw/{IMAGES_FOLDER}/{image_name}", f"raw/imagesTr/{image_name}")
        files[label.case] = [*cases[label.case], str(new)]
    for root, described in {"raw": dataset_json, "preprocessed": with_labels}.items():
        if root == "raw" or folders:
            staging.write(f"{root}/dataset.json", _described(described, labels, files))
        splits = staging.roots[root] / SPLITS
        if splits.is_file():
            staging.write(f"{root}/{SPLITS}", extended(read_splits(splits, "correct or delete it"), sorted(files)))
    properties: list[dict] = []
    for about in tqdm(folders, f"Preprocessing {len(files)} new cases", disable=not (folders and show_progress)):
        properties = stage(staging, about, files, with_labels)
    if folders:
        stage_fingerprint(staging, folders[-1].plans, properties)


def extended(folds: list[dict], cases: Sequence[str]) -> list[dict]:
    """The folds with the new cases as training cases in each fold. The validation cases stay the same."""
    return [fold | {"train": sorted({*fold["train"], *cases} - {*fold["val"]})} for fold in folds]


def _described(dataset_json: dict, labels: Sequence[NewLabel], files: Mapping[str, list[str]]) -> dict:
    """The content of dataset.json with the new number of labelled cases, and with the origin of the new labels."""
    ending = dataset_json["file_ending"]
    section = dataset_json.get(DATASET_SECTION, {})
    accepted = section.get(ACCEPTED, {}) | {label.case: label.about for label in labels}
    new = {"numTraining": dataset_json["numTraining"] + len(labels), DATASET_SECTION: section | {ACCEPTED: accepted}}
    if "dataset" in dataset_json:  # a list of the files of every case
        listed = {
            case: {
                "images": [f"imagesTr/{os.path.basename(f)}" for f in images],
                "label": f"labelsTr/{case}{ending}",
            }
            for case, (*images, _) in files.items()
        }
        new["dataset"] = dataset_json["dataset"] | listed
    return dataset_json | new
