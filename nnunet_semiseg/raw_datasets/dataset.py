"""Make the whole dataset: check what was asked for, convert each case, and write what belongs to all of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from tqdm import tqdm

from nnunet_semiseg.archives import ARCHIVES, unpacked
from nnunet_semiseg.data.labeled_subset import ORDER_KEY
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import base_folder, disk_errors, only_one, read_json, write_json
from nnunet_semiseg.parallel import killed_workers, run_jobs
from nnunet_semiseg.planning_request import proposed_planning
from nnunet_semiseg.raw_datasets.case import STATE, convert_case, files_of, paths_of
from nnunet_semiseg.raw_datasets.description import About, Case, Source
from nnunet_semiseg.raw_datasets.parts import assign
from nnunet_semiseg.raw_datasets.patients import folds_by_patient
from nnunet_semiseg.raw_datasets.report import SUBSETS, report


def convert_dataset(
    find_cases: Callable[..., Source],
    source: str | Path,
    dataset_id: int,
    *,
    num_labeled: int | float | str | None = None,
    protocol: str = "published",
    crop: str = "none",
    register: str = "off",
    num_processes: int = 8,
    overwrite: bool = False,
    dry_run: bool = False,
    max_size: float | None = None,
    show_progress_bar: bool = True,
    **options,
) -> Path:
    """Make `DatasetNNN_Name` in `nnUNet_raw`. After an interruption, the same call continues.

    Args:
        find_cases: a function of the data set's module. It is called with the source's folder and the options.
        source: a folder; or an archive (zip, tar), which is unpacked into a temporary folder.
        num_labeled: how many cases keep their label: a number, a fraction of the training cases, "all", or None for the
            published number (all if none is published). The first cases of the published order are taken.
        protocol: "published" uses the lists of the source, published or your own; "all" trains on every case and has no
            test set.
        crop: "published" crops around the ground truth, even of unlabelled and test cases; "none" does not.
        register: for several channels. "check" reports by how many mm each is displaced from the first one. "rigid"
            moves those that are displaced or on another grid onto the grid of the first one. "off" does neither.
        num_processes: with 0 this process does the work. A script that uses more needs `if __name__ == "__main__":`.
        overwrite: replace the dataset that has this number and name.
        dry_run: print what would be done, and write nothing.
        max_size: in GB, the largest size of an unpacked archive. None: 100 times the size of the archive, at least
            1 GB (`archives.RATIO` and `HARMLESS`).

    Returns:
        The dataset's folder.

    Raises:
        BusyError: another process makes a dataset with this number.
        UserError: options are wrong; there is nothing to convert; the dataset cannot be written; cases are bad (one
            line for each, after all others are done).
    """
    source, raw = Path(source).absolute(), base_folder("nnUNet_raw")
    with contextlib.ExitStack() as stack:
        if not dry_run:
            _make_raw_folder(raw)
            stack.enter_context(only_one(raw / f".Dataset{dataset_id:03d}.lock", f"makes dataset {dataset_id}"))
        folder = stack.enter_context(_opened(source, raw, dataset_id, max_size))
        found = find_cases(folder, **options)
        parts = _choose_parts(found, source, num_labeled, protocol)
        _check_options(found.about, crop, register)
        target = raw / f"Dataset{dataset_id:03d}_{found.about.name}"
        given = (Path(option) for option in options.values() if isinstance(option, (str, Path)))
        refuse_own_source(found, [source, *(path for path in given if path.is_file())], target)
        asked = {"num_labeled": num_labeled, "protocol": protocol, "crop": crop, "register": register}
        asked |= {"options": {key: str(value) for key, value in options.items()}}
        request = describe_request(source, found, parts, asked)
        report(found, parts, target, crop, dry_run)
        begun = beginning(target, request, overwrite)
        found.check([name for name, part in parts.items() if part != "unlabeled"])
        if dry_run:
            print("nothing was written: run the same command without --dry-run")
            return target
        if target.exists() and begun is None:
            shutil.rmtree(target)
        with disk_errors(target):
            _take_back(target, begun or {}, request, found.about.file_ending)
            _convert(found, folder, target, request, num_processes, show_progress_bar)
        only = "unlabeled" not in parts.values()
        print(f"next: {proposed_planning(dataset_id, found.about.file_ending, only)}")
    return target


def _make_raw_folder(raw: Path) -> None:
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"nnUNet_raw={raw}: cannot be made ({e.strerror}): set it to another folder") from None


@contextlib.contextmanager
def _opened(source: Path, raw: Path, dataset_id: int, max_size: float | None) -> Iterator[Path]:
    """The folder with the files of the source. An archive is unpacked on the disk of `raw`.

    What was unpacked is removed at the end.

    Raises:
        UserError: there is no such source, or `raw` lies in it, or the archive cannot be unpacked.
    """
    with contextlib.ExitStack() as stack:
        folder = source
        if source.is_file() and source.name.lower().endswith(ARCHIVES):
            place = next(path for path in (raw, *raw.parents) if path.is_dir())
            folder = stack.enter_context(unpacked(source, place, f"for_{dataset_id}", max_size and max_size * 1e9))
        elif not source.is_dir():
            kind = f"no folder and no archive ({', '.join(ARCHIVES)})" if source.exists() else "no such folder"
            raise UserError(f"{source}: {kind}: give your folder or the download with -i")
        if source.resolve() in (raw.resolve(), *raw.resolve().parents):
            raise UserError(
                f"{raw}: datasets and their source {source} must not lie inside each other: move one of them"
            )
        yield folder


def _choose_parts(found: Source, source: Path, num_labeled: int | float | str | None, protocol: str) -> dict[str, str]:
    """The same as `assign`, with the source in the error. Raises UserError, too, if there is no case."""
    if not found.cases:
        layout = "\n".join(f"    {line}" for line in found.about.layout.splitlines())
        raise UserError(f"{source}: no case was found; give a folder with these files:\n{layout}")
    try:
        return assign(found, num_labeled, protocol)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _check_options(about: About, crop: str, register: str) -> None:
    """Raise UserError if options do not fit this data set."""
    if crop == "published" and about.crop is None:
        raise UserError("--crop published: this data set has no published crop: leave out this option")
    if register != "off" and (len(about.channels) == 1 or about.dimension == 2):
        raise UserError(f"--register {register}: this option is for volumes of several channels: leave it out")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", about.name):
        raise UserError(f"--name {about.name}: use letters, digits, - and _ only, and begin with a letter or a digit")


def refuse_own_source(found: Source, sources: Sequence[Path], target: Path) -> None:
    """Raise UserError if the target is a link, or if writing it would change the source, even through links.

    Args:
        sources: the folder or archive of the source, and other files of the user that are read.
    """
    here = target.resolve()
    parts = (part for case in found.cases.values() for part in (*case.images, case.label))
    for path in (*sources, *(path for part in parts for path in paths_of(part))):
        real = path.resolve()
        if real == here or here in real.parents or (path.is_dir() and real in here.parents):
            raise UserError(
                f"{target}: the dataset and its source {path} must not lie inside each other: move one of them"
            )
    if target.is_symlink():
        raise UserError(f"{target}: is a link: remove it, or choose another number with -d")


def describe_request(source: Path, found: Source, parts: Mapping[str, str], asked: Mapping) -> dict:
    """What is written into `request.json`, so that `beginning` and `_take_back` can compare it after an interruption.

    Args:
        parts: the part of each case; see `assign`.
        asked: the options.
    """
    about = found.about
    form = [about.file_ending, about.dimension, *map(str, (about.labels, about.channels))]
    stamps = {name: stamp(found.cases[name], part, source) for name, part in parts.items()}
    return {"source": str(source), "parts": parts, **asked, "form": form, "stamps": stamps}


def stamp(case: Case, part: str, source: Path) -> list:
    """The sizes and times of the files of a case, or of the archive that contains them."""
    label = () if part == "unlabeled" else (case.label,)
    files = [path for image in (*case.images, *label) for path in paths_of(image)]
    if source.is_file():
        about = source.stat()
        return [len(files), about.st_size, about.st_mtime_ns]
    about = ((file, file.stat()) for path in files for file in files_of(path))
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in about]


def beginning(target: Path, request: dict, overwrite: bool) -> dict | None:
    """The request of an earlier conversion that is not finished. None if a new conversion begins.

    Raises:
        UserError: the number or the folder is in use, or the earlier conversion had other options.
    """
    others = [p.name for p in target.parent.glob(f"{target.name.partition('_')[0]}_*") if p.name != target.name]
    if others:
        raise UserError(
            f"{target.parent / others[0]}: this dataset has the same number: choose another number with -d, or"
            f" remove this folder"
        )
    if overwrite or not target.exists():
        return None
    begun = target / STATE / "request.json"
    if not begun.is_file():
        raise UserError(f"{target}: exists already: replace it with --overwrite, or choose another number with -d")
    before = read_json(begun, "begin again with --overwrite")
    asked = ("source", "num_labeled", "protocol", "crop", "register", "options")
    if any(before.get(key) != request[key] for key in asked):
        raise UserError(
            f"{target}: was begun with other options: use the same options again, or begin again with --overwrite"
        )
    # the format of all files may depend on a case that was removed since
    return before if before.get("form") == request["form"] else None


def _take_back(target: Path, begun: Mapping, request: Mapping, ending: str) -> None:
    """Remove the written files of cases that no longer exist, have changed, or now belong to another part.

    Args:
        begun: the request of the interrupted conversion.
        request: the present request; see `describe_request`.
        ending: the `file_ending` of the dataset.
    """
    for name, part in begun.get("parts", {}).items():
        if request["parts"].get(name) != part or begun["stamps"][name] != request["stamps"][name]:
            (target / STATE / f"case_{name}.json").unlink(missing_ok=True)
            (target / f"labels{SUBSETS[part]}" / f"{name}{ending}").unlink(missing_ok=True)
            for image in target.glob(f"images{SUBSETS[part]}/*"):
                if re.fullmatch(rf"{re.escape(name)}_\d{{4}}{re.escape(ending)}", image.name):
                    image.unlink()


def _convert(source: Source, folder: Path, target: Path, request: dict, num_processes, show_progress_bar) -> None:
    about, parts, state = source.about, request["parts"], target / STATE
    state.mkdir(parents=True, exist_ok=True)
    write_json(request, state / "request.json")
    (target / "dataset.json").unlink(missing_ok=True)
    for subset in {SUBSETS[part] for part in parts.values()}:
        for kind in ("images",) if subset == "Un" else ("images", "labels"):
            (target / f"{kind}{subset}").mkdir(exist_ok=True)

    crop = about.crop if request["crop"] == "published" else None
    jobs = [
        (source.cases[name], SUBSETS[part], about, crop, folder, target, request["register"])
        for name, part in parts.items()
        if not (state / f"case_{name}.json").exists()
    ]
    if len(jobs) < len(parts):
        print(f"continuing: {len(parts) - len(jobs)} cases are complete already")
    problems = {}
    with killed_workers(target), contextlib.closing(run_jobs(convert_case, jobs, num_processes)) as results:
        for name, problem in tqdm(results, "Cases", len(jobs), disable=not (jobs and show_progress_bar)):
            if problem:
                problems[name] = problem
    lines = [f"case {name}: {problems[name]}" for name in sorted(problems)]
    if not {name for name, part in parts.items() if part == "labeled"} - set(problems):
        raise UserError(
            "\n".join([*lines, f"{target}: no labelled case is complete: fix these cases, then run the command again"])
        )
    _finish(source, target, request, [name for name in parts if name not in problems])
    if problems:
        raise UserError(
            "\n".join([*lines, f"{target}: was made without these cases: fix them, then run the command again"])
        )
    shutil.rmtree(state)


def _finish(source: Source, target: Path, request: dict, whole: Sequence[str]) -> None:
    """Print the notes, then write splits_final.json, texts.json and, last of all, dataset.json."""
    about, state = source.about, target / STATE
    records = {name: json.loads((state / f"case_{name}.json").read_bytes()) for name in whole}
    for name, record in records.items():
        for note in record["notes"]:
            print(f"case {name}: {note}")
    labeled_cases, validation = (
        [n for n in whole if request["parts"][n] == part] for part in ("labeled", "validation")
    )
    for file in ("splits_final.json", "texts.json"):  # an earlier run may have had other cases
        (target / file).unlink(missing_ok=True)
    if validation:
        write_json([{"train": labeled_cases, "val": validation}], target / "splits_final.json")
    elif folds := folds_by_patient(labeled_cases, source.patients) if source.patients else []:
        write_json(folds, target / "splits_final.json")
    if texts := {name: source.cases[name].text for name in whole if source.cases[name].text}:
        write_json(texts, target / "texts.json")
    staging = state / "dataset"
    staging.mkdir(exist_ok=True)
    generate_dataset_json(
        str(staging),
        dict(enumerate(about.channels)),
        {name: list(value) if isinstance(value, tuple) else value for name, value in about.labels.items()},
        len(labeled_cases) + len(validation),
        about.file_ending,
        regions_class_order=about.regions_class_order,
        dataset_name=about.name,
        reference=about.url,
        license=about.licence,
        description="; ".join((about.title, *about.notes)),
        converted_by="nnunet_semiseg",
        semiseg={
            "prompts": dict(about.prompts),
            "licence": about.licence,
            "citation": about.citation,
            "protocol": about.protocol if request["protocol"] == "published" else "every case trains, no test set",
            ORDER_KEY: [name for name in request["parts"] if name in labeled_cases],  # in the published order
            "crop": f"round the ground truth ({about.crop.source})" if request["crop"] == "published" else "none",
            "notes": list(about.notes),
            "sources": {file: digest for record in records.values() for file, digest in record["sources"].items()},
        },
    )
    os.replace(staging / "dataset.json", target / "dataset.json")
