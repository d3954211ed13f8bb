"""Images with their texts, for the pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from torch.utils.data import Dataset

from nnunet_semiseg.data.labeled_subset import JoinedDataset
from nnunet_semiseg.data.unlabeled import load_manifest
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, read_json
from nnunet_semiseg.vlm.model import AMVLM, to_tower


class Pairs(Dataset):
    """Images as the tower takes them, each with its token ids; of a volume one slice.

    Args:
        data: nnU-Net's preprocessed cases.
        random_slice: any slice of the volume, else the middle one.
    """

    def __init__(self, data, texts: dict[str, str], cases: Sequence[str], model: AMVLM, axis: int, random_slice: bool):
        self.data, self.cases, self.axis, self.random_slice = data, list(cases), axis, random_slice
        self.ids = model.tokenize([texts[case] for case in self.cases]) if cases else None
        self.size, self.about = model.image_size, model.visual.preprocess_cfg

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        volume = self.data.load_case(self.cases[index])[0]
        axis = self.axis + 1 if volume.shape[1] > 1 else 1  # 2d cases have one slice
        depth = volume.shape[axis]
        i = int(torch.randint(depth, ())) if self.random_slice else depth // 2
        image = torch.from_numpy(np.ascontiguousarray(np.take(volume, i, axis), dtype=np.float32))
        return to_tower(image[None], self.about, self.size)[0], self.ids[index]


def open_cases(dataset_name: str, plans_name: str, configuration: str) -> tuple[JoinedDataset, list[str]]:
    """nnU-Net's preprocessed labelled and unlabelled cases, as one dataset, and the names of the unlabelled ones."""
    base = dataset_folder("nnUNet_preprocessed", dataset_name)
    plans = read_json(base / f"{plans_name}.json", "plan first with nnunet_semiseg plan_and_preprocess")
    if configuration not in plans["configurations"]:
        raise UserError(f"-c {configuration}: {plans_name} has {' and '.join(plans['configurations'])}")
    labeled = base / PlansManager(plans).get_configuration(configuration).data_identifier
    if not labeled.is_dir():
        raise UserError(f"{labeled}: no preprocessed cases: run nnunet_semiseg plan_and_preprocess")
    kind = infer_dataset_class(str(labeled))
    unlabeled, cases = load_manifest(base, plans, configuration, dataset_name)
    return JoinedDataset(kind(str(labeled)), kind(unlabeled, cases)), cases
