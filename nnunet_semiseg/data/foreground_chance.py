"""How often a patch that is drawn at random has foreground."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_semiseg.data.components import spread_over

DRAWS = 200
"""The number of random patches that are drawn from each case."""


def chance_of_foreground(dataset, patch_size: Sequence[int]) -> float:
    """The share of random patches that have a voxel of foreground, as a mean over the labelled cases.

    Patches are drawn as nnU-Net draws patches that need not have foreground: uniformly among the positions within the
    image. A patch that is larger than the image contains the whole image. The foreground is taken from the class
    locations that nnU-Net's preprocessing stores: a random part of each class if it has more than 10,000 voxels. At
    most 20 cases are read.

    Args:
        dataset: nnU-Net's dataset of the preprocessed labelled cases.
        patch_size: the patch size of the network, in voxels. With two numbers the patch lies within a slice.
    """
    patch = np.array([1] * (3 - len(patch_size)) + list(patch_size))
    rng = np.random.default_rng(0)
    chances = []
    for case in spread_over(dataset.identifiers):
        data, _, _, properties = dataset.load_case(case)
        found = [  # nnU-Net has one more entry, with -1 in its name, for all voxels that are not ignored
            np.reshape(places, (-1, 4))[:, 1:]
            for labels, places in properties["class_locations"].items()
            if -1 not in np.atleast_1d(labels)
        ]
        last = np.maximum(np.array(data.shape[1:]) - patch, 0)
        starts = rng.integers(last + 1, size=(DRAWS, 3))
        places = np.concatenate(found) if found else np.empty((0, 3), int)
        inside = [np.any(np.all((start <= places) & (places < start + patch), axis=1)) for start in starts]
        chances.append(np.mean(inside))
    return float(np.mean(chances))
