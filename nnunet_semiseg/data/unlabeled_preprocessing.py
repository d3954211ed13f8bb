"""Preprocess unlabelled cases as nnU-Net preprocesses labelled ones, into a folder beside these.

Each case is made in a folder of its own and then moved. Its ``.pkl`` file is moved last. So if this file exists, the
case is complete. The file also says which images and which plans the case was made from. The manifest is written when
all cases are done (see `unlabeled_manifest`). No label of an unlabelled case is ever opened.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

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
from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.prepared_masks import prepare_masks
from nnunet_semiseg.data.preprocessed import (
    SUFFIXES,
    blame_the_disk,
    case_files,
    look_at_labeled,
    made_of,
    number_of,
    read_arrays,
)
from nnunet_semiseg.data.records import contents
from nnunet_semiseg.data.stamps import all_renewed, digest, stamp
from nnunet_semiseg.data.texts import TEXTS_FILE
from nnunet_semiseg.data.unlabeled_cases import READERS, find_unlabeled_cases
from nnunet_semiseg.data.unlabeled_manifest import ENDING, output_of, recorded_cases
from nnunet_semiseg.data.unpacked_nifti import unpacked_nifti
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import (
    DiskError,
    dataset_folder,
    disk_error,
    disk_errors,
    only_one,
    rewriting,
    write_json,
)
from nnunet_semiseg.parallel import DELAY, killed_workers, run_jobs
from nnunet_semiseg.schema import check_configuration, load_plans, read_dataset_json

PROPERTIES_KEY = "semiseg"
"""A key in a case's ``.pkl`` file: which images and plans it was made from, and hashes of its arrays."""
DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
WAIT = 24 * 3600
"""How many seconds one part waits while another part looks at the labelled cases."""


def preprocess_unlabeled(
    dataset_id: int | str,
    configurations: Sequence[str] = DEFAULT_CONFIGURATIONS,
    plans_name: str = "nnUNetPlans",
    num_processes: int | Sequence[int] = 2,
    clean: bool = False,
    show_progress_bar: bool = True,
    verbose: bool = False,
    part: tuple[int, int] | None = None,
) -> None:
    """Preprocess the images in ``imagesUn`` as nnU-Net would. Cases that are complete and up to date are not changed.

    If the labelled cases are preprocessed, they are checked first; see `look_at_labeled`.

    Args:
        num_processes: one number, or one for each configuration. With 0 this process does the work.
        clean: preprocess all cases again.
        part: (number, count). The work is divided among `count` calls, on several computers that share the disk, and
            this is call `number`. It does every count-th case. When all parts are done, a call without a part writes
            the manifest.

    Raises:
        BusyError: another call works on these cases and is not another part.
        UserError: the dataset or the plans do not exist; `find_unlabeled_cases` or `look_at_labeled` fails; images are
            bad (one line for each, after all good cases are done); a process was killed; the disk is full.
    """
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    plans_file = preprocessed / f"{plans_name}.json"
    plan = f"nnunet_semiseg plan_and_preprocess -d {number_of(raw.name)}"
    plans = load_plans(plans_file, f"make the plans with {plan}, or name others with -plans_name")
    dataset_json = read_dataset_json(raw)
    cases = find_unlabeled_cases(raw, dataset_json)

    if (raw / TEXTS_FILE).is_file():  # a computer that trains need not have the raw data
        shutil.copy(raw / TEXTS_FILE, preprocessed)
    known = plans["configurations"]
    if not set(configurations) & set(known):
        raise UserError(f"{plans_file}: no configuration {' or '.join(configurations)}: use -c {' '.join(known)}")
    processes = [num_processes] if isinstance(num_processes, int) else list(num_processes)
    if len(processes) not in (1, len(configurations)):
        raise UserError(f"-np {' '.join(map(str, processes))}: give one number, or one for each of -c")
    for configuration, n in zip(configurations, processes * len(configurations), strict=False):
        if configuration in known:
            check_configuration(plans, configuration, plans_file, f"plan again with {plan}")
            folder, _ = output_of(preprocessed, plans, configuration)
            with alone_or_part(folder, part), disk_errors(folder), killed_workers(folder):
                with only_one(folder.with_name(f"{folder.name}.labeled.lock"), "looks at labelled cases", WAIT):
                    usual = look_at_labeled(raw, preprocessed, plans, configuration, n)
                _preprocess_configuration(
                    cases, preprocessed, plans, configuration, dataset_json, usual, n, clean, show_progress_bar,
                    verbose, part,
                )  # fmt: skip
                if not part:
                    prepare_masks(raw, preprocessed, plans, configuration, n)
        else:
            print(f"INFO: configuration {configuration} is not in {plans_file.name}: skipped")


@contextlib.contextmanager
def alone_or_part(folder: Path, part: tuple[int, int] | None) -> Iterator[None]:
    """Keep other calls away from these cases. One without a part excludes all others.

    A call for a part excludes calls for the same part, and calls without a part.

    Each call takes its own lock first and then looks at the locks of the others. So of two calls at the same time, at
    least one sees the other.

    Raises:
        BusyError: another call is at work, or parts with another count are at work.
    """
    whole, does = folder.with_name(f"{folder.name}.lock"), "preprocesses these unlabelled cases"
    number, count = part or (0, 0)
    own = folder.with_name(f"{folder.name}.part{number}of{count}.lock") if part else whole
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with only_one(own, does):
        parts = folder.parent.glob(f"{folder.name}.part*.lock")
        for other in [whole] * bool(part) + [p for p in parts if not (part and p.stem.endswith(f"of{count}"))]:
            with only_one(other, does, wait=2):
                pass
        yield


def _preprocess_configuration(
    cases, preprocessed, plans, configuration, dataset_json, usual, num_processes, clean, show_progress_bar, verbose,
    part=None,
) -> None:  # fmt: skip
    folder, manifest_file = output_of(preprocessed, plans, configuration)
    hash_now = plans_hash(plans, configuration)
    records = [manifest_file, *sorted(folder.parent.glob(f"{folder.name}.part*of*.json"))]
    recorded = {} if clean else {case: entry for file in records for case, entry in recorded_cases(file).items()}
    if part:
        cases = {case: cases[case] for case in sorted(cases)[part[0] :: part[1]]}
        records[1:] = [folder.with_name(f"{folder.name}.part{part[0]}of{part[1]}.json")]
    entries = dict.fromkeys(cases)
    if not clean:
        with ThreadPoolExecutor(READERS) as threads:
            known = threads.map(
                lambda case: _entry_of_whole(folder, case, cases[case], hash_now, recorded.get(case)), cases
            )
            bar = tqdm(known, "Looking at what is there", len(cases), delay=DELAY, disable=not show_progress_bar)
            entries = dict(zip(cases, bar, strict=True))
    todo = [case for case, entry in entries.items() if entry is None]
    expected = {case + suffix for case in cases for suffix in SUFFIXES}
    there = list(folder.iterdir()) if folder.is_dir() and not part else []  # a part does not touch other parts' files
    leftovers = [file for file in there if file.name not in expected]
    labeled_folder = folder.with_name(folder.name.removesuffix(ENDING))  # a training uses and locks this folder
    with contextlib.ExitStack() as stack:
        if todo or leftovers:
            stack.enter_context(rewriting(labeled_folder))
            manifest_file.unlink(missing_ok=True)  # first, because a manifest must not list cases that are changing
        if part:
            stack.close()  # so that other parts can begin; without a manifest no training does
        if clean and not part:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in leftovers:
            file.unlink(missing_ok=True)

        which = f" in part {part[0]} of {part[1]}" if part else ""
        print(f"{configuration}: {len(cases)} unlabelled cases{which}, {len(todo)} of them to preprocess")
        staging = folder.with_name(folder.name + ".tmp")
        staging = staging / f"part{part[0]}of{part[1]}" if part else staging
        about = folder, plans, configuration, dataset_json, usual, verbose
        entries |= _preprocess_cases(
            {case: cases[case] for case in todo}, staging, num_processes, show_progress_bar, about
        )
        content = {"plans_hash": hash_now, "cases": dict(sorted(entries.items()))}
        write_json(content, records[1] if part else manifest_file)
        for file in () if part else records[1:]:
            file.unlink(missing_ok=True)
    if part:
        print(f"{configuration}: this part is done; when all are done, run the command once more without parts")


def _preprocess_cases(
    cases: dict[str, list[str]], staging: Path, num_processes: int, show_progress_bar: bool, about: tuple
) -> dict[str, dict]:
    """Preprocess cases, and return their entries in the manifest.

    Args:
        staging: a folder for incomplete files. It is emptied.
        about: further arguments of `_preprocess_case`. The first one is the folder.

    Raises:
        UserError: images are bad (one line for each, after all good cases are done).
    """
    jobs = [(case, images, staging / case, *about) for case, images in cases.items()]
    entries, problems, missing = {}, {}, {}
    shutil.rmtree(staging, ignore_errors=True)  # a killed process may have left it
    try:
        with contextlib.closing(run_jobs(_preprocess_case, jobs, num_processes)) as results:
            for case, lines, channels, entry in tqdm(
                results, "Unlabelled cases", len(jobs), disable=not (jobs and show_progress_bar)
            ):
                problems[case], missing[case], entries[case] = lines, channels, entry
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if lines := [line for case in sorted(problems) for line in problems[case]]:
        raise UserError("\n".join(lines))
    for case in sorted(case for case, channels in missing.items() if channels):
        print(f"{case}: {', '.join(missing[case])} is 0 everywhere: this case is taken to lack this channel")
    return entries


def _preprocess_case(
    case: str,
    images: list[str],
    staging: Path,
    folder: Path,
    plans: dict,
    configuration: str,
    dataset_json: dict,
    usual: list[float] | None,
    verbose: bool,
) -> tuple[str, list[str], list[str], dict | None]:
    """Preprocess one case.

    Returns:
        The case; what is wrong with its images, one line each; the names of channels it lacks; its entry in the
        manifest (None if something is wrong).
    """
    plans_manager = PlansManager(plans)
    configuration_manager = plans_manager.get_configuration(configuration)
    reader = plans_manager.image_reader_writer_class
    channels, stamps = channel_names(dataset_json), [stamp(i) for i in images]  # before they are read
    problems, missing = header_problems(images, reader), list[str]()
    if problems:
        return case, problems, missing, None
    nothing, made = values_of_nothing(plans_manager, configuration_manager), []

    class Unlabeled(configuration_manager.preprocessor_class):
        def run_case_npy(self, data, seg, properties, *args, **kwargs):
            spacing = [properties["spacing"][axis] for axis in plans["transpose_forward"]]
            if odd := spacing_problem(spacing, plans.get("original_median_spacing_after_transp", ())):
                problems.append(f"{images[0]}: {odd}: {take_out(images[0])}")
            problems.extend(intensity_problems(data, images, channels))
            if flat := flat_problem(data.shape[1:], plans):
                problems.append(f"{images[0]}: {flat}: {take_out(images[0])}")
            if problems:
                raise UserError(problems[0])
            missing.extend(missing_channels(data, channels))
            data, seg, properties = super().run_case_npy(data, seg, properties, *args, **kwargs)
            problems.extend(preprocessed_problems(data, images, channels, nothing))
            problems.extend([] if problems else spread_problems(spread(data), images, channels, usual))
            if problems:
                raise UserError(problems[0])
            made.extend([data, seg])
            about = {"plans_hash": plans_hash(plans, configuration), "images": stamps}
            return data, seg, {**properties, "class_locations": {}, PROPERTIES_KEY: about}

    staging.mkdir(parents=True)
    printed = io.StringIO()
    try:
        with disk_errors(folder / case):
            files = [unpacked_nifti(image, staging) for image in images]
        damages = zip(images, map(nifti_damage, files), strict=True)
        problems.extend(f"{image}: {damage}: {take_out(image)}" for image, damage in damages if damage)
        if problems:
            raise UserError(problems[0])
        with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(printed):
            Unlabeled(verbose).run_case_save(
                str(staging / case),
                files,
                None,  # pyright: ignore[reportArgumentType]: nnU-Net itself passes None where there is no label
                plans_manager,
                configuration_manager,
                dataset_json,
            )
        _read_back(staging, case, made)
        _keep_digests(staging, case)
        # the old .pkl goes before the data change, and the new one comes after
        (folder / (case + SUFFIXES[-1])).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            os.replace(staging / (case + suffix), folder / (case + suffix))
    except DiskError:
        raise
    except UserError:  # its text is in `problems`
        pass
    except Exception as e:
        if made:  # the images were read, so the error comes from the disk or from our code
            blame_the_disk(e, folder / case)
            raise
        problems.extend(reading_problems(images, reader))
        if not problems:
            raise  # not the fault of the images
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    entry = None if problems else {"images": stamps, "made": [stamp(file) for file in case_files(folder, case)]}
    return case, problems, missing, entry


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


def _entry_of_whole(folder: Path, case: str, images: list[str], hash_now: str, recorded: dict | None) -> dict | None:
    """The entry of a case in the manifest. None if the case is incomplete or made from other images or plans.

    Args:
        recorded: the entry in the last manifest. Without it, the files of the case are read.
    """
    try:
        files = case_files(folder, case)
        about = load_pickle(str(files[-1]))[PROPERTIES_KEY]
        made = made_of(recorded, files) if recorded else [stamp(file) for file in files]
        stamps = all_renewed(about["images"], images)
        whole = about["plans_hash"] == hash_now and made and about["made"] == contents(made)[:-1]
        return {"images": stamps, "made": made} if whole and stamps else None
    except Exception:  # a damaged pickle may raise anything
        return None
