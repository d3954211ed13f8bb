"""`nnunet_semiseg export`: write the network of a trained model to an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_semiseg.data.labeled_cases import channel_names
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import written_whole
from nnunet_semiseg.runs import Run

TOLERANCE = 1e-3
"""The largest allowed difference of logits, divided by the largest logit. ONNX adds numbers in another order than
torch."""


def export_onnx(run: Run, file: str | Path) -> float:
    """Write the network of a trained model to a file.

    It turns images (batch, C, *patch) into logits (batch, heads, *patch).

    The batch may have any size; the patch is that of the plans. The file has only the network. It does not have what
    nnU-Net does before and after it (resampling, normalisation, sliding window, mirroring). The numbers for these steps
    are in the metadata of the file, as JSON.

    Args:
        run: a finished training, with one of our trainers or of nnU-Net's.
        file: the file to write. It is replaced if it exists.

    Returns:
        The largest difference from torch's logits, for random input, divided by the largest logit.

    Raises:
        UserError: the model is not trained, or its checkpoint is damaged; onnx is not installed; the file is a folder,
            or its folder does not exist; its output differs from torch's.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"{error.name}: not installed: pip install onnx onnxruntime onnxscript") from None
    file = Path(file)
    if not file.parent.is_dir():
        raise UserError(f"{file}: there is no folder {file.parent}: make it, or choose another file with --onnx FILE")
    if file.is_dir():
        raise UserError(f"{file}: is a folder: give the name of a file with --onnx FILE")
    predictor = load_predictor(run)
    network, patch = predictor.network, predictor.configuration_manager.patch_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, len(channel_names(predictor.dataset_json)), *patch, generator=generator)
    program = torch.onnx.export(
        network, (images,), input_names=["image"], output_names=["logits"], dynamo=True, verbose=False,
        dynamic_shapes=[{0: torch.export.Dim("batch")}],
    )  # fmt: skip
    model = program.model_proto
    onnx.helper.set_model_props(model, {"nnunet": json.dumps(metadata(predictor))})

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    worst = 0.0
    with torch.no_grad():
        for some in (images, images[:1]):
            expected = network(some).numpy()
            (got,) = session.run(None, {"image": some.numpy()})
            worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{file}: not written, because the outputs of ONNX and torch differ by {worst:.1e} of the largest"
            f" logit: install newer versions of torch, onnxscript and onnxruntime"
        )
    with written_whole(file) as temporary:
        onnx.save(model, str(temporary))
    return worst


def metadata(predictor: nnUNetPredictor) -> dict:
    """The numbers that nnU-Net uses before and after the network when it predicts."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    return {
        "patch_size": list(configuration.patch_size),
        "spacing": list(configuration.spacing),
        "normalization_schemes": configuration.normalization_schemes,
        "use_mask_for_norm": configuration.use_mask_for_norm,
        "foreground_intensity_properties_per_channel": plans.foreground_intensity_properties_per_channel,
        "transpose_forward": list(plans.transpose_forward),
        "transpose_backward": list(plans.transpose_backward),
        "channel_names": dict(enumerate(channel_names(predictor.dataset_json))),
        "labels": predictor.dataset_json["labels"],
        "regions_class_order": predictor.dataset_json.get("regions_class_order"),
        "mirroring_axes": predictor.allowed_mirroring_axes,
        "tile_step_size": predictor.tile_step_size,
        "use_gaussian": predictor.use_gaussian,
        "resampling": {key: value for key, value in configuration.configuration.items() if "resampling" in key},
        "trainer": predictor.trainer_name,
    }
