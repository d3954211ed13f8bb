"""An encoder that was pre-trained by self-supervision, in the format of nnssl and of the OpenMind models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.training import checkpoint as checkpoints

PLAN = "nnssl_adaptation_plan"
FIX = "give a checkpoint of nnssl (as of the OpenMind models) with --set pretrained_encoder=FILE"
ENCODER, STEM = "encoder.stages", "encoder.stem"
"""where nnU-Net's residual encoders have their weights; the plain ones have no stem of their own"""
NAMED = 5
"""weights that a message names, of those that do not fit"""


def check_is_there(file: str | None) -> None:
    """Raises UserError where the setting names a file that does not exist: before anything is made."""
    if file and not Path(file).expanduser().is_file():
        raise UserError(f"setting pretrained_encoder={file}: no such file: {FIX}")


def load_pretrained_encoder(network: Any, file: str) -> str:
    """Put the weights of a pre-trained encoder and its stem into a network, in place; the decoder stays as it is.

    A stem that was trained on fewer channels is repeated over ours and divided, so that its response keeps its size.

    Args:
        network: with nnU-Net's encoder, not compiled.
        file: a checkpoint with `network_weights` and `nnssl_adaptation_plan`, which says where they are.

    Returns:
        A line for the log: how many weights were taken, and which were not.

    Raises:
        UserError: no such checkpoint; its stem, or more than half of the encoder's weights, do not fit the network.
    """
    content = checkpoints.read(str(Path(file).expanduser()), FIX, keys=("network_weights", PLAN))
    taken, left = fitting_weights(network.state_dict(), content["network_weights"], content[PLAN])
    own = [name for name in network.state_dict() if name.startswith((f"{ENCODER}.", f"{STEM}."))]
    reasons = "; ".join(f"{name} {why}" for name, why in list(left.items())[:NAMED])
    reasons += f"; and {len(left) - NAMED} more" if len(left) > NAMED else ""
    if not taken or 2 * len(taken) < len(own) or any(name.startswith(STEM) for name in left):
        architecture = content[PLAN].get("architecture_plans", {}).get("arch_class_name", "another network")
        raise UserError(
            f"{file}: an encoder of {architecture}, which does not fit these plans ({reasons or 'no common weight'}):"
            " plan with the same network, for ResEncL with -pl SemiSegPlannerResEncL"
        )
    with torch.no_grad():
        network.load_state_dict(taken, strict=False)
    return f"{len(taken)} of the encoder's {len(own)} weights are from {file}" + (f"; not: {reasons}" if left else "")


def fitting_weights(
    own: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], plan: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The pre-trained weights by our names, and why the others do not fit.

    Args:
        own: of our network.
        pretrained: by their own names.
        plan: `nnssl_adaptation_plan`: where the encoder and the stem are among these names, the layers that read the
            image, and how many channels it had.
    """
    encoder, stem = plan.get("key_to_encoder", ENCODER), plan.get("key_to_stem", STEM)
    places = {encoder: ENCODER} | ({} if stem.startswith(encoder) else {stem: STEM})  # plain ones have it in a stage
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
