"""Find out whether preprocessed data were made with the present plans."""

from __future__ import annotations

import hashlib
import json

from nnunet_semiseg.schema import resolved

_PLANS_KEYS = ("image_reader_writer", "transpose_forward")
_INTENSITIES = ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality")
"""The key of the intensity statistics in the plans, and the key in older plans."""
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
    """A hash of everything in the plans that changes preprocessed voxels.

    The patch, the network and the settings do not change voxels, so they do not change the hash.
    """
    about = resolved(plans, configuration)
    content = {key: plans[key] for key in _PLANS_KEYS} | {key: about[key] for key in _CONFIGURATION_KEYS}
    content["intensities"] = next(plans[key] for key in _INTENSITIES if key in plans)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
