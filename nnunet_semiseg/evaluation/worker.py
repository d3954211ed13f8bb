"""Do the work of one job of a report: `python -m nnunet_semiseg.evaluation.worker JOB.json`.

A training is nnU-Net's own command, and a prediction uses nnU-Net's own predictor. This module measures their memory or
time. It can also change what is predicted from: it adds noise to the images, or replaces the model's text features.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training_entry
from safetensors.torch import load_file
from torch import Tensor

from nnunet_semiseg.data.written_images import check_written
from nnunet_semiseg.files import disk_errors, read_json, write_json
from nnunet_semiseg.runs import RECORD, RESOURCES, using_data
from nnunet_semiseg.training import checkpoint as checkpoints


def train(words: list[str], folder: str) -> None:
    """Run `nnUNetv2_train`, then write its largest use of memory, in MiB, into `RESOURCES` in the run's folder.

    It is the memory of the GPU, or without a GPU the main memory of this process. If an earlier start has written a
    larger number, that stays. A validation (`--val`) writes nothing.
    """
    if not {"--c", "--val"} & set(words) and any(Path(folder).glob("checkpoint_*.pth")):
        words = [*words, "--c"]  # this job has started before; a cluster has interrupted it
    sys.argv = ["nnUNetv2_train", *words]
    trainer, plans = (words[words.index(option) + 1] for option in ("-tr", "-p"))
    with using_data(*words[:2], trainer, plans):
        run_training_entry()
    if "--val" in words:
        return
    file = Path(folder, RESOURCES)
    peak, memory = _peak_memory()
    before = read_json(file, "remove it").get("peak_memory_mib", 0) if file.is_file() else 0
    write_json({"peak_memory_mib": max(peak, before), "memory": memory}, file)


def predict(
    model: str,
    fold: str,
    images: list[list[str]],
    output: str,
    device: str,
    mirroring: bool,
    noise: float,
    settings: dict,
    features: str | None = None,
) -> None:
    """Run nnU-Net's predictor with the last checkpoint.

    Args:
        images: for each case the files of its channels.
        noise: standard deviation of the Gaussian noise on the normalised images.
        features: a safetensors file with weights that replace the same weights of the model.
        settings: stored in `RECORD`. By them `is_predicted` sees whether the predictions are still the right ones.
    """
    folder = Path(output)
    (folder / RECORD).unlink(missing_ok=True)  # first: a folder whose removal was interrupted must not look complete
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(folder):
        folder.mkdir(parents=True)
    predictor = NoisyPredictor(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False)
    predictor.noise = noise
    checkpoint = Path(model, f"fold_{fold}", "checkpoint_final.pth")
    fix = "remove it and continue the training"
    checkpoints.read(checkpoint, fix, mmap=True)  # nnU-Net itself would run code in the file
    predictor.initialize_from_trained_model_folder(model, (fold,), "checkpoint_final.pth")
    if features:
        for parameters in predictor.list_of_parameters:
            parameters.update(load_file(features))
    ending = predictor.dataset_json["file_ending"]
    targets = [str(folder / Path(files[0]).name[: -len(ending) - 5]) for files in images]
    start = time.perf_counter()
    with disk_errors(folder), check_written(folder):
        predictor.predict_from_files(
            images, targets, num_processes_preprocessing=1, num_processes_segmentation_export=1
        )
    seconds = time.perf_counter() - start
    write_json({"settings": settings, "seconds_per_case": seconds / len(images)}, folder / RECORD)


class NoisyPredictor(nnUNetPredictor):
    """nnU-Net's predictor with noise on the images.

    All models with the same preprocessing get the same noise on image n.
    """

    noise = 0.0
    count = 0

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        if self.noise:
            self.count += 1
            generator = torch.Generator().manual_seed(self.count)
            data = data + self.noise * torch.randn(data.shape, generator=generator, dtype=data.dtype)
        return super().predict_logits_from_preprocessed_data(data)


def _peak_memory() -> tuple[float, str]:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20, "GPU"
    # of this process only; the loaders' processes have their own
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "RAM"


def end_with_parent() -> None:
    """End this process when its parent ends. Nobody writes to its stdin, which is closed only then.

    Otherwise a comparison that was killed and started again would train beside the processes that it left.
    """

    def watch():
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    job = json.loads(Path(sys.argv[1]).read_bytes())
    {"train": train, "predict": predict}[job.pop("job")](**job)
