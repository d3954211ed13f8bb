"""Preprocess one unlabelled case as nnU-Net preprocesses a labelled one, and look at its images meanwhile.

The case is made in a folder of its own and then moved. Its ``.pkl`` file is moved last. So if this file exists, the
case is complete. The file also says which images and which plans the case was made from.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg.data.empty_channels import values_of_nothing
from nnunet_semiseg.data.headers import flat_problem, spacing_problem
from nnunet_semiseg.data.image_problems import (
    header_problems,
    intensity_problems,
    missing_channels,
    nifti_damage,
    preprocessed_problems,
    reading_problems,
    spread,
    spread_problems,
    take_out,
)
from nnunet_semiseg.data.labeled_cases import channel_names
from nnunet_semiseg.data.preprocessed import SUFFIXES, blame_the_disk, case_files, made_of, read_arrays
from nnunet_semiseg.data.records import contents
from nnunet_semiseg.data.stamps import all_renewed, digest, stamp
from nnunet_semiseg.data.unpacked_nifti import unpacked_nifti
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import DiskError, disk_error, disk_errors

PROPERTIES_KEY = "semiseg"
"""A key in a case's ``.pkl`` file: which images and plans it was made from, and hashes of its arrays."""


@dataclass(frozen=True)
class Task:
    """What is the same for all cases of a configuration.

    Attributes:
        folder: the preprocessed unlabelled cases.
        hash_now: see `plans_hash`.
        usual: the usual spread of labelled images; see `spread_problems`.
        verbose: print what nnU-Net does.
    """

    folder: Path
    plans: dict
    configuration: str
    hash_now: str
    dataset_json: dict
    usual: Sequence[float] | None
    verbose: bool


def preprocess_case(
    case: str, images: list[str], staging: Path, task: Task
) -> tuple[str, list[str], list[str], dict | None]:
    """Preprocess one case.

    Args:
        staging: a folder for incomplete files. It is made, and removed at the end.

    Returns:
        The case; what is wrong with its images, one line each; the names of the channels whose image
        is 0 everywhere; its entry in the manifest (None if something is wrong).

    Raises:
        DiskError: the disk is full or read-only, or the files do not hold what was written.
    """
    stamps = [stamp(image) for image in images]  # before they are read
    reader = PlansManager(task.plans).image_reader_writer_class
    if problems := header_problems(images, reader):
        return case, problems, [], None
    looked = Inspection(images, task)
    staging.mkdir(parents=True)
    try:
        _run_nnunet(case, staging, task, looked, stamps)
        _read_back(staging, case, looked.made)
        _keep_digests(staging, case)
        _move(case, staging, task.folder)
    except DiskError:
        raise
    except UserError:  # its text is in `looked.problems`
        pass
    except Exception as e:
        if looked.made:  # the images were read, so the error comes from the disk or from our code
            blame_the_disk(e, task.folder / case)
            raise
        looked.problems.extend(reading_problems(images, reader))
        if not looked.problems:
            raise  # not the fault of the images
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if looked.problems:
        return case, looked.problems, looked.missing, None
    made = [stamp(file) for file in case_files(task.folder, case)]
    return case, [], looked.missing, {"images": stamps, "made": made}


class Inspection:
    """Looks at the images of one case while nnU-Net preprocesses them.

    Attributes:
        problems: what is wrong, one line each.
        missing: the names of the channels whose image is 0 everywhere.
        made: the preprocessed image (C, *S) and nnU-Net's mask of its nonzero voxels (1, *S), when they are made and
            nothing is wrong.
    """

    def __init__(self, images: list[str], task: Task):
        self.images, self.task, self.channels = images, task, channel_names(task.dataset_json)
        self.problems, self.missing, self.made = list[str](), list[str](), list[np.ndarray]()

    def look_at_files(self, files: Sequence[str]) -> None:
        """Raise UserError if a file is damaged.

        Args:
            files: the images, unpacked.
        """
        damages = zip(self.images, map(nifti_damage, files), strict=True)
        self._refuse([f"{image}: {damage}: {take_out(image)}" for image, damage in damages if damage])

    def look_at_raw(self, data: np.ndarray, spacing: Sequence[float]) -> None:
        """Raise UserError if something is wrong with the image (C, *S) as the reader returns it.

        Args:
            spacing: in mm, in the order of the axes of the image.
        """
        plans, first = self.task.plans, self.images[0]
        spacing = [spacing[axis] for axis in plans["transpose_forward"]]
        odd = spacing_problem(spacing, plans.get("original_median_spacing_after_transp", ()))
        flat = flat_problem(data.shape[1:], plans)
        self._refuse([
            *([f"{first}: {odd}: {take_out(first)}"] if odd else ()),
            *intensity_problems(data, self.images, self.channels),
            *([f"{first}: {flat}: {take_out(first)}"] if flat else ()),
        ])
        self.missing.extend(missing_channels(data, self.channels))

    def look_at_preprocessed(self, data: np.ndarray, nothing: Sequence[float]) -> None:
        """Raise UserError if something is wrong with the preprocessed image (C, *S).

        Args:
            nothing: see `values_of_nothing`.
        """
        self._refuse(preprocessed_problems(data, self.images, self.channels, nothing))
        self._refuse(spread_problems(spread(data), self.images, self.channels, self.task.usual))

    def _refuse(self, problems: list[str]) -> None:
        self.problems.extend(problems)
        if problems:
            raise UserError(problems[0])


def _run_nnunet(case: str, staging: Path, task: Task, looked: Inspection, stamps: list) -> None:
    """Run nnU-Net's preprocessing into the folder `staging`.

    Raises:
        UserError: something is wrong with the images.
        DiskError: a packed image cannot be unpacked into the folder.
    """
    plans_manager = PlansManager(task.plans)
    configuration_manager = plans_manager.get_configuration(task.configuration)
    nothing = values_of_nothing(plans_manager, configuration_manager)

    class Unlabeled(configuration_manager.preprocessor_class):
        def run_case_npy(self, data, seg, properties, *args, **kwargs):
            looked.look_at_raw(data, properties["spacing"])
            data, seg, properties = super().run_case_npy(data, seg, properties, *args, **kwargs)
            looked.look_at_preprocessed(data, nothing)
            looked.made.extend([data, seg])
            about = {"plans_hash": task.hash_now, "images": stamps}
            return data, seg, {**properties, "class_locations": {}, PROPERTIES_KEY: about}

    with disk_errors(task.folder / case):
        files = [unpacked_nifti(image, staging) for image in looked.images]
    looked.look_at_files(files)
    with contextlib.nullcontext() if task.verbose else contextlib.redirect_stdout(io.StringIO()):
        Unlabeled(task.verbose).run_case_save(
            str(staging / case),
            files,
            None,  # pyright: ignore[reportArgumentType]: nnU-Net itself passes None where there is no label
            plans_manager,
            configuration_manager,
            task.dataset_json,
        )


def _read_back(folder: Path, case: str, made: list[np.ndarray]) -> None:
    """Raise DiskError if the files do not hold what was written. Not every library reports a full disk."""
    try:
        written = read_arrays(folder, case)
    except UserError as e:
        raise disk_error(folder / case, str(e)) from None
    if not all(map(np.array_equal, written, made)):
        raise disk_error(folder / case, "what can be read from it is not what was written")


def _keep_digests(folder: Path, case: str) -> None:
    """Add hashes of the arrays of a case to its `.pkl` file.

    With these a later run sees that the case is whole, even if this run ends before it writes the manifest.
    """
    *arrays, properties_file = case_files(folder, case)
    properties = load_pickle(str(properties_file))
    properties[PROPERTIES_KEY]["made"] = [digest(file) for file in arrays]
    write_pickle(properties, str(properties_file))


def _move(case: str, staging: Path, folder: Path) -> None:
    """Replace the files of a case. The old .pkl goes before the data change, and the new one comes after."""
    (folder / (case + SUFFIXES[-1])).unlink(missing_ok=True)
    for suffix in SUFFIXES:
        os.replace(staging / (case + suffix), folder / (case + suffix))


def entry_of_whole(case: str, images: list[str], task: Task, recorded: dict | None) -> dict | None:
    """The entry of a case in the manifest. None if the case is incomplete or made from other images or plans.

    Args:
        recorded: the entry in the last manifest. Without it, the files of the case are read.
    """
    try:
        files = case_files(task.folder, case)
        about = load_pickle(str(files[-1]))[PROPERTIES_KEY]
        made = made_of(recorded, files) if recorded else [stamp(file) for file in files]
        stamps = all_renewed(about["images"], images)
        whole = about["plans_hash"] == task.hash_now and made and about["made"] == contents(made)[:-1]
        return {"images": stamps, "made": made} if whole and stamps else None
    except Exception:  # a damaged pickle may raise anything
        return None
