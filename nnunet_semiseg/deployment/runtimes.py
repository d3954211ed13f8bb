"""How long runtimes take for a patch: torch, and ONNX Runtime on what is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.runs import Run

PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
WARM_UP, TIMED = 3, 10
"""runs that are not counted (TensorRT builds its engine in the first), and those whose median is taken"""


def time_runtimes(run: Run, file: str | Path) -> dict[str, float]:
    """Seconds for one patch by runtime, in float32: torch and ONNX Runtime on the CPU, and on a GPU where there is one.

    A provider that ONNX Runtime lists but cannot use, as TensorRT without its libraries, is left out. Images come from
    the memory of the CPU, and logits go back there.

    Args:
        run: trained.
        file: what `export_onnx` wrote of it.
    """
    import onnxruntime

    predictor = load_predictor(run)
    channels = len(predictor.dataset_json["channel_names"])
    image = torch.randn(1, channels, *predictor.configuration_manager.patch_size)
    times = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        network = predictor.network.to(device)
        with torch.inference_mode():
            times[f"torch, {device.upper()}"] = seconds(lambda n=network, d=device: n(image.to(d)).cpu())
    for name, provider in PROVIDERS.items():
        if provider in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(str(file), providers=[provider])
            if session.get_providers()[0] == provider:
                inputs = {"image": image.numpy()}
                times[f"ONNX Runtime, {name}"] = seconds(lambda s=session, x=inputs: s.run(None, x))
    return times


def seconds(function: Callable[[], object]) -> float:
    """The median time of a call."""
    for _ in range(WARM_UP):
        function()
    measured = []
    for _ in range(TIMED):
        start = perf_counter()
        function()
        measured.append(perf_counter() - start)
    return median(measured)
