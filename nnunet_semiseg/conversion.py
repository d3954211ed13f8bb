"""From what the user has downloaded to a raw dataset of nnU-Net's, with `imagesUn`.

A module in `dataset_conversion/` describes one data set and finds its cases (`ABOUT`, `find_cases`); assigning them
to labelled, unlabelled and test, checking, writing and going on after an interruption is here, the same for all:
a module's `convert` is `convert_dataset` with its `find_cases`.

While a dataset is being made, a folder `.conversion` in it holds what was asked for and a record of every case that
is whole. It stays where a case failed, so that the same command goes on; `dataset.json` comes last.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from tqdm import tqdm

from nnunet_semiseg.archives import ARCHIVES, unpacked
from nnunet_semiseg.data.image_problems import geometry_difference, nifti_damage, one_line_of
from nnunet_semiseg.data.labeled_subset import ORDER_KEY
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import base_folder, read_json, write_json
from nnunet_semiseg.parallel import run_jobs

STATE = ".conversion"
SUBSETS = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}
PICTURES = (".png", ".bmp", ".tif")  # of those that nnU-Net reads
JUNK = (".", "__MACOSX", "~$")


@dataclass(frozen=True)
class Crop:
    """A published crop: the label's bounding box, grown to at least `size`, and a margin outside of that.

    Args:
        size, margin: voxels, x y z; None where an axis is not cropped.
        source: who publishes it.
    """

    size: tuple[int | None, ...]
    margin: tuple[int | None, ...]
    source: str

    def __call__(self, label: sitk.Image) -> tuple[slice, ...]:
        """Slices, x y z, of an image on the label's grid. Raises UserError where the label is empty."""
        foreground = np.nonzero(sitk.GetArrayViewFromImage(label))[::-1]  # z y x to x y z
        if not len(foreground[0]):
            raise UserError("the label is empty, so that there is nothing to crop round: --crop none")
        slices = []
        for indices, size, margin, extent in zip(foreground, self.size, self.margin, label.GetSize(), strict=True):
            if size is None:
                slices.append(slice(0, extent))
                continue
            first, end = int(indices.min()), int(indices.max()) + 1
            missing = max(size - (end - first), 0)
            first, end = first - missing // 2 - margin, end + missing - missing // 2 + margin
            slices.append(slice(max(first, 0), min(end, extent)))
        return tuple(slices)


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a data set before its files are looked at.

    Args:
        name: of the dataset, behind its number.
        layout: what the download looks like; shown where no case is found.
        protocol: the published split, in words.
        labeled: how many labelled cases by default; None: all that have a label.
        labels, regions_class_order, file_ending: as in `dataset.json`.
        dims: of every image; None: 2 for pictures, else 3.
        label_values: value in the source to value in the dataset; None: the values of `labels`.
        notes: what a user should know before using it.
    """

    name: str
    title: str
    url: str
    licence: str
    citation: str
    layout: str
    protocol: str
    channels: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    prompts: Mapping[str, str | list[str]]
    regions_class_order: tuple[int, ...] | None = None
    file_ending: str = ".nii.gz"
    dims: int | None = None
    label_values: Mapping[int, int] | None = None
    labeled: int | float | None = None
    crop: Crop | None = None
    notes: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        return self.dims or (2 if self.file_ending in PICTURES else 3)

    @property
    def label_map(self) -> dict[int, int]:
        if self.label_values is not None:
            return dict(self.label_values)
        values = (
            v for label in self.labels.values() for v in (label if isinstance(label, (list, tuple)) else (label,))
        )
        return {int(v): int(v) for v in values}


@dataclass(frozen=True)
class Read:
    """An image that is not what nnU-Net reads: `function(*paths, **options)` gives it, in a worker.

    The function returns a SimpleITK image, or a pair of it and a note for the report.
    """

    function: Callable[..., sitk.Image | tuple[sitk.Image, str]]
    paths: tuple[Path, ...]
    options: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A case as the source has it; a plain path is linked where nnU-Net can read it as it is."""

    name: str
    images: tuple[Path | Read, ...]
    label: Path | Read | None = None
    text: str | None = None


@dataclass(frozen=True)
class Source:
    """The cases of a download, and their published lists: the first of `train` are the labelled ones."""

    about: About
    cases: Mapping[str, Case]
    train: Sequence[str]
    val: Sequence[str] = ()
    test: Sequence[str] = ()


# --------------------------------------------------------------------------- what the modules of data sets use


def published_split(name: str) -> dict:
    """A published list of case names, from `dataset_conversion/splits`."""
    file = resources.files("nnunet_semiseg.dataset_conversion") / "splits" / f"{name}.json"
    return json.loads(file.read_bytes())


def seeded_split(names: Iterable[str], test: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Training cases in an order of their own, and a share for testing, for data with no published list.

    The order is that of a hash of each name, so that a case that is missing changes nothing for the others.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    n = round(test * len(order))
    return order[n:], order[:n]


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Files and folders below a folder, at any depth, whose path ends like the pattern, sorted.

    Args:
        pattern: `*.tif`, or with the names of the folders above: `imagesTr/lung_*.nii.gz`.

    Links to folders are followed. What a Mac or an office program leaves beside files is not found: `__MACOSX`, `._x`,
    `~$x`, and all that is hidden.
    """
    found, seen = [], {os.path.realpath(folder)}
    for directory, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(directory, name)) for name in folders}
        folders[:] = [name for name in folders if not name.startswith(JUNK) and real[name] not in seen]
        seen |= {real[name] for name in folders}  # a link may lead back to where it lies
        paths = (Path(directory, name) for name in (*folders, *files) if not name.startswith(JUNK))
        found += [path for path in paths if path.match(pattern)]
    return sorted(found)


def by_name(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Paths by case name, sorted.

    Raises:
        UserError: a case that is there twice; names both paths.
    """
    paths: dict[str, Path] = {}
    for name, path in sorted(found):
        if name in paths:
            raise UserError(f"{path}: case {name} is there twice, also as {paths[name]}: take one away")
        paths[name] = path
    return paths


def read_dicom_series(folder: Path) -> sitk.Image:
    """The one DICOM series below a folder, be its files in one folder or in several.

    Raises:
        UserError: no series, or several; slices that are missing, or there twice.
    """
    series: dict[str, list[str]] = {}
    for directory in sorted({file.parent for file in find_files(folder, "*") if file.is_file()}):
        for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(directory)):
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(directory), uid)
            series.setdefault(uid, []).extend(files)
    if len(series) != 1:
        raise UserError(f"{folder}: {len(series) or 'no'} DICOM series: leave exactly one there")
    (files,) = series.values()
    return sitk.ReadImage(_in_order(files, folder))


def _in_order(files: Sequence[str], folder: Path) -> list[str]:
    """Slices by their position. ITK reads what is missing or there twice as a volume with another spacing."""
    heights, origins = {}, {}
    for file in files:
        header = sitk.ImageFileReader()
        header.SetFileName(file)
        header.ReadImageInformation()
        origin, direction = header.GetOrigin(), np.reshape(header.GetDirection(), (3, 3))
        heights[file] = float(np.dot(origin, direction[:, 2]))
        origins[file] = origin - heights[file] * direction[:, 2]
    ordered = sorted(files, key=heights.get)
    if len(ordered) == 1:
        return ordered
    gaps = np.diff([heights[file] for file in ordered])
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise UserError(f"{folder}: slices are there twice, at {heights[ordered[gaps.argmin()]]:g} mm: remove copies")
    odd = np.abs(gaps - usual).argmax()
    if abs(gaps[odd] - usual) > max(0.1 * usual, 0.11):  # positions are often rounded to 0.1 mm
        raise UserError(
            f"{folder}: slices are {usual:g} mm apart, but {gaps[odd]:g} mm at {heights[ordered[odd]]:g} mm: some are"
            f" missing, or of another series"
        )
    if np.ptp(list(origins.values()), axis=0).max() > 1:
        raise UserError(f"{folder}: slices are shifted against each other (a tilted gantry): resample the volume first")
    return ordered


def read_gray(path: Path) -> sitk.Image:
    """A 2d image of which all colour channels are alike, as one channel."""
    return one_channel(sitk.ReadImage(path), str(path))


def one_channel(image: sitk.Image, name: str) -> sitk.Image:
    """The image itself, or the first of its colour channels, if all are alike. Raises UserError if they are not."""
    if image.GetNumberOfComponentsPerPixel() == 1:
        return image
    voxels = sitk.GetArrayViewFromImage(image)
    colours = 3 if image.GetNumberOfComponentsPerPixel() >= 3 else 1  # grey and alpha
    if not (voxels[..., :colours] == voxels[..., :1]).all():
        raise UserError(f"{name}: a colour image, where a grey one belongs: save it so, or name all --channels")
    return sitk.VectorIndexSelectionCast(image, 0)


# ------------------------------------------------------------------------------------------------ the conversion


def convert_dataset(
    find_cases: Callable[..., Source],
    source: str | Path,
    dataset_id: int,
    *,
    labeled: int | float | str | None = None,
    protocol: str = "published",
    crop: str = "none",
    num_processes: int = 8,
    overwrite: bool = False,
    dry_run: bool = False,
    show_progress_bar: bool = True,
    **options,
) -> Path:
    """Make `DatasetNNN_Name` below `nnUNet_raw`; run again after an interruption, it goes on.

    Args:
        find_cases: of the data set's module; called with the source's folder and the options.
        source: a folder, or an archive (zip, tar), which is unpacked for the time of the conversion.
        labeled: cases that keep their label: a number, a fraction of the training cases, "all", or None for what
            the data set publishes. The first of the published order are taken.
        protocol: "published" keeps to the published lists; "all" trains on every case and has no test set.
        crop: "published" crops round the ground truth, of unlabelled and test cases too; "none" does not.
        num_processes: 0 works in this process; a script that asks for more needs `if __name__ == "__main__":`.
        overwrite: begin anew where there is such a dataset.
        dry_run: say what would be done, write nothing.

    Returns:
        The dataset's folder.

    Raises:
        UserError: nothing to convert, or it cannot be written; one line for each case that is bad, after all others
            are done.
    """
    source = Path(source).absolute()
    with contextlib.ExitStack() as stack:
        folder, raw = source, base_folder("nnUNet_raw")
        try:
            raw.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"nnUNet_raw={raw}: cannot be made ({e.strerror}): set it to a folder") from None
        if source.is_file() and source.name.lower().endswith(ARCHIVES):
            folder = stack.enter_context(unpacked(source, raw, f"for_{dataset_id}"))
        elif not source.is_dir():
            kind = f"no folder and no archive ({', '.join(ARCHIVES)})" if source.exists() else "no such folder"
            raise UserError(f"{source}: {kind}: give the download with -i")
        found = find_cases(folder, **options)
        if not found.cases:
            layout = "\n".join(f"    {line}" for line in found.about.layout.splitlines())
            raise UserError(f"{source}: no case found; expected is\n{layout}")
        parts = assign(found, labeled, protocol)
        if crop == "published" and found.about.crop is None:
            raise UserError("--crop published: this data set has no published crop: leave it out")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", found.about.name):
            raise UserError(f"--name {found.about.name}: letters, digits, - and _ only")
        target = raw / f"Dataset{dataset_id:03d}_{found.about.name}"
        given = (Path(option) for option in options.values() if isinstance(option, (str, Path)))
        refuse_own_source(found, [source, *(path for path in given if path.is_file())], target)
        request = {"source": str(source), "parts": parts, "labeled": labeled, "protocol": protocol, "crop": crop}
        request |= {"options": {key: str(value) for key, value in options.items()}}
        form = [found.about.file_ending, found.about.dimension, *map(str, (found.about.labels, found.about.channels))]
        request |= {"form": form, "stamps": {n: stamp(found.cases[n], part, source) for n, part in parts.items()}}
        report(found, parts, target, crop)
        begun = beginning(target, request, overwrite)
        if not dry_run:
            if target.exists() and begun is None:
                shutil.rmtree(target)
            _take_back(target, begun or {}, request, found.about.file_ending)
            _convert(found, folder, target, request, num_processes, show_progress_bar)
    return target


def assign(source: Source, labeled: int | float | str | None, protocol: str) -> dict[str, str]:
    """Case name to part: labeled, validation, unlabeled or test.

    The labelled ones are the first of the published list. One that is not there is not replaced by the next: the
    labelled set would be another than everybody's.

    Raises:
        UserError: more labelled cases asked for than there are, none at all, or a case in two lists.
    """
    present = source.cases.keys()
    lists = {"train": source.train, "val": source.val, "test": source.test}
    lists = {part: list(dict.fromkeys(names)) for part, names in lists.items()}
    for (one, names), (other, others) in itertools.combinations(lists.items(), 2):
        if both := sorted(set(names) & set(others)):
            raise UserError(f"case {_some(both)} is in the {one} and in the {other} list: take it out of one")
    if protocol == "all":
        listed = [name for name in dict.fromkeys(itertools.chain(*lists.values())) if name in present]
        lists = {"train": [*listed, *(name for name in present if name not in listed)], "val": [], "test": []}
    train = [name for name in lists["train"] if name in present]
    if not train:
        raise UserError("none of the listed training cases is there: use --protocol all, or look at -i")
    candidates = [name for name in lists["train"] if name not in present or source.cases[name].label is not None]
    n = _count(labeled, source.about.labeled, len(lists["train"]), len(candidates))
    keep = set(candidates[:n]) & present
    if not keep:
        raise UserError(
            "no training case has a label"
            if n == 0
            else f"none of the first {n} cases of the list is there: give a larger --labeled, or use --protocol all"
        )
    parts = {name: "labeled" if name in keep else "unlabeled" for name in train}
    parts |= {name: "validation" for name in lists["val"] if name in present}
    return parts | {name: "test" for name in lists["test"] if name in present}


def _count(labeled: int | float | str | None, published: int | float | None, cases: int, candidates: int) -> int:
    asked = published if labeled is None else labeled
    if asked in (None, "all"):
        return candidates
    n = max(1, round(asked * cases)) if isinstance(asked, float) else asked
    if labeled is None:
        return min(n, candidates)
    if not 1 <= n <= candidates:
        raise UserError(
            f"--labeled {labeled}: {n} labelled cases, but {candidates} of the {cases} training cases have a label: "
            f"give a number from 1 to {candidates}, a fraction, or all"
        )
    return n


def report(source: Source, parts: Mapping[str, str], target: Path, crop: str) -> None:
    about, count = source.about, Counter(parts.values())
    print(about.title)
    facts = {"": about.url, "licence: ": about.licence, "cite: ": about.citation, "protocol: ": about.protocol}
    for heading, fact in facts.items():
        if fact:
            print(f"  {heading}{fact}")
    for note in about.notes:
        print(f"  note: {note}")
    print(f"{target}: " + ", ".join(f"{count[part]} {part}" for part in SUBSETS if count[part]))
    missing = [name for names in (source.train, source.val, source.test) for name in names if name not in source.cases]
    if missing:
        print(f"WARNING: {len(missing)} cases of the published lists are not there: {_some(missing)}")
    if not count["unlabeled"]:
        print("no unlabelled case: plan it with --labeled_only, or with nnUNetv2_plan_and_preprocess")
    left_out = sorted(set(source.cases) - set(parts))
    if left_out:
        print(f"{len(left_out)} cases are in no list and left out (--protocol all takes them): {_some(left_out)}")
    if crop != "none":
        print(f"WARNING: images are cropped round the ground truth, test cases too ({about.crop.source})")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def refuse_own_source(found: Source, sources: Sequence[Path], target: Path) -> None:
    """Raises UserError where making or replacing the target would touch what it is made of, through links, too."""
    here = target.resolve()
    parts = (part for case in found.cases.values() for part in (*case.images, case.label))
    for path in (*sources, *(path for part in parts for path in _paths(part))):
        real = path.resolve()
        if real == here or here in real.parents or (path.is_dir() and real in here.parents):
            raise UserError(f"{target}: the dataset and its source {path} must not lie in each other: move one")
    if target.is_symlink():
        raise UserError(f"{target}: is a link: remove it, or choose another number with -d")


def stamp(case: Case, part: str, source: Path) -> list:
    """Sizes and times of the files that a case is made of, or of the archive that they come from."""
    label = () if part == "unlabeled" else (case.label,)
    files = [path for image in (*case.images, *label) for path in _paths(image)]
    if source.is_file():
        about = source.stat()
        return [len(files), about.st_size, about.st_mtime_ns]
    about = ((file, file.stat()) for path in files for file in _files_of(path))
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in about]


def _files_of(path: Path) -> list[Path]:
    """A file, or a header and its data, or all files in a folder (a DICOM series), by the order of their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if path.name.lower().endswith((".mhd", ".nhdr")):
        files = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [file for file in files if file.is_file()]


def _paths(source: Path | Read | None) -> tuple[Path, ...]:
    return () if source is None else source.paths if isinstance(source, Read) else (source,)


def beginning(target: Path, request: dict, overwrite: bool) -> dict | None:
    """What was asked for when this very conversion was begun, where it is not finished; None: begin.

    Raises:
        UserError: the number or the folder is in use.
    """
    others = [p.name for p in target.parent.glob(f"{target.name.partition('_')[0]}_*") if p.name != target.name]
    if others:
        raise UserError(f"{target.parent / others[0]}: has the same number: choose another with -d")
    if overwrite or not target.exists():
        return None
    begun = target / STATE / "request.json"
    if not begun.is_file():
        raise UserError(f"{target}: exists already: replace it with --overwrite, or choose another number with -d")
    before = read_json(begun, "begin anew with --overwrite")
    asked = ("source", "labeled", "protocol", "crop", "options")
    if any(before.get(key) != request[key] for key in asked):
        raise UserError(f"{target}: was begun with other options: repeat those, or begin anew with --overwrite")
    # a case that was taken out may have decided on the kind of file that all are written as
    return before if before.get("form") == request["form"] else None


def _take_back(target: Path, begun: Mapping, request: Mapping, ending: str) -> None:
    """Remove cases that were begun and are gone since, have changed, or now belong to another part."""
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
        (source.cases[name], SUBSETS[part], about, crop, folder, target)
        for name, part in parts.items()
        if not (state / f"case_{name}.json").exists()
    ]
    if len(jobs) < len(parts):
        print(f"going on: {len(parts) - len(jobs)} cases are there")
    problems = {}
    try:
        with contextlib.closing(run_jobs(convert_case, jobs, num_processes)) as results:
            for name, problem in tqdm(results, "Cases", len(jobs), disable=not (jobs and show_progress_bar)):
                if problem:
                    problems[name] = problem
    except BrokenProcessPool:
        raise UserError(
            f"{target}: a worker was killed, probably for want of memory: run the same command again, with a smaller "
            f"-np; what is done is kept"
        ) from None
    lines = [f"case {name}: {problems[name]}" for name in sorted(problems)]
    if not {name for name, part in parts.items() if part == "labeled"} - set(problems):
        raise UserError(
            "\n".join([*lines, f"{target}: no labelled case is whole: mend them and run the command again"])
        )
    _finish(source, target, request, [name for name in parts if name not in problems])
    if problems:
        raise UserError("\n".join([*lines, f"{target}: made without these; mend them and run the command again"]))
    shutil.rmtree(state)


def _finish(source: Source, target: Path, request: dict, whole: Sequence[str]) -> None:
    """Notes to the console; splits_final.json, texts.json and, last of all, dataset.json."""
    about, state = source.about, target / STATE
    records = {name: json.loads((state / f"case_{name}.json").read_bytes()) for name in whole}
    for name, record in records.items():
        for note in record["notes"]:
            print(f"case {name}: {note}")
    labeled, validation = ([n for n in whole if request["parts"][n] == part] for part in ("labeled", "validation"))
    for file in ("splits_final.json", "texts.json"):  # of a beginning with other cases
        (target / file).unlink(missing_ok=True)
    if validation:
        write_json([{"train": labeled, "val": validation}], target / "splits_final.json")
    if texts := {name: source.cases[name].text for name in whole if source.cases[name].text}:
        write_json(texts, target / "texts.json")
    staging = state / "dataset"
    staging.mkdir(exist_ok=True)
    generate_dataset_json(
        str(staging),
        dict(enumerate(about.channels)),
        {name: list(value) if isinstance(value, tuple) else value for name, value in about.labels.items()},
        len(labeled) + len(validation),
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
            ORDER_KEY: [name for name in request["parts"] if name in labeled],  # as published
            "crop": f"round the ground truth ({about.crop.source})" if request["crop"] == "published" else "none",
            "notes": list(about.notes),
            "sources": {file: digest for record in records.values() for file, digest in record["sources"].items()},
        },
    )
    os.replace(staging / "dataset.json", target / "dataset.json")


def convert_case(
    case: Case, subset: str, about: About, crop: Crop | None, folder: Path, target: Path
) -> tuple[str, str | None]:
    """Check and write one case; a record in `.conversion` says that it is whole.

    Returns:
        The case's name, and what is wrong with it, in one line.
    """
    staging = target / STATE / f"case_{case.name}"
    shutil.rmtree(staging, ignore_errors=True)  # a killed run may have left it
    try:
        # the label of an unlabelled case is not opened, unless the user has asked for a crop round it
        notes = _write_case(case, subset, about, crop, staging)
        for file in staging.rglob(f"*{about.file_ending}"):
            os.replace(file, target / file.parent.name / file.name)
        labels = () if case.label is None or subset == "Un" else (case.label,)
        sources = {}
        for source in (*case.images, *labels):
            for path in _paths(source):
                sources[os.path.relpath(path, folder)] = _sha256(path)
        write_json({"sources": sources, "notes": notes}, target / STATE / f"case_{case.name}.json")
    except Exception as e:  # readers raise of many kinds
        return case.name, one_line_of(e)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return case.name, None


def _write_case(case: Case, subset: str, about: About, crop: Crop | None, staging: Path) -> list[str]:
    notes: list[str] = []
    images = [_load(image, notes) for image in case.images]
    channels = sum(image.GetNumberOfComponentsPerPixel() for image in images)
    if channels != len(about.channels):
        expected = f"{len(about.channels)} ({', '.join(about.channels)})"
        raise UserError(f"{_name(case.images[0])}: {channels} channels instead of {expected}")
    for path, image in zip(case.images, images, strict=True):
        if image.GetDimension() != about.dimension:
            raise UserError(f"{_name(path)}: {image.GetDimension()} dimensions, but the dataset has {about.dimension}")
        if difference := geometry_difference(image, images[0]):
            raise UserError(f"{_name(path)}: {difference} in {_name(case.images[0])}")
    label = None
    if case.label is None and subset == "Tr":
        raise UserError("has no label, which a labelled case needs")
    if case.label is not None and (subset != "Un" or crop):
        given = _load(case.label, notes)
        label = one_channel(given, _name(case.label))
        if difference := geometry_difference(label, images[0]):
            raise UserError(f"{_name(case.label)}: {difference} in {_name(case.images[0])}")
        label.CopyInformation(images[0])  # they differ by no more than what files round
    slices = crop(label) if crop else None
    folder, ending = staging / f"images{subset}", about.file_ending
    for i, (path, image) in enumerate(zip(case.images, images, strict=True)):
        _write(image, path, slices, folder / f"{case.name}_{i:04d}{ending}", ending)
    if label is None or subset == "Un":
        return [*notes, "has no label: it can be predicted, not evaluated"] if subset == "Ts" else notes
    mapped = _map_label(label, about.label_map, _name(case.label))
    if not sitk.GetArrayViewFromImage(mapped).any():
        notes.append("the label is empty")
    path = case.label if mapped is given else None
    _write(mapped, path, slices, staging / f"labels{subset}" / f"{case.name}{ending}", ending)
    return notes


def _load(source: Path | Read, notes: list[str]) -> sitk.Image:
    for path in source.paths if isinstance(source, Read) else (source,):
        if not path.exists():
            raise UserError(f"{path}: missing")
        if path.is_file() and (damage := nifti_damage(path)):
            raise UserError(f"{path}: {damage}")
    try:
        loaded = (
            source.function(*source.paths, **source.options) if isinstance(source, Read) else sitk.ReadImage(source)
        )
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{_name(source)}: cannot be read ({one_line_of(e)})") from None
    if isinstance(loaded, tuple):
        loaded, note = loaded
        notes.append(note)
    if loaded.GetDimension() == 2:  # dots per inch, which nnU-Net does not read and masks do not share
        loaded.SetSpacing((1, 1))
        loaded.SetOrigin((0, 0))
    voxels = sitk.GetArrayViewFromImage(loaded)
    if np.issubdtype(voxels.dtype, np.floating) and not np.isfinite(voxels).all():
        raise UserError(f"{_name(source)}: has voxels that are NaN or infinite")
    return loaded


def _map_label(label: sitk.Image, values: Mapping[int, int], name: str) -> sitk.Image:
    """The label itself where nothing is to be changed, else a copy with the dataset's values, uint8."""
    voxels = sitk.GetArrayViewFromImage(label)
    present = np.unique(voxels)
    if unknown := [f"{v:g}" for v in present if v not in values]:
        known = ", ".join(map(str, values))
        raise UserError(f"{name}: label value {_some(unknown)}, known are {known}: correct it, or name all its labels")
    if {1, 255} <= set(present.tolist()) and values[1] == values[255]:
        raise UserError(f"{name}: label values 1 and 255 at once, and 255 is read as 1: leave one")
    if np.issubdtype(voxels.dtype, np.integer) and all(values[int(v)] == v for v in present):
        return label
    mapped = np.zeros(voxels.shape, np.uint8)
    for value in present:
        mapped[voxels == value] = values[int(value)]
    mapped = sitk.GetImageFromArray(mapped)
    mapped.CopyInformation(label)
    return mapped


def _write(image: sitk.Image, source: Path | Read | None, slices, file: Path, ending: str) -> None:
    """Link the source's file where it is what nnU-Net reads, copy it where links do not work, else write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if slices is not None or not isinstance(source, Path) or not source.name.endswith(ending):
        sitk.WriteImage(image if slices is None else image[slices], file, useCompression=True)
        return
    try:
        os.link(source.resolve(), file)
    except OSError:
        shutil.copyfile(source, file)


def _name(source: Path | Read) -> str:
    return str(source.paths[0] if isinstance(source, Read) else source)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files_of(path):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
