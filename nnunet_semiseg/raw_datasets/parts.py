"""Choose which cases are labelled, for validation, unlabelled or for the test."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.description import Source
from nnunet_semiseg.raw_datasets.names import some


def assign(source: Source, num_labeled: int | float | str | None, protocol: str) -> dict[str, str]:
    """Decide for each case of the lists whether it is labeled, validation, unlabeled or test.

    The labelled cases are the first of the published list. If one of them is missing, there is one labelled case less.
    The next one does not replace it, because then the labelled set would differ from that of other people.

    Raises:
        UserError: no training case exists, or none has a label; the list has fewer cases with a label than asked for;
            none of the chosen ones exists; or a case is in two lists.
    """
    present = source.cases.keys()
    lists = {"train": source.train, "val": source.val, "test": source.test}
    lists = {part: list(dict.fromkeys(names)) for part, names in lists.items()}
    refuse_in_two_lists(lists)
    if protocol == "all":
        listed = [name for name in dict.fromkeys(itertools.chain(*lists.values())) if name in present]
        lists = {"train": [*listed, *(name for name in present if name not in listed)], "val": [], "test": []}
    train = [name for name in lists["train"] if name in present]
    if not train:
        raise UserError(
            "no training case was found: give the whole download with -i, or train on all cases with --protocol all"
        )
    candidates = [name for name in lists["train"] if name not in present or source.cases[name].label is not None]
    if not candidates:
        raise UserError("no training case has a label: put the labels there, too")
    n = _count(num_labeled, source.about.num_labeled, len(lists["train"]), len(candidates))
    keep = set(candidates[:n]) & present
    if not keep:
        raise UserError(
            f"none of the first {n} cases of the training list was found: give the whole download with -i, a larger"
            " --labeled, or --protocol all"
        )
    parts = {name: "labeled" if name in keep else "unlabeled" for name in train}
    parts |= {name: "validation" for name in lists["val"] if name in present}
    return parts | {name: "test" for name in lists["test"] if name in present}


def refuse_in_two_lists(lists: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError if a case is in the lists of two parts."""
    for (one, names), (other, others) in itertools.combinations(lists.items(), 2):
        if both := sorted(set(names) & set(others)):
            raise UserError(f"case {some(both)} is in the {one} and in the {other} list: remove it from one of them")


def _count(num_labeled: int | float | str | None, published: int | float | None, cases: int, candidates: int) -> int:
    asked = published if num_labeled is None else num_labeled
    if asked in (None, "all"):
        return candidates
    n = max(1, round(asked * cases)) if isinstance(asked, float) else asked
    if num_labeled is None:
        return min(n, candidates)
    if not 1 <= n <= candidates:
        raise UserError(
            f"--labeled {num_labeled}: asks for {n} labelled cases, but {candidates} of the {cases} training cases"
            f" have a label: give a number from 1 to {candidates}, a smaller fraction, or all"
        )
    return n
