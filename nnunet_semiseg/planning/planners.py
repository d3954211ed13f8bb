"""What our planners add to nnU-Net's: other rules for batch or patch; and how a planner is found."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path

import nnunetv2
import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_semiseg.data.image_problems import IMAGES_FOLDER
from nnunet_semiseg.discovery import find_class, iter_classes
from nnunet_semiseg.errors import UserError


class SemiSegPlans:
    """Mixin for nnU-Net's planners: the plans have another name and their own preprocessed data."""

    default_plans_name: str

    def __init__(self, dataset_name_or_id: str | int, *, plans_name: str | None = None, **kwargs):
        super().__init__(dataset_name_or_id, plans_name=plans_name or self.default_plans_name, **kwargs)

    def generate_data_identifier(self, configuration_name: str) -> str:
        # nnU-Net's ResEnc planners write into the folders of nnUNetPlans. If only the batch size differs, we could do
        # so, too. But nnU-Net empties a folder and fills it again each time it preprocesses. With another target
        # spacing, or with a new fingerprint, the folder would then hold other data than nnUNetPlans were made for.
        # nnU-Net does not notice that, and a training that reads from the folder would break. So our plans have their
        # own folders.
        return f"{self.plans_identifier}_{configuration_name}"


class CountUnlabeled(SemiSegPlans):
    """Mixin for nnU-Net's planners: the limit of the batch size counts all images, not only the labelled ones.

    Against overfitting, nnU-Net limits a batch to a share of the voxels of the data set: 5 % with its default planner,
    100 % with its ResEnc presets. It counts the labelled cases only, but semi-supervised training also uses the
    unlabelled ones. With few labels, nnU-Net's batch would be small and have few unlabelled images.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        folder = Path(self.raw_dataset_folder, IMAGES_FOLDER)
        ending = self.dataset_json["file_ending"]
        cases = get_identifiers_from_splitted_dataset_folder(str(folder), ending) if folder.is_dir() else ()
        unlabeled_cases = sum(not case.startswith(".") for case in cases)
        # only the planner's copy is changed; the file itself is copied to the preprocessed data as it is
        self.dataset_json = {**self.dataset_json, "numTraining": self.dataset_json["numTraining"] + unlabeled_cases}


class SemiSegMemory(SemiSegPlans):
    """Mixin for nnU-Net's planners. It makes patch and batch so small that a step fits into memory as a whole.

    The batch size in the plans is that of the labelled stream. All trainers use the same plans. So the estimate is for
    the method that needs most memory, TextSemiSegTrainer, and adds an EMA teacher, which other methods have. It is for
    one backward pass for a whole step, as with `memory=fast`. By default trainers need less: with nnU-Net's own patch
    about as much memory as nnU-Net.
    """

    num_decoders = 2
    """The number of decoders on one encoder."""
    num_streams = 2
    """The number of streams that go through the encoder and all decoders: the labelled samples, and as many unlabelled
    ones."""
    num_mixed_streams = 2
    """The number of streams that are mixed from the other two. They go through the encoder and one decoder, and are
    kept for the same backward pass."""
    has_teacher = True
    """Whether an EMA teacher predicts the unlabelled stream, without gradients."""

    @classmethod
    def static_estimate_VRAM_usage(
        cls,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """Estimate the peak memory for one sample in each stream. The unit is a voxel of the output of a convolution.

        nnU-Net uses this unit, too. It counts the outputs of all convolutions in the encoder (E) and in the decoder
        (D), because the backward pass needs them. Then it compares E + D with a reference. Here the estimate is

            num_streams * (E + num_decoders * D) + num_mixed_streams * (E + D) + teacher.

        A pass without gradients frees a feature map as soon as it was used. The teacher needs most memory in the last
        normalisation of the last decoder stage: for all skips; for the output of the stage below, which is as large as
        the second skip; and for five maps as large as the first skip: the concatenation (two), the output of its first
        convolution, and the input and output of the normalisation. Each counts half, because each counted output stands
        for two maps that the backward pass needs, before and after its normalisation.
        """
        with torch.device("meta"):  # only the shapes are needed
            net = get_network_from_plans(
                arch_class_name,
                arch_kwargs,
                arch_kwargs_req_import,
                input_channels,
                output_channels,
                allow_init=False,
            )
        encoder, decoder = (part.compute_conv_feature_map_size(patch_size) for part in (net.encoder, net.decoder))
        size, skips = np.array(patch_size), []
        for channels, stride in zip(net.encoder.output_channels, net.encoder.strides, strict=True):
            size = size // stride
            skips.append(channels * np.prod(size, dtype=np.int64))
        return int(
            cls.num_streams * (encoder + cls.num_decoders * decoder)
            + cls.num_mixed_streams * (encoder + decoder)
            + cls.has_teacher * (sum(skips) + sum(skips[1:2]) + 5 * skips[0]) / 2
        )


def find_planner(name: str) -> type[ExperimentPlanner]:
    """Find a planner of ours or of nnU-Net. Raises UserError, with similar names, if there is none."""
    planner = find_class("planners", name) or recursive_find_python_class(
        str(Path(nnunetv2.__path__[0], "experiment_planning")), name, "nnunetv2.experiment_planning"
    )
    if not (isinstance(planner, type) and issubclass(planner, ExperimentPlanner)):
        ours = sorted(c.__name__ for c in iter_classes("planners"))
        near = difflib.get_close_matches(name, ours, n=3, cutoff=0.6)
        raise UserError(f"-pl {name}: no such planner: use {' or '.join(near or ours)}, or one of nnU-Net's")
    return planner


def plans_name_of(planner: str) -> str:
    """The name that the plans of this planner, such as `SemiSegPlanner`, have by default."""
    return default_plans_name(find_planner(planner))


def default_plans_name(planner_class: type[ExperimentPlanner]) -> str:
    """The name that the plans of this planner have by default."""
    if issubclass(planner_class, SemiSegPlans):
        return planner_class.default_plans_name
    return inspect.signature(planner_class).parameters["plans_name"].default
