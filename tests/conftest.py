"""`tiny_dataset`: makes raw datasets that are preprocessed in a second and can be trained on."""

from __future__ import annotations

import json
import locale
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

# Before torch, nnU-Net and matplotlib: arrays are tiny, and pytest's workers share the cores. nnU-Net's commands take
# all cores for torch nevertheless, and where others work, too, threads that wait actively need many times as long.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "nnUNet_def_n_proc": "1"}
ENVIRONMENT["MATPLOTLIBRC"] = str(Path(__file__).with_name("matplotlibrc"))
for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


PLACES = ("raw", "preprocessed", "results")

LC_CTYPE = locale.setlocale(locale.LC_CTYPE)
"""before any test"""


@pytest.fixture(autouse=True)
def same_encoding():
    """SimpleITK sets the C locale when it reads a DICOM series, and with it what `read_text` decodes."""
    locale.setlocale(locale.LC_CTYPE, LC_CTYPE)
    yield
    locale.setlocale(locale.LC_CTYPE, LC_CTYPE)


@dataclass(frozen=True)
class TinyDataset:
    """A raw dataset; nnU-Net's three variables point to the folders around it."""

    id: int
    name: str
    raw: Path
    preprocessed: Path
    results: Path
    configuration: str

    @property
    def dataset_json(self) -> dict:
        return json.loads((self.raw / "dataset.json").read_text())

    def update_dataset_json(self, **entries) -> None:
        (self.raw / "dataset.json").write_text(json.dumps(self.dataset_json | entries))

    def image(self, case: str, channel: int = 0, folder: str = "imagesUn") -> Path:
        return self.raw / folder / f"{case}_{channel:04d}{self.dataset_json['file_ending']}"

    def plan(self, planner="SemiSegPlannerSmall", configurations: Sequence[str] = (), **kwargs) -> dict:
        """`plan_and_preprocess`, in threads, for a process needs seconds to import torch; gives the plans."""
        from nnunet_semiseg import planning
        from nnunet_semiseg.planning_request import PlanningRequest

        kwargs = {"num_processes": [1], "num_processes_fingerprint": 1, "show_progress_bar": False} | kwargs
        asked = {"dataset_ids": [self.id], "configurations": configurations or [self.configuration]}
        with in_threads():
            planning.plan_and_preprocess(PlanningRequest(planner=planner, **asked, **kwargs))
        name = kwargs.get("overwrite_plans_name")
        return self.plans(name or planning.default_plans_name(planning.find_planner(planner)))

    def plans(self, name: str) -> dict:
        return json.loads((self.preprocessed / f"{name}.json").read_text())


@contextmanager
def in_threads() -> Iterator[None]:
    """Planning and preprocessing start no process, and the fingerprint draws no 100 million intensities."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )

    from nnunet_semiseg.data import labeled_cases, preprocessed, unlabeled_preprocessing

    run_jobs, extract = preprocessed.run_jobs, DatasetFingerprintExtractor.run

    def extract_few(self, **kwargs):
        self.num_foreground_voxels_for_intensitystats = 10_000
        return extract(self, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method=None: SimpleNamespace(Pool=ThreadPool))
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
        patch.setattr(DatasetFingerprintExtractor, "run", extract_few)
        for module in (labeled_cases, preprocessed, unlabeled_preprocessing):
            patch.setattr(
                module, "run_jobs", lambda function, jobs, num_processes, what=None: run_jobs(function, jobs, 0, what)
            )
        yield


@pytest.fixture
def tiny_dataset(tmp_path, monkeypatch):
    """A factory of raw datasets: `tiny_dataset(dims=2, labeled=3, ...)`; ids: `tr_000`, `un_000`, `ts_000`.

    Each image shows bright ellipsoids, one inside the other; two are `kidney` and `tumour`, or as regions
    `organ` (both) and `tumour`, other numbers need `labels`. 3d images are .nii.gz of 1.0 x 1.0 x 1.5 mm, 2d ones .png.
    """

    def make(
        dims: int = 3,
        labeled: int = 3,
        unlabeled: int = 4,
        test: int = 0,
        channels: int = 1,
        structures: int = 2,
        regions: bool = False,
        size: int = 24,
        seed: int = 0,
        dataset_id: int = 901,
        **dataset_json,
    ) -> TinyDataset:
        name = f"Dataset{dataset_id:03d}_Tiny"
        raw, preprocessed, results = (folder / name for folder in set_folders(tmp_path, monkeypatch))

        ending = ".nii.gz" if dims == 3 else ".png"
        rng = np.random.default_rng(seed)
        for prefix, number in {"tr": labeled, "un": unlabeled, "ts": test}.items():
            part = prefix.capitalize()
            for folder in [f"images{part}"] + [f"labels{part}"] * (prefix != "un") if number else ():
                (raw / folder).mkdir(parents=True)
            for case in range(number):
                image, label = _ellipsoids(rng, [size] * dims, channels, structures)
                for c in range(channels):
                    write_image(image[c], raw / f"images{part}" / f"{prefix}_{case:03d}_{c:04d}{ending}")
                if prefix != "un":
                    write_image(label, raw / f"labels{part}" / f"{prefix}_{case:03d}{ending}")
        raw.mkdir(exist_ok=True)
        labels = {"background": 0, "kidney": 1, "tumour": 2}
        if regions:
            labels = {"background": 0, "organ": [1, 2], "tumour": [2]}
            dataset_json = {"regions_class_order": [1, 2]} | dataset_json
        content = {
            "channel_names": {str(c): f"MRI {c}" for c in range(channels)},
            "labels": labels,
            "numTraining": labeled,
            "file_ending": ending,
        }
        (raw / "dataset.json").write_text(json.dumps(content | dataset_json))
        configuration = "3d_fullres" if dims == 3 else "2d"
        return TinyDataset(dataset_id, name, raw, preprocessed, results, configuration)

    return make


def set_folders(base: Path, monkeypatch) -> list[Path]:
    """nnU-Net's three folders below this one, in its variables."""
    folders = [base / f"nnUNet_{place}" for place in PLACES]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv(folder.name, str(folder))
    return folders


def write_image(array: np.ndarray, file: Path, spacing=(1.0, 1.0, 1.5), origin=None, direction=None) -> None:
    image = sitk.GetImageFromArray(array)
    if file.name.endswith(".nii.gz"):
        image.SetSpacing(spacing[: array.ndim])
        image.SetOrigin(origin or (0.0,) * array.ndim)
        if direction:
            image.SetDirection(direction)
    sitk.WriteImage(image, str(file))


def _ellipsoids(
    rng: np.random.Generator, shape: list[int], channels: int, structures: int
) -> tuple[np.ndarray, np.ndarray]:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    per_axis = (len(shape),) + (1,) * len(shape)
    centre, radii = rng.uniform(-0.3, 0.3, per_axis), rng.uniform(0.4, 0.65, per_axis)
    distance = np.sqrt((((grid - centre) / radii) ** 2).sum(0))
    label = sum((distance < 1 - i / structures).astype(np.uint8) for i in range(structures))
    image = (
        60 + 50 * label + rng.normal(0, 8, (channels, *shape)) + 10 * np.arange(channels).reshape(-1, *[1] * len(shape))
    )
    image = image.clip(1, 255)
    return image.astype(np.uint8 if len(shape) == 2 else np.float32), label


@pytest.fixture(scope="session")
def planned_before(tmp_path_factory):
    """Data sets that `ready` has planned before, by how they were asked for."""
    return {}, tmp_path_factory.mktemp("planned")


@pytest.fixture
def ready(tiny_dataset, planned_before, tmp_path, monkeypatch):
    """A factory of planned and preprocessed tiny data sets: copies, as planning takes longer than most tests.

    What it is given beside planner and `preprocess` is for `tiny_dataset`.
    """
    known, cache = planned_before

    def make(planner="SemiSegPlannerSmall", preprocess=True, **kwargs) -> TinyDataset:
        key = json.dumps([planner, preprocess, kwargs], sort_keys=True)
        if key in known:
            stored = known[key]
            set_folders(tmp_path, monkeypatch)
            dataset = replace(stored, **{p: tmp_path / f"nnUNet_{p}" / stored.name for p in PLACES})
            shutil.copytree(stored.raw, dataset.raw)
            shutil.copytree(stored.preprocessed, dataset.preprocessed)
        else:
            dataset = tiny_dataset(**kwargs)
            dataset.plan(planner, preprocess=preprocess)
            known[key] = stored = replace(dataset, **{p: cache / str(len(known)) / p for p in PLACES})
            shutil.copytree(dataset.raw, stored.raw)
            shutil.copytree(dataset.preprocessed, stored.preprocessed)
        if preprocess:  # it can be trained on
            monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # nnU-Net's planner would not survive it
        return dataset

    return make


@pytest.fixture
def trained(ready):
    """A factory of trainers with the checkpoint of an untrained model: gives data set, `Run`, trainer."""
    from training import save_untrained

    def make(trainer_class, **kwargs):
        dataset = ready(**{"labeled": 2, "unlabeled": 2, "test": 1} | kwargs)
        return dataset, *save_untrained(trainer_class, dataset)

    return make
