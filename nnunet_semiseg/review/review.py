"""`nnunet_semiseg review`: predict the unlabelled cases one by one, and make a page about them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_semiseg.data.image_problems import IMAGES_FOLDER
from nnunet_semiseg.data.known_reviews import remember
from nnunet_semiseg.data.labeled_cases import channel_names, labeled_files
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.data.written_images import refuse_half_written
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.evaluation.request import find_splits
from nnunet_semiseg.files import dataset_folder, disk_errors, only_one, read_json, write_json
from nnunet_semiseg.review import estimates, signs
from nnunet_semiseg.review.labels import CASES, MASKS, UNCERTAINTY, digest_of
from nnunet_semiseg.review.members import TITLES, Ensemble, Member, Prediction, find_members
from nnunet_semiseg.review.page import write_page
from nnunet_semiseg.review.request import Request
from nnunet_semiseg.review.table import Reviewed, tabulate
from nnunet_semiseg.schema import read_dataset_json

LABELED = "labelled"
"""The name of the folder with the records of the labelled cases."""
OF_SEVERAL = ("combined", "agreement")
"""The estimates that need several members."""
AT_MOST = 40
"""At most this number of labelled cases is predicted, for the calibration and to find out which values are usual."""
AGAIN = "remove it and run nnunet_semiseg review again"


@dataclass(frozen=True)
class Work:
    """The records of a review: where they are, and with which model and settings they must have been made.

    Attributes:
        unseen: the labelled cases that no member has seen. Only their Dice counts. The records have the Dice of all
            labelled cases, so they stay as they are if other cases are unseen later.
    """

    request: Request
    kind: str
    members: list[Member]
    unlabeled_cases: dict[str, list[str]]
    labeled_cases: dict[str, list[str]]
    unseen: set[str]

    def signature(self, files: Sequence[str]) -> list:
        """What a record is made from: the ensemble, and the names, sizes and times of checkpoints and files."""
        stats = [(Path(file).name, Path(file).stat()) for file in files]
        models = [(f"{m.name} {m.flips}", m.checkpoint.stat()) for m in self.members]
        about = [[name, s.st_size, s.st_mtime_ns] for name, s in (*models, *stats)]
        return [self.kind, self.request.mirroring, *about]

    def record(self, case: str) -> Path:
        """The path of the record of a case."""
        folder = CASES if case in self.unlabeled_cases else LABELED
        return self.request.folder / folder / f"{case}.json"

    def files(self, case: str) -> list[str]:
        """The image files of a case, and its label if it has one."""
        return self.unlabeled_cases.get(case) or self.labeled_cases[case]

    def present(self) -> Work:
        """The work without the cases whose files are gone: `accept` may have moved them while the review ran."""

        def there(cases: Mapping[str, list[str]]) -> dict[str, list[str]]:
            return {case: files for case, files in cases.items() if all(map(os.path.isfile, files))}

        return replace(self, unlabeled_cases=there(self.unlabeled_cases), labeled_cases=there(self.labeled_cases))

    def is_done(self, case: str) -> bool:
        """Whether the case has a record that was made from the present files and models.

        An unlabelled case also needs its mask and its uncertainty map.
        """
        record = self.record(case)
        if not record.is_file() or read_json(record, AGAIN).get("made_of") != self.signature(self.files(case)):
            return False
        return case in self.labeled_cases or all(
            any((self.request.folder / folder).glob(f"{case}.*")) for folder in (MASKS, UNCERTAINTY)
        )


def review(request: Request) -> Path | None:
    """Predict the cases that are not predicted yet, then write `review.html`.

    Returns:
        The page. None if other parts have not finished.

    Raises:
        UserError: there is no such ensemble, or the estimate needs several members; there are no unlabelled cases; a
            checkpoint, a record or an image is damaged; another process works on this part; the disk is full.
    """
    raw, preprocessed = (dataset_folder(f"nnUNet_{p}", request.run.dataset) for p in ("raw", "preprocessed"))
    dataset_json = read_dataset_json(raw)
    unlabeled_cases = find_unlabeled_cases(raw, dataset_json)
    every = labeled_files(raw, dataset_json)
    unseen = _unseen(request, preprocessed, sorted(every))
    labeled_cases = dict(sorted(every.items(), key=lambda item: item[0] not in unseen)[:AT_MOST])
    kind, members = find_members(request.run, request.ensemble, request.mirroring)
    if request.estimate in OF_SEVERAL and len(members) == 1:
        raise UserError(
            f"--estimate {request.estimate}: needs several predictions, but --ensemble {kind} gives one: use"
            " --estimate expected, or choose another ensemble"
        )
    if kind == "folds":
        unseen = set()  # each case was seen by all members but one at most
    work = Work(request, kind, members, unlabeled_cases, labeled_cases, unseen & labeled_cases.keys())
    with disk_errors(request.folder):
        for folder in (MASKS, UNCERTAINTY, CASES, LABELED):
            (request.folder / folder).mkdir(parents=True, exist_ok=True)
        with only_one(request.folder / f"part_{request.part}.lock", "works on this part of the review"):
            _predict(work, dataset_json)
        work = work.present()
        if not work.unlabeled_cases:
            raise UserError(f"{raw / IMAGES_FOLDER}: no case of this review is left there: put further images there")
        if not all(work.is_done(case) for case in (*work.unlabeled_cases, *work.labeled_cases)):
            return None
        reviewed = [_read(work, case) for case in work.unlabeled_cases]
        known = [_read(work, case) for case in work.labeled_cases]
        table = tabulate(reviewed, known, request.purpose, channel_names(dataset_json))
        page = write_page(table, request, _facts(work), raw, dataset_json)
        remember(dataset_folder("nnUNet_results", request.run.dataset), request.folder, request.run.fold_name)
        return page


def _facts(work: Work) -> dict[str, str]:
    run, models = work.request.run, list(dict.fromkeys(m.name for m in work.members))
    ways = len(work.members) // len(models)
    mirrored = f", each mirrored in {ways} ways" if ways > 1 else ""
    return {
        "model": f"{run.trainer}, {run.plans}, {run.configuration}, fold {run.fold}, of {run.dataset}",
        "members": f"{TITLES[work.kind]}: {', '.join(models)}{mirrored}",
        "cases": f"{len(work.unlabeled_cases)} unlabelled; compared with {len(work.labeled_cases)} labelled ones",
        "ranked by": work.request.estimate or ("combined" if len(work.members) > 1 else "expected"),
        "seen by no member": ", ".join(sorted(work.unseen)) or "no labelled case",
    }


def _unseen(request: Request, preprocessed: Path, cases: list[str]) -> set[str]:
    """Labelled cases that the model was not trained on: the validation cases of its fold."""
    if request.run.fold == "all":
        return set()
    try:
        splits = find_splits(preprocessed, cases)
    except UserError:  # no splits were ever made
        return set()
    fold = int(request.run.fold)
    return set(splits[fold]["val"]) & set(cases) if fold < len(splits) else set()


def _predict(work: Work, dataset_json: dict) -> None:
    request = work.request
    cases = [*work.unlabeled_cases, *work.labeled_cases][request.part :: request.parts]
    todo = [case for case in cases if not work.is_done(case)]
    if not todo:
        return
    print(f"{len(todo)} of {len(cases)} cases to predict, unlabelled and labelled: {TITLES[work.kind]}", flush=True)
    mirroring = request.mirroring and len(work.members) == 1  # else the members are mirrored
    ensemble = Ensemble(request.run, work.members, request.device, mirroring)
    for case in tqdm(todo, "Cases", disable=not request.show_progress):
        files = work.files(case)
        if not all(map(os.path.isfile, files)):
            print(f"{case}: was moved or removed while the review ran, so it is left out", flush=True)
            continue
        made_of = work.signature(files)
        images = files if case in work.unlabeled_cases else files[:-1]
        prediction = ensemble.predict(images)
        if case in work.unlabeled_cases:
            record = describe(prediction, prediction.mask, ensemble)
            _write_images(ensemble, prediction, request.folder, case, dataset_json["file_ending"])
        else:
            label = ensemble.reader().read_seg(files[-1])[0][0]
            record = describe(prediction, label, ensemble)
            record["dice"] = dice(prediction.mask, label, ensemble.labels)
        write_json({"made_of": made_of, **record}, work.record(case))


def dice(mask: np.ndarray, label: np.ndarray, labels: estimates.Labels) -> dict[str, float]:
    """The Dice of each class, 0 to 1. Like nnU-Net's validation, it leaves out the voxels with the ignore label."""
    ignored = label == labels.get("ignore", -1)
    return estimates.agreement([np.where(ignored, 0, m) for m in (mask, label)], labels)


def describe(prediction: Prediction, mask: np.ndarray, ensemble: Ensemble) -> dict:
    """Measure what is stored about a case.

    Args:
        mask: the mask whose volumes and islands (parts that do not touch) are measured. It is the label if there is
            one.
    """
    labels, probabilities = ensemble.labels, ensemble.of_classes(prediction.probabilities)
    found = {
        "expected": estimates.expected_dice(prediction.mask, probabilities, labels),
        "certainty": estimates.certainty(prediction.mask, probabilities, labels),
    }
    if len(prediction.members) > 1:
        agreement = estimates.agreement(prediction.members, labels)
        combined = {name: agreement[name] * found["expected"][name] for name in agreement}
        found = {"combined": combined, "agreement": agreement} | found
    seen = signs.see(mask, prediction.image, labels, prediction.properties["spacing"])
    return {
        "mask": digest_of(prediction.mask),
        "estimates": found,
        "signs": asdict(seen),
        "features": prediction.features,
        "is_volume": min(prediction.mask.shape) > 1,
    }


def _write_images(ensemble: Ensemble, prediction: Prediction, output: Path, case: str, ending: str) -> None:
    """Write the mask and the uncertainty map on the image's grid. The case's record is written after them."""
    uncertainty = estimates.uncertainty_map(prediction.probabilities, ensemble.label_manager.has_regions)
    for folder, voxels in ((MASKS, prediction.mask), (UNCERTAINTY, uncertainty)):
        file = output / folder / f"{case}{ending}"
        ensemble.reader().write_seg(voxels, str(file), prediction.properties)
        refuse_half_written([file] if ending.startswith(".nii") else [])


def _read(work: Work, case: str) -> Reviewed:
    content: Mapping = read_json(work.record(case), AGAIN)
    found = content["estimates"]
    chosen = work.request.estimate or next(iter(found))
    return Reviewed(
        case, found, signs.Signs(**content["signs"]), content["features"], content["is_volume"],
        content.get("dice") if case in work.unseen else None, found[chosen],
    )  # fmt: skip
