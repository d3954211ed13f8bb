"""Pairs of images and texts for the pre-training."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from nnunet_semiseg.data.labeled_subset import JoinedDataset
from nnunet_semiseg.data.preprocessed import (
    check_labeled_data,
    find_dataset_class,
    preprocess_again,
    preprocess_unlabeled_again,
)
from nnunet_semiseg.data.readable import ReadableCases
from nnunet_semiseg.data.unlabeled_manifest import load_manifest
from nnunet_semiseg.files import dataset_folder
from nnunet_semiseg.schema import check_configuration, load_plans
from nnunet_semiseg.vlm.model import AMVLM, to_tower
from nnunet_semiseg.vlm.sides import HORIZONTAL_WORDS, exchange, is_flat


class Pairs(Dataset):
    """A dataset of images in the form that the tower takes, each with its token ids and its labelled area.

    One slice of each volume is used. The labelled area has a share for each patch of the tower, (rows, columns). It is
    -1 if it is not known.

    Args:
        data: nnU-Net's preprocessed cases.
        texts: the text of each case.
        cases: the cases of this dataset. All have a text.
        axis: the axis along which volumes are cut into slices, 0 to 2.
        masks: the cases whose labels may be used.
        ignore_label: voxels with this label count as not labelled.
        crop: the smallest share of height and width that a random crop keeps. With a crop, any slice of a volume may be
            taken. None: the whole image, and the middle slice.
        mirror: whether half of the images are flipped along their last axis, with left and right exchanged in the text.

    Raises:
        UserError: a text is too long for the text tower.
    """

    def __init__(
        self,
        data,
        texts: dict[str, str],
        cases: Sequence[str],
        model: AMVLM,
        axis: int,
        crop: float | None = None,
        masks: Collection[str] = (),
        ignore_label: int | None = None,
        mirror: bool = False,
    ):
        self.data, self.cases, self.axis, self.crop = data, list(cases), axis, crop
        own = [texts[case] for case in self.cases]
        # all together, so that they have one shape
        both = (
            model.tokenize([*own, *(exchange(t, (False, True), ((), HORIZONTAL_WORDS)) for t in own)]) if cases else ()
        )
        self.ids, self.mirrored = both[: len(own)], both[len(own) :]
        self.mirror = mirror
        self.size, self.about, self.grid = model.image_size, model.visual.preprocess_cfg, model.grid
        self.masks, self.ignore_label = set(masks), ignore_label

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        case = self.cases[index]
        loaded = self.data.load_case(case)
        volume = loaded[0]
        axis = self.axis + 1 if volume.shape[1] > 1 else 1  # 2d cases have one slice
        depth = volume.shape[axis]
        i = depth // 2 if self.crop is None else int(torch.randint(depth, ()))
        part = (slice(None),) * axis + (i,)  # only this slice of the compressed volume is read
        image = torch.from_numpy(np.ascontiguousarray(volume[part], dtype=np.float32))
        if case in self.masks:
            mask = torch.from_numpy(np.asarray(loaded[1][part]))
            image = torch.cat((image, ((mask > 0) & (mask != self.ignore_label)).float()))
        if self.crop is not None:
            image = random_crop(image, self.crop)
        ids = self.ids
        if self.mirror and torch.rand(()) < 0.5:
            image, ids = image.flip(2), self.mirrored
        area = torch.full(self.grid, -1.0)
        if case in self.masks:
            image, mask = image[:-1], image[-1:]
            area = F.adaptive_avg_pool2d(mask, self.grid)[0]
        return to_tower(image[None], self.about, self.size)[0], ids[index], area


def random_crop(image: Tensor, least: float) -> Tensor:
    """Crop (C, H, W) to a random share of both sides, from `least` to 1. The crop is large, so that texts stay true."""
    share, *places = (least + (1 - least) * torch.rand(1), *torch.rand(2))
    for dim, place in zip((1, 2), places, strict=True):
        kept = max(1, round(float(share) * image.shape[dim]))
        image = image.narrow(dim, round(float(place) * (image.shape[dim] - kept)), kept)
    return image


def may_be_mirrored(plans: dict, slice_axis: int) -> bool:
    """Whether the last axis of slices goes from left to right."""
    return list(plans["transpose_forward"]) == [0, 1, 2] and (is_flat(plans) or slice_axis != 2)


def open_cases(dataset_name: str, plans_name: str, configuration: str) -> tuple[JoinedDataset, list[str]]:
    """The preprocessed labelled and unlabelled cases as one dataset, and the names of the unlabelled ones.

    Raises:
        UserError: there is no such dataset, plans file or configuration; or it is not preprocessed completely.
    """
    base = dataset_folder("nnUNet_preprocessed", dataset_name)
    file, fix = base / f"{plans_name}.json", "plan first with nnunet_semiseg plan_and_preprocess"
    plans = load_plans(file, fix)
    check_configuration(plans, configuration, file, fix)
    labeled_folder = base / PlansManager(plans).get_configuration(configuration).data_identifier
    fix = preprocess_again(plans, configuration)
    kind: Any = find_dataset_class(labeled_folder, fix)
    raw = Path(os.environ["nnUNet_raw"], base.name) if os.environ.get("nnUNet_raw") else None
    check_labeled_data(base, raw if raw and (raw / "dataset.json").is_file() else None, plans, configuration)
    unlabeled_folder, cases = load_manifest(base, plans, configuration, dataset_name)
    fixes = {str(labeled_folder): fix, unlabeled_folder: preprocess_unlabeled_again(plans, configuration)}
    kind = ReadableCases(kind, fixes)
    return JoinedDataset(kind(str(labeled_folder)), kind(unlabeled_folder, cases)), cases
