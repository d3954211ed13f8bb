"""Preprocess only the newly labelled cases, for every folder of preprocessed labelled cases in the data set."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg.data.empty_channels import values_of_nothing
from nnunet_semiseg.data.image_problems import preprocessed_problems, spread
from nnunet_semiseg.data.labeled_cases import channel_names
from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.preprocessed import SUFFIXES, case_files, read_arrays
from nnunet_semiseg.data.records import FINGERPRINT, read_record, record_file
from nnunet_semiseg.data.stamps import stamp
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import disk_error, read_json
from nnunet_semiseg.review.journal import Staging
from nnunet_semiseg.schema import check, load_plans


@dataclass(frozen=True)
class Preprocessed:
    """A folder of preprocessed labelled cases, and the plans that it was made with.

    Attributes:
        name: nnU-Net's data identifier, which is the name of the folder.
    """

    name: str
    plans: dict
    configuration: str


def find_preprocessed(preprocessed: Path) -> Iterator[Preprocessed]:
    """Find all folders of preprocessed labelled cases, each with the plans that it was made for.

    Raises:
        UserError: plans are damaged, or have changed since the folder was made.
    """
    found: dict[str, list[Preprocessed]] = {}
    for file in sorted(preprocessed.glob("*.json")):
        if b'"plans_name"' not in file.read_bytes():
            continue
        plans = load_plans(file, "remove it, or plan again with nnunet_semiseg plan_and_preprocess")
        for configuration in plans["configurations"]:
            name = PlansManager(plans).get_configuration(configuration).data_identifier
            if any((preprocessed / name).glob("*.b2nd")):
                found.setdefault(name, []).append(Preprocessed(name, plans, configuration))
    for name, several in found.items():
        digest = read_record(preprocessed, name)["plans_hash"]
        fitting = [p for p in several if digest in (None, plans_hash(p.plans, p.configuration))]
        if not fitting:
            raise UserError(
                f"{preprocessed / name}: was preprocessed with other plans: {several[0].plans['plans_name']}"
                " have changed since then: run nnunet_semiseg plan_and_preprocess first"
            )
        yield fitting[0]


def stage(
    staging: Staging, about: Preprocessed, cases: Mapping[str, list[str]], dataset_json: dict, verbose: bool = False
) -> list[dict]:
    """Preprocess the cases, and plan what else changes: the record of the folder, and the unlabelled cases.

    Args:
        cases: the files of each case: its images, then its label.
        dataset_json: the dataset.json with which the other cases were preprocessed.

    Returns:
        The properties of each case, as nnU-Net stores them.

    Raises:
        UserError: nothing can be learnt from the values of a case; the manifest of the unlabelled cases is damaged; the
            disk is full.
    """
    preprocessed = staging.roots["preprocessed"]
    record, properties = read_record(preprocessed, about.name), []
    has_record = bool(record["cases"])  # nnU-Net's own command writes no record
    for case, files in cases.items():
        for suffix in SUFFIXES:
            name = f"{about.name}/{case}{suffix}"
            place = staging.take_in("preprocessed", name, f"preprocessed/{name}")
        record["cases"][case], found = _preprocess(place.parent, case, files, about, dataset_json, verbose)
        properties.append(found)
    if has_record:
        content = {"plans_hash": record["plans_hash"], "cases": dict(sorted(record["cases"].items()))}
        staging.write(f"preprocessed/{record_file(preprocessed, about.name).name}", content)
    _take_from_unlabeled(staging, f"{about.name}__unlabeled", cases)
    return properties


def _preprocess(
    folder: Path, case: str, files: list[str], about: Preprocessed, dataset_json: dict, verbose: bool
) -> tuple[dict, dict]:
    """Write the preprocessed files of a case into a folder.

    Returns its entry in the record, and nnU-Net's properties.
    """
    manager = PlansManager(about.plans)
    configuration = manager.get_configuration(about.configuration)
    stamps = [stamp(file) for file in files]
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
        configuration.preprocessor_class(verbose=verbose).run_case_save(
            str(folder / case), files[:-1], files[-1], manager, configuration, dataset_json
        )
    try:
        data, _ = read_arrays(folder, case)
    except UserError as e:  # blosc2 does not report a full disk
        raise disk_error(folder / case, str(e)) from None
    nothing = values_of_nothing(manager, configuration)
    if problems := preprocessed_problems(data, files[:-1], channel_names(dataset_json), nothing):
        raise UserError("\n".join(problems))
    made = [*map(stamp, case_files(folder, case)), stamps[-1]]  # nnU-Net's copy of the label equals the label
    entry = {"files": stamps, "made": made, "spread": spread(data)}
    return entry, load_pickle(str(folder / f"{case}{SUFFIXES[-1]}"))


def _take_from_unlabeled(staging: Staging, name: str, cases: Mapping[str, list[str]]) -> None:
    """Plan to remove the cases from the preprocessed unlabelled ones, if they are there.

    First the manifest is written without these cases. All others stay in it.
    """
    preprocessed = staging.roots["preprocessed"]
    manifest_file = preprocessed / f"{name}.json"
    if manifest_file.is_file():
        manifest = read_json(manifest_file, "run nnunet_semiseg preprocess_unlabeled")
        check(manifest, {"cases": dict}, manifest_file, "run nnunet_semiseg preprocess_unlabeled")
        kept = {case: entry for case, entry in manifest["cases"].items() if case not in cases}
        staging.write(f"preprocessed/{manifest_file.name}", manifest | {"cases": kept})
    for case in cases:
        for suffix in SUFFIXES:
            if (preprocessed / name / (case + suffix)).is_file():
                staging.put_away("preprocessed", f"{name}/{case}{suffix}", f"preprocessed/{name}/{case}{suffix}")


def stage_fingerprint(staging: Staging, plans: dict, properties: list[dict]) -> None:
    """Add the sizes of new cases to nnU-Net's fingerprint. A training checks that there are as many sizes as cases.

    The intensities stay as they are, like the plans and the preprocessed cases. The next planning measures them again,
    because the record of the fingerprint says that it belongs to other cases.
    """
    file = staging.roots["preprocessed"] / f"{FINGERPRINT}.json"
    if not (file.is_file() and properties):
        return
    fingerprint = read_json(file, "run nnunet_semiseg plan_and_preprocess")
    backward = PlansManager(plans).transpose_backward
    for found in properties:
        shape = found["shape_after_cropping_and_before_resampling"]
        fingerprint["shapes_after_crop"].append([int(shape[axis]) for axis in backward])
        fingerprint["spacings"].append([float(s) for s in found["spacing"]])
    staging.write(f"preprocessed/{file.name}", fingerprint)
