"""Fewer labels than there are: the share-of-labels curve, without a copy of any image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.schema import DATASET_SECTION, read_splits

ORDER_KEY = "labeled_order"
"""in the `semiseg` section of dataset.json: labelled cases in the published order"""


def take_labeled(
    training: Sequence[str], validation: Sequence[str], num_labeled: int | None, dataset_json: dict
) -> tuple[list[str], list[str], list[str]]:
    """The first labelled cases of a fold, in the published order where dataset.json has one, else by name.

    Args:
        training, validation: nnU-Net's split; the same cases in fold `all`.
        num_labeled: how many training cases keep their label; None: all.

    Returns:
        Training and validation cases, and those whose label must not be seen: they are unlabelled.

    Raises:
        UserError: there are fewer.
    """
    if num_labeled is None:
        return list(training), list(validation), []
    if num_labeled > len(training):
        raise UserError(
            f"setting num_labeled={num_labeled}: the fold has {len(training)} labelled training cases;"
            f" set it to {len(training)} or less"
        )
    order = {case: i for i, case in enumerate(dataset_json.get(DATASET_SECTION, {}).get(ORDER_KEY, ()))}
    ordered = sorted(training, key=lambda case: (order.get(case, len(order)), case))
    kept, hidden = ordered[:num_labeled], ordered[num_labeled:]
    return kept, [case for case in validation if case not in hidden], hidden


def cases_of_fold(preprocessed: Path, cases: Sequence[str], fold: int | str) -> list[str]:
    """The training cases of a fold, as nnU-Net's `do_split` has them.

    Args:
        preprocessed: the dataset's folder with `splits_final.json`; without it nnU-Net makes five folds.
        cases: all labelled cases.
        fold: a number, or `all`.

    Raises:
        UserError: there is no such fold.
    """
    if fold == "all":
        return list(cases)
    file = preprocessed / "splits_final.json"
    if file.is_file():
        folds = read_splits(file, "correct the file, or delete it to have new folds")
    else:
        folds = generate_crossval_split(sorted(cases)) if len(cases) >= 5 else []
    if not isinstance(fold, int) or not 0 <= fold < len(folds):
        raise UserError(f"{file}: has no fold {fold}: use one of its {len(folds)} folds, or all")
    return list(folds[fold]["train"])


class JoinedDataset:
    """Cases of several of nnU-Net's preprocessed datasets in one, for its loader."""

    def __init__(self, *datasets):
        self._home = {case: dataset for dataset in datasets for case in dataset.identifiers}
        self.identifiers = list(self._home)
        self.folders = [dataset.source_folder for dataset in datasets]

    def load_case(self, identifier: str):
        return self._home[identifier].load_case(identifier)
