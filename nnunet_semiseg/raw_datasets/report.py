"""Print what a conversion does: the data set, the cases of each part, what is missing, and what is not used."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from nnunet_semiseg.raw_datasets.case import paths_of
from nnunet_semiseg.raw_datasets.description import Case, Source
from nnunet_semiseg.raw_datasets.names import some

SUBSETS = {"labeled": "Tr", "validation": "Tr", "unlabeled": "Un", "test": "Ts"}
"""The last letters of the folders of each part, such as imagesTr. `Un` is ours, the others are nnU-Net's."""
PROSE = {"labeled": "labelled", "unlabeled": "unlabelled"}
"""How a part is written in a sentence, if it differs from its name."""
FIRST = 3


def report(source: Source, parts: Mapping[str, str], target: Path, crop: str, whole: bool) -> None:
    """Print the report of a conversion: the data set, the cases of each part, the files that are not used.

    Args:
        whole: also print the first cases of each part, file by file, and all files that are not used, as for a dry run.
    """
    about = source.about
    print(about.title)
    facts = {"": about.url, "licence: ": about.licence, "cite: ": about.citation, "protocol: ": about.protocol}
    for heading, fact in facts.items():
        if fact:
            print(f"  {heading}{fact}")
    for note in about.notes:
        print(f"  note: {note}")
    by_part = {part: [name for name in parts if parts[name] == part] for part in SUBSETS}
    numbers = (f"{len(names)} {PROSE.get(part, part)}" for part, names in by_part.items() if names)
    print(f"{target}: {', '.join(numbers)}")
    if whole:
        print(f"  channels: {', '.join(about.channels)}")
        print(f"  labels: {', '.join(f'{value} {name}' for name, value in about.labels.items())}")
        for part, names in by_part.items():
            title = PROSE.get(part, part)
            for name in names[:FIRST]:
                print(f"  {title}: {describe(source.cases[name], part, about.file_ending)}")
            if len(names) > FIRST:
                print(f"  {title}: ... and {len(names) - FIRST} more")
    missing = [name for names in (source.train, source.val, source.test) for name in names if name not in source.cases]
    if missing:
        print(f"WARNING: {len(missing)} cases of the published lists are not there: {some(missing)}")
    if not by_part["unlabeled"]:
        print("no unlabelled case: plan this dataset with --labeled_only, or with nnUNetv2_plan_and_preprocess")
    if left_out := sorted(set(source.cases) - set(parts)):
        names = some(left_out, len(left_out) if whole else 5)
        print(f"{len(left_out)} cases are in no list and not converted (--protocol all takes them): {names}")
    by_reason = defaultdict(list)
    for path, reason in sorted(source.left_out.items()):
        by_reason[reason].append(path)
    for reason, paths in by_reason.items():
        print(f"left out, {reason}: {len(paths)} files: {some(paths, len(paths) if whole else 5)}")
    if source.patients:
        number = len({source.patients[name] for name in parts})
        print(f"{number} patients: all scans of a patient are in one fold, and in training or test only")
    if about.crop and crop != "none":
        print(f"WARNING: images are cropped round the ground truth, test cases too ({about.crop.source})")


def describe(case: Case, part: str, ending: str) -> str:
    """Say for each file of a case where it is written."""
    subset = SUBSETS[part]
    lines = [f"{_short(image)} -> images{subset}/{case.name}_{i:04d}{ending}" for i, image in enumerate(case.images)]
    if case.label is not None and part != "unlabeled":
        lines.append(f"{_short(case.label)} -> labels{subset}/{case.name}{ending}")
    return "; ".join(lines)


def _short(source) -> str:
    return ", ".join(os.path.join(path.parent.name, path.name) for path in paths_of(source)[:FIRST])
