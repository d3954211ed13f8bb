"""Checks before a training starts."""

from __future__ import annotations

import math
import os
from os.path import isfile, join
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg.data.headers import total_memory
from nnunet_semiseg.data.labeled_cases import channel_names
from nnunet_semiseg.data.preprocessed import check_labeled_data, find_dataset_class, preprocess_again
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.schema import read_splits


def check_labeled_cases(preprocessed_folder_base: str, plans: dict, configuration: str, fold) -> None:
    """Refuse a fold that cannot be trained. The folds are those of nnU-Net's `do_split`.

    Raises:
        UserError: the labelled data is not preprocessed; the fold has no training case or no validation case, or one
            of its cases does not exist; there are too few cases for five folds; or see `read_splits` and
            `check_labeled_data`.
    """
    name = plans["dataset_name"]
    folder = join(preprocessed_folder_base, PlansManager(plans).get_configuration(configuration).data_identifier)
    cases = set(find_dataset_class(folder, preprocess_again(plans, configuration)).get_identifiers(folder))
    if fold == "all":
        training = cases
    else:
        splits_file = join(preprocessed_folder_base, "splits_final.json")
        if isfile(splits_file):
            splits = read_splits(Path(splits_file), "correct the file, or delete it to have new folds")
            # nnU-Net splits at random for a fold that is not in the file: 80 % for training
            drawn = {"train": list(cases)[: int(len(cases) * 0.8)], "val": list(cases)[int(len(cases) * 0.8) :]}
            split = splits[fold] if fold < len(splits) else drawn
            training = split["train"]
            if training and not split["val"]:
                raise UserError(f"{splits_file}: fold {fold} has no validation case: add one, or use fold all")
            if missing := {*split["train"], *split["val"]} - cases:
                raise UserError(
                    f"{splits_file}: fold {fold} has {sorted(missing)[0]}, which is not in {folder}:"
                    f" correct the file, or preprocess the case"
                )
        else:
            if len(cases) < 5:
                folds = f", or run nnunet_semiseg plan_and_preprocess -d {_id(name)}, which writes leave-one-out splits"
                raise UserError(
                    f"{splits_file}: missing, and {len(cases)} labelled cases are too few for nnU-Net's five"
                    f" folds: use fold all{folds if len(cases) > 1 else ''}"
                )
            training = cases
    if not training:
        raise UserError(f"{folder}: fold {fold} has no labelled case to train on: use fold all")
    raw = Path(os.environ["nnUNet_raw"], name) if os.environ.get("nnUNet_raw") else None
    has_raw = raw is not None and (raw / "dataset.json").is_file()
    check_labeled_data(Path(preprocessed_folder_base), raw if has_raw else None, plans, configuration)


def check_batch_fits(plans: dict, configuration: str, samples: int, dataset_json: dict, what: str) -> None:
    """Refuse a batch whose images need more memory than the computer has.

    Args:
        samples: the number of patches in the batch.
        what: the beginning of the message: what is too large, and how to fix it.

    Raises:
        UserError: the batch does not fit. The message says how much memory it needs.
    """
    patch, memory = PlansManager(plans).get_configuration(configuration).patch_size, total_memory()
    needed = samples * math.prod(map(int, patch)) * len(channel_names(dataset_json)) * 4
    if memory and needed > memory:
        size = f"{samples} patches of {' x '.join(map(str, patch))} voxels"
        raise UserError(f"{what} ({size} take {needed / 2**30:.0f} GiB, and this machine has {memory / 2**30:.0f} GiB)")


def check_depth(plans: dict, configuration: str) -> None:
    """Refuse a network without a decoder. nnU-Net makes one if no axis has 8 voxels or more.

    Raises:
        UserError: the network has only one stage.
    """
    manager = PlansManager(plans).get_configuration(configuration)
    if len(manager.pool_op_kernel_sizes) == 1:
        raise UserError(
            f"plans {plans['plans_name']}: {configuration}: the images are too small for a U-Net: the patch is"
            f" {' x '.join(map(str, manager.patch_size))}, and nnU-Net needs an axis of 8 voxels or more: choose"
            " another configuration, or resample the images to a smaller spacing"
        )


def _id(dataset_name: str) -> int:
    return int(dataset_name[len("Dataset") :][:3])


def check_there_are_pairs(settings, plans: dict, configuration: str, what: str, or_else: str = "") -> None:
    """Refuse a batch with fewer unlabelled than labelled samples, for a method that mixes them in pairs.

    Args:
        what: the name of what mixes them, for the message.
        or_else: another way to fix it, for the message. It begins with "or".

    Raises:
        UserError: there are fewer unlabelled samples.
    """
    unlabeled = settings.unlabeled_batch_size
    if configuration not in plans["configurations"] or unlabeled is None:
        return
    batch_size = PlansManager(plans).get_configuration(configuration).batch_size
    if unlabeled < batch_size:
        raise UserError(
            f"setting unlabeled_batch_size={unlabeled}: {what} mixes each of the {batch_size} labelled samples of a"
            f" batch with an unlabelled one: set it to {batch_size} or more{f', {or_else}' if or_else else ''}"
        )
