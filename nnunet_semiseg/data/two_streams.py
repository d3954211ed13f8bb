"""One loader that puts labelled and unlabelled patches into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_semiseg.data.pseudo_foreground import PseudoForegroundDataset


class UnlabeledDataLoader(nnUNetDataLoader):
    """nnU-Net's loader for cases without labels. It takes patches at random places, or around pseudo-foreground.

    Args:
        foreground_share: the share of the samples in a batch, rounded as in nnU-Net, that are taken around locations of
            a class. This needs a dataset with such locations (`PseudoForegroundDataset`). Labels in other datasets are
            not used.
    """

    def __init__(
        self, data, batch_size: int, patch_size, final_patch_size, label_manager, transforms, foreground_share=0.0
    ):
        super().__init__(
            data, batch_size, patch_size, final_patch_size, label_manager, foreground_share, transforms=transforms
        )
        self.has_ignore = False  # else nnU-Net would look for annotated voxels, and there are none
        self.indices = np.asarray(self.indices)  # else NumPy would convert all names again for each batch

    def get_indices(self):
        """Choose cases at random, as nnU-Net does. Instead of a case in the dataset's `left_out`, another one is drawn.

        Only a `PseudoForegroundDataset` has this list.
        """
        drawn: Any = super().get_indices()
        left_out = getattr(self._data, "left_out", ())
        if len(left_out) < len(self.indices):  # to draw again needs no list of all others, which may be long
            while replaced := [i for i, case in enumerate(drawn) if case in left_out]:
                drawn[replaced] = np.random.choice(self.indices, len(replaced))
        return list(drawn)

    def get_bbox(self, data_shape, force_fg, class_locations, overwrite_class=None, verbose=False):
        around = force_fg and isinstance(self._data, PseudoForegroundDataset)
        return super().get_bbox(data_shape, around, class_locations if around else None)


def patch_sizes(loader: nnUNetDataLoader) -> tuple[Any, Any]:
    """The sizes of the patches of a loader: before and after augmentation.

    For 2d plans nnU-Net's loader adds a first axis to both sizes. Here this axis is removed.
    """
    first = 1 if loader.patch_size_was_2d else 0
    return loader.patch_size[first:], loader.final_patch_size[first:]


class TwoStreamLoader(SlimDataLoaderBase):
    """A loader that adds `views` {name: (B_u, C, *S)}, `extra` and `cases` to each labelled batch; see `Batch`.

    Args:
        labeled_loader: nnU-Net's loader.
        unlabeled_loader: a loader whose images are the views, stacked along the channels. If None, the three keys are
            empty.
        views: the names of the views.
        make_targets: a function of the labelled and the unlabelled batch. It returns `extra`, further tensors for the
            loss by name, such as pseudo-labels; see `SemiSupervisedTrainer.target_maker`.
    """

    def __init__(
        self,
        labeled_loader: nnUNetDataLoader,
        unlabeled_loader: nnUNetDataLoader | None,
        views: Sequence[str],
        make_targets,
    ):
        super().__init__(None, labeled_loader.batch_size)
        self.labeled_loader, self.unlabeled_loader = labeled_loader, unlabeled_loader
        self.views, self.make_targets = views, make_targets

    def generate_train_batch(self) -> dict:
        batch: Any = next(self.labeled_loader)  # the annotations say that loaders return nothing
        if self.unlabeled_loader is None:
            return batch | {"views": {}, "extra": {}, "cases": []}
        unlabeled_batch: Any = next(self.unlabeled_loader)
        views = unlabeled_batch["data"].chunk(len(self.views), dim=1)
        # contiguous; otherwise the copy to the GPU waits, and torch.compile sees another memory layout
        batch["views"] = {name: view.contiguous() for name, view in zip(self.views, views, strict=True)}
        batch["extra"] = self.make_targets(batch, unlabeled_batch)
        batch["cases"] = unlabeled_batch["keys"]
        return batch


def add_unlabeled_stream(augmenter, make_unlabeled_loader, views: Sequence[str], make_targets) -> None:
    """Replace the labelled loader in nnU-Net's augmenter by a `TwoStreamLoader`.

    Args:
        augmenter: a SingleThreadedAugmenter or NonDetMultiThreadedAugmenter. Running workers are stopped.
        make_unlabeled_loader: a function of the labelled loader. It returns the unlabelled one, or None.
        views, make_targets: see `TwoStreamLoader`.
    """
    if isinstance(augmenter, SingleThreadedAugmenter):
        name = "data_loader"
    else:
        augmenter._finish()
        name = "generator"
    labeled_loader = getattr(augmenter, name)
    unlabeled_loader = make_unlabeled_loader(labeled_loader)
    setattr(augmenter, name, TwoStreamLoader(labeled_loader, unlabeled_loader, views, make_targets))


def seed_workers(augmenter, seed: int | None, step: int) -> None:
    """Give each worker its own seed. Forked workers share torch's random numbers, so all would augment in the same way.

    Args:
        seed: the seed of the training. None: the system gives one.
        step: a number that is combined with the seed, so that a resumed training does not see the batches of its
            beginning again.
    """
    if not isinstance(augmenter, SingleThreadedAugmenter):
        augmenter._finish()
        entropy = None if seed is None else (seed, step)
        augmenter.seeds = np.random.SeedSequence(entropy).generate_state(augmenter.num_processes).tolist()
