"""Find out whether preprocessed data belong to the present plans."""

from __future__ import annotations

import hashlib
import json

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

_PLANS_KEYS = ("image_reader_writer", "transpose_forward")
_CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


def plans_hash(plans: dict, configuration: str) -> str:
    """A hash of everything that changes preprocessed voxels, and of nothing else (not patch, network or settings)."""
    manager = PlansManager(plans)
    resolved = manager.get_configuration(configuration).configuration
    content = {key: plans[key] for key in _PLANS_KEYS} | {key: resolved[key] for key in _CONFIGURATION_KEYS}
    content["intensities"] = manager.foreground_intensity_properties_per_channel
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
