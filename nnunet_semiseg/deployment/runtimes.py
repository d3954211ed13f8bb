"""Measure how long a patch takes in torch and in ONNX Runtime, with each provider that is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from nnunet_semiseg.data.labeled_cases import channel_names
from nnunet_semiseg.deployment.trained_model import load_predictor
from nnunet_semiseg.runs import Run

PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider", "TensorRT": "TensorrtExecutionProvider"}
WARM_UP, TIMED = 3, 10
"""The number of runs that are not counted (TensorRT builds its engine in the first), and of those whose median is
taken."""


def time_runtimes(run: Run, file: str | Path) -> dict[str, float]:
    """Seconds for one patch in float32, by runtime: torch and ONNX Runtime on the CPU, and on a GPU if there is one.

    A provider that ONNX Runtime lists but cannot use, such as TensorRT without its libraries, is not timed. The time
    includes the copies from the CPU to the GPU and back.

    Args:
        run: a finished training.
        file: the ONNX file that `export_onnx` wrote for it.
    """
    import onnxruntime

    predictor = load_predictor(run)
    channels = len(channel_names(predictor.dataset_json))
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
    """The median time of a call, in seconds."""
    for _ in range(WARM_UP):
        function()
    measured = []
    for _ in range(TIMED):
        start = perf_counter()
        function()
        measured.append(perf_counter() - start)
    return median(measured)
