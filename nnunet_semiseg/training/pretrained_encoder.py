"""Load an encoder that was pre-trained without labels, in the format of nnssl and of the OpenMind models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.training import checkpoint as checkpoints

PLAN = "nnssl_adaptation_plan"
FIX = "give a checkpoint of nnssl (for example an OpenMind model) with --set pretrained_encoder=FILE"
ENCODER, STEM = "encoder.stages", "encoder.stem"
"""How the names of weights begin in nnU-Net's residual encoders. Plain encoders have no separate stem."""
NAMED = 5
"""A message names at most this number of weights that do not fit."""


def check_is_there(file: str | None) -> None:
    """Raises UserError if the file in the setting does not exist. It is called before anything is made."""
    if file and not Path(file).expanduser().is_file():
        raise UserError(f"setting pretrained_encoder={file}: no such file: {FIX}")


def load_pretrained_encoder(network: Any, file: str) -> str:
    """Load the weights of a pre-trained encoder and its stem into a network, in place. The decoder is unchanged.

    If the number of channels here is a multiple of that in the pre-training, the weights that read the image are
    repeated for the further channels. They are divided by the number of repetitions, so that the output of the stem
    keeps its scale.

    Args:
        network: a network with nnU-Net's encoder, not compiled.
        file: a checkpoint with `network_weights` and `nnssl_adaptation_plan`, which says where the weights are.

    Returns:
        A line for the log: how many weights were loaded, and which were not.

    Raises:
        UserError: there is no such checkpoint; the network has several encoders; the stem or more than half of the
            encoder's weights do not fit the network.
    """
    content = checkpoints.read(str(Path(file).expanduser()), FIX, keys=("network_weights", PLAN))
    taken, left = fitting_weights(network.state_dict(), content["network_weights"], content[PLAN])
    own = [name for name in network.state_dict() if name.startswith((f"{ENCODER}.", f"{STEM}."))]
    if not own:
        raise UserError(
            f"setting pretrained_encoder={file}: the network of this trainer has several encoders: set it to null, or"
            " use another trainer"
        )
    reasons = "; ".join(f"{name} {why}" for name, why in list(left.items())[:NAMED])
    reasons += f"; and {len(left) - NAMED} more" if len(left) > NAMED else ""
    if not taken or 2 * len(taken) < len(own) or any(name.startswith(STEM) for name in left):
        architecture = content[PLAN].get("architecture_plans", {}).get("arch_class_name", "another network")
        raise UserError(
            f"{file}: an encoder of {architecture} that does not fit these plans ({reasons or 'no common weight'}):"
            " plan with the same network, for ResEncL with -pl SemiSegPlannerResEncL"
        )
    with torch.no_grad():
        network.load_state_dict(taken, strict=False)
    return f"{len(taken)} of the encoder's {len(own)} weights are from {file}" + (f"; not: {reasons}" if left else "")


def fitting_weights(
    own: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], plan: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the pre-trained weights that fit, by their names in our network.

    For each other weight of the encoder and its stem, say why it does not fit.

    Args:
        own: the weights of our network.
        pretrained: the pre-trained weights, by their own names.
        plan: the value of `nnssl_adaptation_plan`. It has the names of the encoder and the stem, and the number of
            channels in the pre-training.

    Returns:
        The weights that fit, and the reasons for the others.
    """
    encoder, stem = plan.get("key_to_encoder", ENCODER), plan.get("key_to_stem", STEM)
    places = {encoder: ENCODER} | ({} if stem.startswith(encoder) else {stem: STEM})  # plain: the stem is in a stage
    channels = int(plan.get("pretrain_num_input_channels", 1))
    taken, left = {}, {}
    for name, weight in pretrained.items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            continue
        ours = places[place] + name[len(place) :]
        if ours not in own:
            left[ours] = "is not in the network"
            continue
        shape = tuple(own[ours].shape)
        reads_image = weight.ndim > 2 and weight.shape[1] == channels and shape[1] % channels == 0
        if reads_image and shape[1] > channels and shape[:1] + shape[2:] == weight.shape[:1] + weight.shape[2:]:
            times = shape[1] // channels
            weight = weight.repeat(1, times, *[1] * (weight.ndim - 2)) / times
        if tuple(weight.shape) == shape:
            taken[ours] = weight
        else:
            left[ours] = f"is {tuple(weight.shape)} there and {shape} here"
    return taken, left
