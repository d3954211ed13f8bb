"""Train with fewer labels than the data set has. No image is copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.schema import DATASET_SECTION, read_splits

ORDER_KEY = "labeled_order"
"""A key in the section `semiseg` of dataset.json: it lists the labelled cases in the published order."""


def take_labeled(
    training: Sequence[str], validation: Sequence[str], num_labeled: int | None, dataset_json: dict
) -> tuple[list[str], list[str], list[str]]:
    """Choose the first labelled cases of a fold. Their order is that of dataset.json if it has one, else that of names.

    Args:
        training, validation: nnU-Net's split. In fold `all` both have the same cases.
        num_labeled: the number of training cases that keep their label. None: all.

    Returns:
        Training cases, validation cases, and the cases that become unlabelled: their labels must not be used.

    Raises:
        UserError: the fold has fewer labelled cases than `num_labeled`.
    """
    if num_labeled is None:
        return list(training), list(validation), []
    if num_labeled > len(training):
        raise UserError(
            f"setting num_labeled={num_labeled}: the fold has {len(training)} labelled training cases:"
            f" set it to {len(training)} or less"
        )
    order = {case: i for i, case in enumerate(dataset_json.get(DATASET_SECTION, {}).get(ORDER_KEY, ()))}
    ordered = sorted(training, key=lambda case: (order.get(case, len(order)), case))
    kept, hidden = ordered[:num_labeled], ordered[num_labeled:]
    return kept, [case for case in validation if case not in hidden], hidden


def cases_of_fold(preprocessed: Path, cases: Sequence[str], fold: int | str) -> list[str]:
    """The training cases of a fold, as in nnU-Net's `do_split`.

    Args:
        preprocessed: the dataset's folder, with `splits_final.json`. Without that file nnU-Net makes five folds.
        cases: all labelled cases.
        fold: a number, or `all`.

    Raises:
        UserError: there is no such fold, or the file is damaged.
    """
    if fold == "all":
        return list(cases)
    file = preprocessed / "splits_final.json"
    if file.is_file():
        folds = read_splits(file, "correct the file, or delete it to have new folds")
    else:
        folds = generate_crossval_split(sorted(cases)) if len(cases) >= 5 else []
    if not isinstance(fold, int) or not 0 <= fold < len(folds):
        use = f"one of its {len(folds)} folds, or all cases" if folds else "all cases"
        raise UserError(f"{file}: has no fold {fold}: use {use}")
    return list(folds[fold]["train"])


class JoinedDataset:
    """Cases of several preprocessed datasets as one dataset, for nnU-Net's loader."""

    def __init__(self, *datasets):
        self._home = {case: dataset for dataset in datasets for case in dataset.identifiers}
        self.identifiers = list(self._home)
        self.folders = [dataset.source_folder for dataset in datasets]

    def load_case(self, identifier: str):
        return self._home[identifier].load_case(identifier)
