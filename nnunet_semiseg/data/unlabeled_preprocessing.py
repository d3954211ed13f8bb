"""Preprocess unlabelled cases as nnU-Net preprocesses labelled ones, into a folder beside these.

Workers preprocess one case each (see `unlabeled_worker`). The manifest is written when all cases are done (see
`unlabeled_manifest`). No label of an unlabelled case is ever opened.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.prepared_masks import prepare_masks
from nnunet_semiseg.data.preprocessed import SUFFIXES, look_at_labeled, number_of
from nnunet_semiseg.data.texts import TEXTS_FILE
from nnunet_semiseg.data.unlabeled_cases import READERS, find_unlabeled_cases
from nnunet_semiseg.data.unlabeled_manifest import ENDING, output_of, recorded_cases
from nnunet_semiseg.data.unlabeled_worker import Task, entry_of_whole, preprocess_case
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, disk_errors, only_one, rewriting, write_json
from nnunet_semiseg.parallel import DELAY, killed_workers, run_jobs
from nnunet_semiseg.schema import check_configuration, load_plans, read_dataset_json

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

    If the labelled cases are preprocessed, they are checked first; see `look_at_labeled`. Masks of other models are
    preprocessed, too; see `prepare_masks`. `texts.json` is copied to the preprocessed dataset.

    Args:
        num_processes: one number, or one for each configuration. With 0 this process does the work.
        clean: preprocess all cases again.
        part: (number, count). The work is divided among `count` calls, on several computers that share the disk, and
            this is call `number`. It does every count-th case. When all parts are done, a call without a part writes
            the manifest, and preprocesses the masks.

    Raises:
        BusyError: another call works on these cases and is not another part, or a training uses them.
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
            folder, manifest_file = output_of(preprocessed, plans, configuration)
            with alone_or_part(folder, part), disk_errors(folder), killed_workers(folder):
                with only_one(folder.with_name(f"{folder.name}.labeled.lock"), "looks at labelled cases", WAIT):
                    usual = look_at_labeled(raw, preprocessed, plans, configuration, n)
                hash_now = plans_hash(plans, configuration)
                task = Task(folder, plans, configuration, hash_now, dataset_json, usual, verbose)
                _preprocess_configuration(cases, manifest_file, task, n, clean, show_progress_bar, part)
                if not part:
                    prepare_masks(raw, preprocessed, plans, configuration, n)
        else:
            print(f"INFO: configuration {configuration} is not in {plans_file.name}: skipped")


@contextlib.contextmanager
def alone_or_part(folder: Path, part: tuple[int, int] | None) -> Iterator[None]:
    """Keep other calls away from these cases. A call without a part excludes all others.

    A call for a part excludes calls for the same part, calls without a part, and parts with another count.

    Each call takes its own lock first and then looks at the locks of the others. So of two calls at the same time, at
    least one sees the other.

    Raises:
        BusyError: such a call is at work.
        DiskError: the lock cannot be written.
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
    cases: Mapping[str, list[str]],
    manifest_file: Path,
    task: Task,
    num_processes: int,
    clean: bool,
    show_progress_bar: bool,
    part: tuple[int, int] | None,
) -> None:
    folder, configuration = task.folder, task.configuration
    of_parts = sorted(folder.parent.glob(f"{folder.name}.part*of*.json"))
    record = manifest_file
    if part:
        cases = {case: cases[case] for case in sorted(cases)[part[0] :: part[1]]}
        record = folder.with_name(f"{folder.name}.part{part[0]}of{part[1]}.json")
    entries = dict.fromkeys(cases)
    if not clean:
        entries = _entries_of_whole(cases, task, [manifest_file, *of_parts], show_progress_bar)
    todo = {case: cases[case] for case, entry in entries.items() if entry is None}
    leftovers = [] if part else _leftovers(folder, cases)  # a part does not touch other parts' files
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
        entries |= _preprocess_cases(todo, staging, num_processes, show_progress_bar, task)
        write_json({"plans_hash": task.hash_now, "cases": dict(sorted(entries.items()))}, record)
        for file in () if part else of_parts:
            file.unlink(missing_ok=True)
    if part:
        print(f"{configuration}: this part is done; when all are done, run the command once more without parts")


def _entries_of_whole(
    cases: Mapping[str, list[str]], task: Task, records: Sequence[Path], show_progress_bar: bool
) -> dict[str, dict | None]:
    """For each case its entry in the manifest. None if it must be preprocessed; see `entry_of_whole`.

    Args:
        records: the last manifest, and the records of parts.
    """
    recorded = {case: entry for file in records for case, entry in recorded_cases(file).items()}
    with ThreadPoolExecutor(READERS) as threads:
        known = threads.map(lambda case: entry_of_whole(case, cases[case], task, recorded.get(case)), cases)
        bar = tqdm(known, "Looking at what is there", len(cases), delay=DELAY, disable=not show_progress_bar)
        return dict(zip(cases, bar, strict=True))


def _leftovers(folder: Path, cases: Iterable[str]) -> list[Path]:
    """The files in the folder that belong to none of these cases."""
    expected = {case + suffix for case in cases for suffix in SUFFIXES}
    return [file for file in folder.iterdir() if file.name not in expected] if folder.is_dir() else []


def _preprocess_cases(
    cases: dict[str, list[str]], staging: Path, num_processes: int, show_progress_bar: bool, task: Task
) -> dict[str, dict]:
    """Preprocess cases, and return their entries in the manifest.

    Args:
        staging: a folder for incomplete files. It is emptied.

    Raises:
        UserError: images are bad (one line for each, after all good cases are done).
    """
    jobs = [(case, images, staging / case, task) for case, images in cases.items()]
    entries, problems, missing = {}, {}, {}
    shutil.rmtree(staging, ignore_errors=True)  # a killed process may have left it
    try:
        with contextlib.closing(run_jobs(preprocess_case, jobs, num_processes)) as results:
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
