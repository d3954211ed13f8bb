"""The user's own images and (fewer) labels, in folders of any form."""

from __future__ import annotations

import difflib
import math
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.options import positive
from nnunet_semiseg.raw_datasets import About, Case, Source, convert_dataset, seeded_split
from nnunet_semiseg.raw_datasets.filling import Layout
from nnunet_semiseg.raw_datasets.label_values import parse
from nnunet_semiseg.raw_datasets.layouts import recognise
from nnunet_semiseg.raw_datasets.listing import UNKNOWN, list_files, real_path
from nnunet_semiseg.raw_datasets.names import LABEL, VOLUMES, Name
from nnunet_semiseg.raw_datasets.own_files import Files
from nnunet_semiseg.raw_datasets.own_labels import Labels
from nnunet_semiseg.raw_datasets.parts import refuse_in_two_lists
from nnunet_semiseg.raw_datasets.patients import find_patients, refuse_shared
from nnunet_semiseg.raw_datasets.repair import Repair
from nnunet_semiseg.schema import check

ABOUT = About(
    name="MyData",
    title="Your own images",
    url="",
    licence="",
    citation="",
    layout="images/CASE.nii.gz and labels/CASE.nii.gz, or CASE/t1.nii.gz, CASE/t2.nii.gz and CASE/seg.nii.gz, or\n"
    "  one of many other forms (docs/data.md has a gallery): .nii.gz, .nrrd, .mha, .nii, .png, .tif, DICOM and more;\n"
    "  a case without a label is an unlabelled one",
    protocol="cases with a label are labelled; --split, --test or folders name those for validation and test",
    channels=("image",),
    labels={},
    prompts={},
    value_hint="correct it, or say what it is with --label-values VALUE=NAME ...",
)


EXAMPLES = (
    "nnunet_semiseg convert folder -i MYDATA -d 501 --labels liver --dry-run",
    "nnunet_semiseg convert folder -i MYDATA -d 501 --name LA --labels atrium",
)


def find_cases(
    folder: Path,
    labels: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    name: str = ABOUT.name,
    split: str | Path | None = None,
    spacing: Sequence[float] | None = None,
    label_values: Sequence[str] | None = None,
    nan: float | str | None = None,
    reorient: bool = False,
    test: float | None = None,
    group_by: str | None = None,
) -> Source:
    """Find the cases below a folder by the names of folders and files. A case without a label is unlabelled.

    Args:
        labels: names of the label values 1, 2, ... (if there is only one, 255 is read as 1, too). If each class has its
            own mask, and for DICOM labels, the names of the wanted classes. None: the names of the masks, or those in
            `dataset.json`; DICOM labels have no default.
        channels: names of the channels, in their order, as in the names of files or DICOM series. None: as files say.
        name: the name of the dataset.
        split: a JSON file `{"train": [case, ...], "val": [...], "test": [...]}`. None: as folders say.
        spacing: x y z, in mm, for files that do not say it: TIFF volumes, stacks of pictures, damaged headers.
        label_values: `205=kidney`, `0,1=background`, `255/0/0=kidney` for a colour.
        nan: replaces NaN and infinity: a number, or `fill` for the smallest value of the image.
        reorient: turn axes that are not at right angles to the nearest ones that are.
        test: the share of the labelled cases that becomes the test set, at random with a fixed seed.
        group_by: `patient`, or a regular expression: scans of a patient stay together in test set and folds.

    Raises:
        UserError: options are wrong; names do not show which label belongs to which image; with `group_by`, a patient
            is in two of the given lists.
    """
    found, left_out = list_files(folder)
    given = _dataset_json(folder, left_out)
    unread = [file for file, why in left_out.items() if why == UNKNOWN]
    _refuse_unread_labels(folder, unread)
    _check_names(labels, channels)
    layout = _recognise(folder, found, unread, channels or given.channels, spacing, labels)
    if not layout.images:
        return Source(ABOUT, {}, ())
    _leave_out_hidden_labels(layout)
    millimetres = tuple(spacing) if spacing else None
    repair = Repair(millimetres, nan, reorient)
    place = partial(real_path, folder=folder, found=found)
    values = Labels(place, parse(label_values, labels) if label_values else None, repair)
    files = Files(
        layout.channels or ("image",), millimetres, repair, values, place, chosen=bool(channels or given.channels)
    )
    about = replace(_describe(files, layout, labels, given, folder), name=name, protocol=_protocol(split, test))
    cases = {case: files.case(case, layout) for case in layout.images}
    lists = _read_split(Path(split).absolute(), cases) if split else _lists(layout)
    patients = find_patients(cases, layout.patients, group_by) if group_by else {}
    if test:
        lists = _draw_test(lists, layout.labels, test, patients)
    if patients:
        train, val, test_set = lists
        refuse_shared(patients, "the test set", test_set, [*train, *val])
        refuse_shared(patients, "the validation cases", val, [case for case in train if case in layout.labels])
    check = partial(values.check_values, layout, about)
    return Source(about, cases, *lists, left_out=left_out | layout.left_out, patients=patients, check=check)


def _refuse_unread_labels(folder: Path, unread: Sequence[str]) -> None:
    """Raise UserError if a file of an unknown type is a label, because its case would become unlabelled."""
    if bad := next((file for file in unread if _is_label(file)), None):
        raise UserError(
            f"{folder / bad}: this file type cannot be read: convert it to one of {', '.join(VOLUMES[:3])}, ..."
        )


def _recognise(
    folder: Path,
    paths: Iterable[str],
    unread: Sequence[str],
    channels: Sequence[str] | None,
    spacing: Sequence[float] | None,
    labels: Sequence[str] | None,
) -> Layout:
    """The same as `recognise`. The error also says which files have an unknown type, because they may be the cause."""
    kinds = Counter(Path(file).suffix or file for file in unread)
    listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
    try:
        layout = recognise(paths, channels, spacing is not None, str(folder), labels)
    except UserError as error:
        raise UserError(f"{error} (files of types that cannot be read: {listed})" if listed else str(error)) from None
    if listed and not layout.images:
        raise UserError(
            f"{folder}: has no image that can be read ({', '.join(VOLUMES[:3])}, ...): convert these files: {listed}"
        )
    return layout


def _leave_out_hidden_labels(layout: Layout) -> None:
    """Leave out the labels of cases that lie in a folder of unlabelled cases."""
    for case in [case for case in layout.labels if layout.parts.get(case) == "unlabeled"]:
        layout.left_out |= dict.fromkeys(
            layout.labels.pop(case).values(), "the label of a case in an unlabelled folder"
        )


def _describe(files: Files, layout: Layout, labels: Sequence[str] | None, given: Given, folder: Path) -> About:
    """Describe the dataset. What the names of files were taken for is printed even if this fails."""
    try:
        about = files.describe(layout, labels, given.labels, folder)
    except UserError:
        print(f"taken for {layout}")  # else the user learns this only when nothing is wrong
        raise
    if about.labels == given.labels:
        about = replace(about, regions_class_order=given.regions_class_order)
    notes = (
        f"taken for {layout}",
        *([f"names of labels and channels: {given.file}"] if given.file else ()),
        *about.notes,
    )
    return replace(about, notes=notes, value_hint=ABOUT.value_hint)


# ------------------------------------------------------------------------------------------------ what is beside images


@dataclass(frozen=True)
class Given:
    """The content of a `dataset.json` beside the folders: of nnU-Net 1 or 2, or of the Decathlon (MSD)."""

    labels: Mapping[str, int | tuple[int, ...]] | None = None
    channels: tuple[str, ...] | None = None
    regions_class_order: tuple[int, ...] | None = None
    file: str = ""


def _dataset_json(folder: Path, left_out: dict[str, str]) -> Given:
    files = [name for name in left_out if name.rpartition("/")[2] == "dataset.json"]
    if len(files) != 1:
        return Given()
    content = read_json(folder / files[0], "correct it, or remove it and give --labels")
    try:
        channels = content.get("channel_names") or content.get("modality") or {}
        names = tuple(str(channels[key]) for key in sorted(channels, key=int))
        labels = {}
        for key, value in content["labels"].items():
            if str(key).isdecimal() and isinstance(value, str):  # from values to names, as before nnU-Net 2
                key, value = value, int(key)
            labels[str(key)] = tuple(value) if isinstance(value, list) else int(value)
    except (AttributeError, KeyError, TypeError, ValueError):
        return Given()  # another file with this name
    del left_out[files[0]]
    order = content.get("regions_class_order")
    if order is None and any(isinstance(value, tuple) for value in labels.values()):
        where = folder / files[0]
        raise UserError(f"{where}: has regions, but no regions_class_order: add it as nnU-Net's documentation says")
    return Given(labels, names or None, tuple(order) if order else None, files[0])


def _is_label(path: str) -> bool:
    where = Name(path).folder_kind
    return where is not None and where[1] == LABEL


def _check_names(labels: Sequence[str] | None, channels: Sequence[str] | None) -> None:
    if labels and set(labels) == {"ignore"}:
        raise UserError("--labels ignore: this names no class, only the ignored voxels: name a class, too")
    for option, names in (("--labels", ["background", *(labels or ())]), ("--channels", channels or ())):
        for name in names:
            if not name.strip():
                raise UserError(f"{option}: a name is empty: give a name for each")
            if list(names).count(name) > 1:
                why = "is value 0 in any case" if name == "background" else "is named twice"
                raise UserError(f"{option}: {name} {why}: leave it out")


# -------------------------------------------------------------------------------------------------------------- splits


def _protocol(split: str | Path | None, test: float | None) -> str:
    """Which cases are for validation and test, in words: as the user asked, or how to ask."""
    asked = ["--split names those for validation and test"] if split else []
    asked += [f"--test draws {test:g} of them for testing"] if test else []
    return "; ".join(["cases with a label are labelled", *asked]) if asked else ABOUT.protocol


def _lists(layout: Layout) -> list[list[str]]:
    """Return three lists: the training cases (those with a label first), the validation cases, the test cases.

    The names of folders say to which part a case belongs.
    """
    train = [case for case in layout.images if layout.parts.get(case, "unlabeled") == "unlabeled"]
    train = sorted(train, key=lambda case: (case not in layout.labels, case))
    return [train, *([case for case in layout.images if layout.parts.get(case) == part] for part in ("val", "test"))]


def _draw_test(
    lists: Sequence[Sequence[str]], labels: Mapping, share: float, patients: Mapping[str, str]
) -> list[list[str]]:
    train, val, test = lists
    if test:
        raise UserError(f"--test {share:g}: the source has a test set of {len(test)} cases already: leave out --test")
    of = {case: patients.get(case, case) for case in train}
    _, drawn = seeded_split({of[case] for case in train if case in labels}, share)
    kept = [case for case in train if of[case] not in drawn]
    return [kept, list(val), [case for case in train if of[case] in drawn and case in labels]]


def _read_split(file: Path, cases: Mapping[str, Case]) -> list[list[str]]:
    fix = 'write {"train": [case, ...], "val": [...], "test": [...]}'
    lists = read_json(file, fix)
    if unknown := sorted(lists.keys() - {"train", "val", "test"}):
        raise UserError(f'{file}: "{unknown[0]}" is not the name of a part: {fix}')
    check(lists, {"train": list[str], "val?": list[str], "test?": list[str]}, file, fix)
    for part, names in lists.items():
        for name in names:
            if name not in cases:
                near = [case for case in cases if name.startswith(f"{case}.")]
                near += difflib.get_close_matches(name, cases, n=1)
                hint = f"did you mean {near[0]}?" if near else f"cases have names like {next(iter(cases))}"
                raise UserError(f"{file}: {part}: there is no case {name}: {hint}")
    try:
        refuse_in_two_lists(lists)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return [lists.get(part, []) for part in ("train", "val", "test")]


# ------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's options, which are arguments of `find_cases`."""
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME",
        help="names of the classes with the values 1, 2, ... in the labels. If each class has its own mask or DICOM"
        " label: names of the ones to take. default: the names of the masks, or those in dataset.json; DICOM labels"
        " have no default",
    )  # fmt: skip
    parser.add_argument(
        "--label-values", nargs="+", metavar="VAL=NAME",
        help="class of each label value, if the values are not 1, 2, ...: 205=kidney 420=tumour 0,1=background; for"
        " colours: 255/0/0=kidney",
    )  # fmt: skip
    parser.add_argument(
        "--channels", nargs="+", metavar="NAME",
        help="names of the channels, in order. Each is a word that the names of files, folders or DICOM series have"
        " for this channel. Name a CT channel CT: nnU-Net normalises it in its own way. default: as in the names",
    )  # fmt: skip
    parser.add_argument("--name", default=ABOUT.name, help="name of the new dataset; default: %(default)s")
    parser.add_argument(
        "--split", metavar="FILE",
        help='JSON file with the cases of each part: {"train": [case, ...], "val": [...], "test": [...]}',
    )  # fmt: skip
    parser.add_argument(
        "--test",
        type=_share,
        metavar="SHARE",
        help="share of the labelled cases that are drawn at random for testing, such as 0.2; with --group-by, of their"
        " patients",
    )
    parser.add_argument(
        "--group-by", metavar="WHAT",
        help="which cases stay together, in the test set and in each fold. patient: all scans of a patient. A regular"
        " expression: all cases in whose names it, or its first group, matches the same text",
    )  # fmt: skip
    parser.add_argument(
        "--spacing", type=positive, nargs=3, metavar="MM",
        help="voxel spacing x y z in mm for files that do not say it: TIFF volumes, stacks of pictures, bad headers",
    )  # fmt: skip
    parser.add_argument(
        "--nan",
        type=_nan,
        metavar="VALUE",
        help="what replaces NaN and infinity: a number, or fill for the smallest value of the image",
    )
    parser.add_argument(
        "--reorient",
        action="store_true",
        help="if the axes of an image are not at right angles, replace them by the nearest axes at right angles",
    )


def _share(text: str) -> float:
    """Read a share. Raises ArgumentTypeError if it is not between 0 and 1."""
    value = positive(text)
    if value >= 1:
        raise ArgumentTypeError(f"{text}: give a number between 0 and 1")
    return value


def _nan(text: str) -> float | str:
    """Read `fill` or a number. Raises ArgumentTypeError for other text."""
    if text == "fill":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{text}: give fill, or a number")
    return value


convert = partial(convert_dataset, find_cases)
