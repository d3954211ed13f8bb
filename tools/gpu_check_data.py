"""The data of tools/gpu_check.py: volumes of noise, plans of full size, small untrained towers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

import numpy as np
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from safetensors.torch import save_file

from nnunet_semiseg.planning import plan_and_preprocess
from nnunet_semiseg.planning_request import PlanningRequest
from nnunet_semiseg.text.open_clip_models import load_clip
from nnunet_semiseg.vlm.model import AMVLM

DATASET_ID, DATASET, PLANS = 997, "Dataset997_GPUCheck", "GPUCheckPlans"
CONFIGURATION = "3d_fullres"
CASES = 3  # labelled, and as many unlabelled
MADE = "made.json"

extract = DatasetFingerprintExtractor.run


def make_data(args: argparse.Namespace) -> Path:
    """Make a data set, its plans and towers, unless an earlier call has left them. Returns the file of the plans."""
    plans_file = args.work / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json"
    what = {"size": args.size, "planner": args.planner}
    made = args.work / MADE
    if made.is_file():
        if (before := json.loads(made.read_text(encoding="utf-8"))) != what:
            raise SystemExit(f"--work {args.work}: holds data of {before}, not of {what}: name another folder")
        return plans_file
    if not (args.work / "vlm" / "vlm.json").is_file():
        write_towers(args.work)
    write_dataset(args.work / "nnUNet_raw" / DATASET, args.size)
    processes = 1 if args.dry_run else CASES
    with mock.patch.object(DatasetFingerprintExtractor, "run", extract_few):
        plan_and_preprocess(
            PlanningRequest(
                dataset_ids=[DATASET_ID],
                configurations=[CONFIGURATION],
                planner=args.planner,
                num_processes=[processes],
                num_processes_fingerprint=processes,
                overwrite_plans_name=PLANS,
                show_progress_bar=False,
            )
        )
    made.write_text(json.dumps(what), encoding="utf-8")  # last: where it is, all is there
    return plans_file


def extract_few(self, *positional, **named):
    """Collect fewer intensities than nnU-Net does. 100 million take a minute, and these images are only noise."""
    self.num_foreground_voxels_for_intensitystats = 1_000_000
    return extract(self, *positional, **named)


def write_dataset(folder: Path, size: list[int]) -> None:
    """Write labelled and unlabelled cases: noise with two ellipsoids, one inside the other."""
    for name in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    grid = np.ogrid[tuple(slice(-1, 1, 1j * n) for n in size)]
    for case in range(2 * CASES):
        centre, radii = rng.uniform(-0.3, 0.3, 3), rng.uniform(0.4, 0.65, 3)
        distance = sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, radii, strict=True))
        label = (distance < 1).astype(np.uint8) + (distance < 0.3)
        image = 60 + 50 * label + 8 * rng.standard_normal(size, np.float32)
        kind, name = ("Un", f"un_{case:03d}") if case >= CASES else ("Tr", f"tr_{case:03d}")
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), folder / f"images{kind}" / f"{name}_0000.mha")
        if kind == "Tr":
            sitk.WriteImage(sitk.GetImageFromArray(label.astype(np.uint8)), folder / "labelsTr" / f"{name}.mha")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "kidney": 1, "tumour": 2},
        "numTraining": CASES,
        "file_ending": ".mha",
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def write_towers(folder: Path) -> None:
    """Write a text tower and the files that `pretrain_vlm` writes. Both are small and have random weights."""
    model = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    for name in ("text_tower", "vlm"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        config = json.dumps({"model_cfg": model, "preprocess_cfg": {}})
        (folder / name / "open_clip_config.json").write_text(config, encoding="utf-8")
    vlm = folder / "vlm"
    settings = {"dim": 64, "hidden": 128}
    save_file(AMVLM(*load_clip(str(vlm), "none"), **settings).state_dict(), vlm / "vlm.safetensors")
    (vlm / "vlm.json").write_text(json.dumps({"settings": settings}), encoding="utf-8")
