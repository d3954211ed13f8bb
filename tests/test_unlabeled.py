import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from commands import command, start
from conftest import write_image
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_semiseg.data import unlabeled_preprocessing
from nnunet_semiseg.data.plans_hash import plans_hash
from nnunet_semiseg.data.unlabeled_cases import find_unlabeled_cases
from nnunet_semiseg.data.unlabeled_manifest import load_manifest
from nnunet_semiseg.data.unlabeled_preprocessing import alone_or_part, preprocess_unlabeled
from nnunet_semiseg.data.unpacked_nifti import unpacked_nifti
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import BusyError, only_one

PLANS = "nnUNetSemiSegSmallPlans"


@pytest.fixture
def planned(ready):
    return ready(preprocess=False, labeled=2, unlabeled=4)


def run(dataset, num_processes=0, **kwargs):
    preprocess_unlabeled(dataset.id, ["3d_fullres"], PLANS, num_processes, show_progress_bar=False, **kwargs)


def output(dataset):
    folder = dataset.preprocessed / f"{PLANS}_3d_fullres__unlabeled"
    return folder, folder.with_name(f"{folder.name}.json")


def whole_cases(dataset):
    return {file.stem: file.stat().st_mtime_ns for file in output(dataset)[0].glob("*.pkl")}


def manifest(dataset):
    return load_manifest(dataset.preprocessed, dataset.plans(PLANS), "3d_fullres", dataset.name)


def nothing_half_made(dataset):
    folder, manifest_file = output(dataset)
    suffixes = {case: {f.name[len(case) :] for f in folder.glob(f"{case}*")} for case in whole_cases(dataset)}
    assert all(found == {".b2nd", "_seg.b2nd", ".pkl"} for found in suffixes.values())
    assert len(list(folder.iterdir())) == 3 * len(suffixes)
    assert not list(dataset.preprocessed.glob("*.tmp*"))
    return not manifest_file.exists()


# --- what is preprocessed


def test_the_voxels_are_what_nnunet_makes_of_an_image_without_label(planned):
    run(planned)
    folder, cases = manifest(planned)
    assert cases == ["un_000", "un_001", "un_002", "un_003"]
    plans = PlansManager(planned.plans(PLANS))
    configuration = plans.get_configuration("3d_fullres")
    expected, _, _ = configuration.preprocessor_class(verbose=False).run_case(
        [str(planned.image("un_002"))], None, plans, configuration, planned.dataset_json
    )
    assert np.array_equal(blosc2.open(f"{folder}/un_002.b2nd")[:], expected)
    properties = load_pickle(f"{folder}/un_002.pkl")
    assert properties["class_locations"] == {}  # a loader that samples by class would find none
    assert properties["shape_before_cropping"] == (24, 24, 24)


@pytest.mark.parametrize("dims, channels", [(2, 1), (3, 2)])
def test_other_datasets(tiny_dataset, dims, channels):
    dataset = tiny_dataset(dims=dims, channels=channels, size=20, unlabeled=2)
    plans = dataset.plan()
    folder, cases = load_manifest(dataset.preprocessed, plans, dataset.configuration, dataset.id)
    shape = blosc2.open(f"{folder}/{cases[0]}.b2nd").shape
    assert shape[0] == channels and (dims == 3 or shape[1] == 1)


def test_rgb_images_hold_all_channels_in_one_file(tiny_dataset):
    dataset = tiny_dataset(dims=2, labeled=2, unlabeled=2, channel_names={"0": "R", "1": "G", "2": "B"})
    for file in dataset.raw.glob("images*/*.png"):
        grey = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        rgb = np.stack([grey, np.full_like(grey, 7) if file.stem == "un_001_0000" else 255 - grey, grey], -1)
        sitk.WriteImage(sitk.GetImageFromArray(rgb, isVector=True), str(file))
    with pytest.raises(UserError, match=r"^\S*un_001_0000.png \(channel G\): constant, every voxel is 7: .*$"):
        dataset.plan()


def test_cascades_and_missing_configurations(planned, capsys):
    preprocess_unlabeled(planned.id, ["3d_lowres", "3d_fullres"], PLANS, 0, show_progress_bar=False)
    assert "3d_lowres is not in" in capsys.readouterr().out
    with pytest.raises(UserError, match="no configuration 3d_lowres: use -c 2d 3d_fullres"):
        preprocess_unlabeled(planned.id, ["3d_lowres"], PLANS, 0)


# --- which images are taken


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: shutil.rmtree(d.raw / "imagesUn"), r"imagesUn: no such folder: make it"),
        (lambda d: [f.unlink() for f in (d.raw / "imagesUn").iterdir()], r"imagesUn: is empty: put"),
        (
            lambda d: [f.rename(f.with_suffix(".mha")) for f in (d.raw / "imagesUn").iterdir()],
            r"imagesUn: has no \*.nii.gz among its 4 files \(the first is un_000_0000.nii.mha\): put",
        ),
        (
            lambda d: d.image("un_001", 1).unlink(),
            r"un_001_0001.nii.gz: no such file, but un_001 needs 2 channels: add",
        ),
        (
            lambda d: shutil.copy(d.image("un_001", 1), d.image("un_001", 2)),
            r"un_001_0002.nii.gz: labelled cases have only 2 channels: remove",
        ),
        (
            lambda d: shutil.copy(d.image("un_001"), d.raw / "imagesUn" / "scan.nii.gz"),
            r"scan.nii.gz: its name has no channel: rename it to CASE_0000.nii.gz",
        ),
        (
            lambda d: (d.image("un_001").unlink(), d.image("un_001").symlink_to("/nowhere.nii.gz")),
            r"un_001_0000.nii.gz: a link to a file that does not exist: fix it",
        ),
        (
            lambda d: [d.image("un_001", c).rename(d.image("tr_001", c)) for c in range(2)],
            r"tr_001_\*.nii.gz: tr_001 is a labelled case too: remove",
        ),
    ],
)
def test_wrong_file_names_are_refused_in_one_line(tiny_dataset, change, message):
    dataset = tiny_dataset(channels=2, unlabeled=2, size=6)
    assert list(find_unlabeled_cases(dataset.raw, dataset.dataset_json)) == ["un_000", "un_001"]
    change(dataset)
    with pytest.raises(UserError, match=rf"^\S*{message}.*$"):
        find_unlabeled_cases(dataset.raw, dataset.dataset_json)
    with pytest.raises(UserError, match=message):
        dataset.plan()
    assert not dataset.preprocessed.exists()


def test_only_the_command_that_plans_offers_its_option(planned):
    shutil.rmtree(planned.raw / "imagesUn")
    message = "imagesUn: no such folder: make it and put the unlabelled images there, named CASE_0000.nii.gz"
    with pytest.raises(UserError, match=f"{message}, or plan without unlabelled cases: --labeled_only$"):
        planned.plan()
    with pytest.raises(UserError, match=f"{message}$"):
        run(planned)


# --- bad images

OTHER = np.random.default_rng(1).normal(100, 9, (24, 24, 24)).astype(np.float32)


def with_value(value):
    array = OTHER.copy()
    array[3, 4, 5] = value
    return array


BAD_IMAGES = {
    "unreadable": (lambda file: file.write_bytes(b"no image"), "cannot be read"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:2000]), "cannot be read"),
    "shape": (lambda file: write_image(OTHER[:20], file), r"size \(24, 24, 20\) differs from \(24, 24, 24\)"),
    "spacing": (lambda file: write_image(OTHER, file, (1, 1, 2)), r"spacing \(1, 1, 2\) differs from"),
    "origin": (lambda file: write_image(OTHER, file, origin=(0, 5, 0)), r"origin \(0, 5, 0\) differs from"),
    "direction": (
        lambda file: write_image(OTHER, file, direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)),
        r"direction \(-1, -?0, .*\) differs from \(1, ",
    ),
    "constant": (lambda file: write_image(OTHER * 0 + 3, file), "constant, every voxel is 3"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read"),
    "nan": (lambda file: write_image(with_value(np.nan), file), "1 voxels are NaN or infinite"),
    "infinite": (lambda file: write_image(with_value(-np.inf), file), "1 voxels are NaN or infinite"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_named_and_the_good_cases_are_kept(tiny_dataset, kind, capsys):
    dataset = tiny_dataset(labeled=2, unlabeled=3, channels=2)
    dataset.plan(preprocess=False)
    spoil, message = BAD_IMAGES[kind]
    good = dataset.image("un_001", 1).read_bytes()
    spoil(dataset.image("un_001", 1))
    capsys.readouterr()
    with pytest.raises(UserError, match=rf"^\S*un_001_0001.nii.gz: {message}.*: .*imagesUn$"):
        run(dataset)
    assert len(capsys.readouterr().out.splitlines()) == 1  # nothing of nnU-Net's buries the line
    assert nothing_half_made(dataset)
    kept = whole_cases(dataset)
    assert list(sorted(kept)) == ["un_000", "un_002"]

    dataset.image("un_001", 1).write_bytes(good)
    run(dataset)
    assert manifest(dataset)[1] == ["un_000", "un_001", "un_002"]
    assert kept.items() <= whole_cases(dataset).items()


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd", ".tif"])
@pytest.mark.parametrize("kind", ["truncated", "nan"])
def test_bad_images_of_other_formats(tiny_dataset, ending, kind):
    dataset = tiny_dataset(labeled=2, unlabeled=2)
    for file in dataset.raw.glob("*/*.nii.gz"):
        write_image(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), file.with_name(file.name[:-7] + ending))
        file.unlink()
    dataset.update_dataset_json(file_ending=ending)
    spoil, message = BAD_IMAGES[kind]
    spoil(dataset.image("un_001"))
    with pytest.raises(UserError, match=rf"^\S*un_001_0000{ending}: {message}.*: .*imagesUn$"):
        dataset.plan()
    assert len(list(dataset.preprocessed.glob("*__unlabeled/*.pkl"))) == 1


def test_readers_that_compare_channels_themselves_are_quoted(tiny_dataset, capsys):
    dataset = tiny_dataset(labeled=2, unlabeled=2, channels=2, overwrite_image_reader_writer="NibabelIO")
    dataset.plan(preprocess=False)
    write_image(OTHER[:20], dataset.image("un_001", 1))
    message = r"un_001_0000.nii.gz, \S*un_001_0001.nii.gz: cannot be read \(ERROR! Not all .* same shape!\): .*$"
    with pytest.raises(UserError, match=message):
        run(dataset)
    assert nothing_half_made(dataset)


def test_all_bad_images_are_listed_each_in_one_line(planned):
    write_image(OTHER * 0, planned.image("un_003"))
    planned.image("un_000").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        run(planned)
    lines = str(error.value).splitlines()
    assert [Path(line.split(": ")[0]).name for line in lines] == ["un_000_0000.nii.gz", "un_003_0000.nii.gz"]
    assert len(whole_cases(planned)) == 2


def test_a_fault_of_ours_is_not_blamed_on_the_image(planned, monkeypatch):
    def no_space(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("nnunetv2.training.dataloading.nnunet_dataset.nnUNetDatasetBlosc2.save_case", no_space)
    with pytest.raises(OSError, match="No space left"):
        run(planned)
    assert nothing_half_made(planned)


# --- interruption


def test_after_an_interruption_whole_cases_are_not_redone(planned, monkeypatch):
    real, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if str(target).endswith("un_002_seg.b2nd"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(planned)
    monkeypatch.setattr(os, "replace", real)
    whole = whole_cases(planned)
    assert sorted(whole) == ["un_000", "un_001"]
    assert output(planned)[0].joinpath("un_002.b2nd").exists()  # half a case, which must not pass
    with pytest.raises(UserError, match="not .all. preprocessed"):
        manifest(planned)
    run(planned)
    assert whole.items() <= whole_cases(planned).items()
    assert not nothing_half_made(planned) and len(manifest(planned)[1]) == 4


def test_while_a_case_is_redone_no_manifest_vouches_for_it(planned, monkeypatch):
    run(planned)
    write_image(OTHER, planned.image("un_002"))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        run(planned)
    with pytest.raises(UserError, match="not .all. preprocessed"):
        manifest(planned)


def test_after_sigkill_whole_cases_are_not_redone(planned):
    code = (
        "import os, signal; real = os.replace\n"
        "def replace(source, target):\n"
        "    if str(target).endswith('un_001.pkl'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(source, target)\n"
        "os.replace = replace\n"
        "from nnunet_semiseg.data.unlabeled_preprocessing import preprocess_unlabeled\n"
        f"preprocess_unlabeled({planned.id}, ['3d_fullres'], '{PLANS}', 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    whole = whole_cases(planned)
    assert list(whole) == ["un_000"]
    assert list(planned.preprocessed.glob("*.tmp/*"))  # left by the kill, and cleared by the next run
    run(planned)
    assert not nothing_half_made(planned)
    assert whole.items() <= whole_cases(planned).items() and len(manifest(planned)[1]) == 4


def kill_worker(case, *_):
    if case == "un_000":
        os.kill(os.getpid(), signal.SIGKILL)
    return case, []


def test_a_killed_worker_is_reported(planned, monkeypatch):
    monkeypatch.setattr(unlabeled_preprocessing, "preprocess_case", kill_worker)
    with pytest.raises(UserError, match=r"^\S*unlabeled: a worker was killed.*-np.*$"):
        run(planned, num_processes=1)
    assert nothing_half_made(planned)


def test_damaged_cases_are_redone(planned):
    run(planned)
    folder, _ = output(planned)
    whole = whole_cases(planned)
    (folder / "un_001_seg.b2nd").unlink()
    (folder / "un_002.pkl").write_bytes((folder / "un_002.pkl").read_bytes()[:50])
    with pytest.raises(UserError, match="un_001_seg.b2nd: no such file: run nnunet_semiseg preprocess_unlabeled"):
        manifest(planned)
    run(planned)
    again = whole_cases(planned)
    assert {case for case in whole if whole[case] != again[case]} == {"un_001", "un_002"}
    manifest(planned)


# --- staleness


def test_only_what_changed_is_redone(planned):
    run(planned)
    before = whole_cases(planned)
    write_image(OTHER, planned.image("un_001"))
    with pytest.raises(
        UserError,
        match=r"imagesUn: the images of case un_001 have changed since they were"
        " preprocessed: run nnunet_s",
    ):
        manifest(planned)
    planned.image("un_002").unlink()
    shutil.copy(planned.image("un_000"), planned.image("un_009"))
    with pytest.raises(
        UserError, match=r"imagesUn: case un_002 was preprocessed but is missing now: run nnunet_semiseg"
    ):
        manifest(planned)
    run(planned)
    after = whole_cases(planned)
    assert sorted(after) == manifest(planned)[1] == ["un_000", "un_001", "un_003", "un_009"]
    assert {case for case in before if before[case] == after.get(case)} == {"un_000", "un_003"}
    run(planned, clean=True)
    assert not set(after.items()) & set(whole_cases(planned).items())


def test_data_for_other_plans_are_refused_and_redone(planned):
    run(planned)
    before = whole_cases(planned)
    plans_file = planned.preprocessed / f"{PLANS}.json"
    plans = planned.plans(PLANS)
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    plans_file.write_text(json.dumps(plans))
    fix = f"run nnunet_semiseg preprocess_unlabeled -d {planned.id} -c 3d_fullres -plans_name {PLANS}"
    with pytest.raises(UserError, match=rf"^\S*__unlabeled: was preprocessed with other plans: .*: {fix}$"):
        manifest(planned)
    run(planned)
    assert not set(before.items()) & set(whole_cases(planned).items())
    manifest(planned)


def test_missing_data_are_refused_with_the_command(planned):
    fix = f"run nnunet_semiseg preprocess_unlabeled -d {planned.id} -c 3d_fullres -plans_name {PLANS}"
    with pytest.raises(UserError, match=rf"^\S*__unlabeled.json: .*not .all. preprocessed: {fix}$"):
        manifest(planned)
    shutil.rmtree(planned.raw / "imagesUn")
    with pytest.raises(UserError, match=rf"put the unlabelled images into \S*/imagesUn, then {fix}$"):
        manifest(planned)


def test_training_needs_no_raw_data(planned, monkeypatch):
    run(planned)
    os.utime(planned.image("un_001"))  # nor the very file
    assert len(manifest(planned)[1]) == 4
    shutil.rmtree(planned.raw)
    assert len(manifest(planned)[1]) == 4
    monkeypatch.delenv("nnUNet_raw")
    assert len(manifest(planned)[1]) == 4


def test_the_hash_covers_what_determines_the_voxels_and_nothing_else(planned):
    plans = planned.plans(PLANS)
    wanted = plans_hash(plans, "3d_fullres")

    def changed(key, value, level="configuration"):
        other = json.loads(json.dumps(plans))
        (other["configurations"]["3d_fullres"] if level == "configuration" else other)[key] = value
        return plans_hash(other, "3d_fullres") != wanted

    assert changed("spacing", [1.0, 1.0, 1.0])
    assert changed("normalization_schemes", ["CTNormalization"])
    assert changed("use_mask_for_norm", [True])
    assert changed("resampling_fn_data", "resample_torch_fornnunet")
    assert changed("resampling_fn_seg_kwargs", {})
    assert changed("preprocessor_name", "Other")
    assert changed("transpose_forward", [1, 0, 2], "plans")
    assert changed("image_reader_writer", "NibabelIO", "plans")
    assert changed("foreground_intensity_properties_per_channel", {"0": {"mean": 1.0}}, "plans")
    assert not changed("patch_size", [8, 8, 8])
    assert not changed("batch_size", 9)
    assert not changed("architecture", {})
    assert not changed("plans_name", "other", "plans")
    assert not changed("semiseg", {"num_epochs": 3}, "plans")
    plans["configurations"]["heir"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    assert plans_hash(plans, "heir") == wanted
    plans["configurations"]["heir"]["spacing"] = [3.0, 3.0, 3.0]
    assert plans_hash(plans, "heir") != wanted


# --- labels


def test_hidden_labels_change_nothing(tiny_dataset):
    dataset = tiny_dataset(labeled=3, unlabeled=3)
    fixed = 1_600_000_000
    for file in dataset.raw.rglob("*.nii.gz"):
        os.utime(file, (fixed, fixed))

    def content(file):
        # blosc2's threads write a file's blocks in any order: the voxels are what counts
        if file.suffix == ".b2nd":
            return blosc2.open(str(file))[:].tobytes()
        if file.suffix == ".pkl":
            properties = load_pickle(str(file))
            properties.get("semiseg", {}).pop("made", None)
            return repr(properties)
        if not file.stem.endswith("__unlabeled") and not file.stem.endswith("__labeled"):
            return file.read_bytes()
        about = json.loads(file.read_text())
        for entry in about["cases"].values():
            entry.pop("made")
        return json.dumps(about)

    def everything():
        dataset.plan()
        files = {str(f): content(f) for f in sorted(dataset.preprocessed.rglob("*")) if f.is_file()}
        shutil.rmtree(dataset.preprocessed)
        return files

    without = everything()
    assert any("__unlabeled/un_002.b2nd" in file for file in without)
    for seed, folder in enumerate(("labelsUn", "imagesUn/labels", "imagesUn/labelsTr", "labelsTs", "labels")):
        (dataset.raw / folder).mkdir()
        for case in ("un_000", "un_001", "un_002"):
            noise = np.random.default_rng(seed).integers(0, 3, (24, 24, 24)).astype(np.uint8)
            write_image(noise, dataset.raw / folder / f"{case}.nii.gz")
    assert everything() == without


def test_a_folder_named_like_an_image_is_not_passed_over(planned):
    folder = planned.image("un_007")
    folder.mkdir()
    with pytest.raises(UserError, match=f"^{folder}: is a folder, not an image: remove it$"):
        run(planned)


def test_a_second_preprocessing_is_told_who_is_at_it(planned):
    folder, _ = output(planned)
    with only_one(folder.with_name(f"{folder.name}.lock"), "preprocesses"):
        with pytest.raises(BusyError, match=f"process {os.getpid()} on .* preprocesses these unlabelled cases"):
            run(planned)
    assert not folder.exists()
    run(planned)
    assert len(whole_cases(planned)) == 4 and not list(planned.preprocessed.glob("*.lock"))


def everything_in(dataset) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output(dataset)[0].iterdir()}


def test_parts_make_together_what_one_call_makes(planned):
    folder, manifest_file = output(planned)
    run(planned)
    by_one = everything_in(planned)
    shutil.rmtree(folder)
    manifest_file.unlink()
    for number, cases in {1: {"un_001"}, 2: {"un_001", "un_002"}, 0: {"un_000", "un_001", "un_002", "un_003"}}.items():
        run(planned, part=(number, 3))
        assert set(whole_cases(planned)) == cases and not manifest_file.exists()
    whole = whole_cases(planned)
    run(planned, part=(0, 3))
    run(planned)
    assert whole_cases(planned) == whole and everything_in(planned) == by_one
    assert len(manifest(planned)[1]) == 4 and not list(planned.preprocessed.glob("*.part*"))
    run(planned, part=(1, 3), clean=True)  # what the others have made stays
    now = whole_cases(planned)
    assert {case for case in whole if now[case] != whole[case]} == {"un_001"} and not manifest_file.exists()


@pytest.mark.slow
def test_three_processes_at_once_of_which_one_is_killed_and_started_again(ready):
    dataset = ready(preprocess=False, labeled=2, unlabeled=60, size=12)
    folder, manifest_file = output(dataset)
    run(dataset)
    by_one = everything_in(dataset)
    shutil.rmtree(folder)
    manifest_file.unlink()
    words = ["preprocess_unlabeled", "-d", dataset.id, "-c", "3d_fullres", "-plans_name", PLANS, "-np", 0]
    parts = [start("nnunet_semiseg", *words, "-num_parts", 3, "-part_id", part)[0] for part in range(3)]
    second = {f"un_{i:03d}" for i in range(1, 60, 3)}
    while not second & set(whole_cases(dataset)):
        assert parts[1].is_alive()
        time.sleep(0.01)
    parts[1].kill()
    parts[1].join()
    assert second - set(whole_cases(dataset))  # in the middle of its work
    command("nnunet_semiseg", *words, "-num_parts", 3, "-part_id", 1)
    for part in parts:
        part.join()
    assert [part.exitcode for part in parts] == [0, -signal.SIGKILL, 0] and not manifest_file.exists()
    whole = whole_cases(dataset)
    command("nnunet_semiseg", *words)
    assert len(whole) == 60 and whole_cases(dataset) == whole and everything_in(dataset) == by_one
    assert len(manifest(dataset)[1]) == 60 and not list(dataset.preprocessed.glob("*.part*"))


@pytest.mark.parametrize(
    "lock, part, busy",
    [
        (".part0of2.lock", None, True),  # the last call comes when all parts have ended
        (".part0of2.lock", (0, 2), True),
        (".part0of2.lock", (1, 2), False),
        (".part0of2.lock", (1, 3), True),  # other parts would do the same cases
        (".lock", (1, 2), True),
    ],
)
def test_parts_and_other_calls_keep_out_of_each_others_way(lock, part, busy, tmp_path):
    folder = tmp_path / "plans_3d_fullres__unlabeled"
    with only_one(tmp_path / f"{folder.name}{lock}", "preprocesses"):
        with pytest.raises(BusyError) if busy else contextlib.nullcontext(), alone_or_part(folder, part):
            assert not busy
    assert not list(tmp_path.iterdir())


def test_each_image_is_unpacked_once(planned, tmp_path, monkeypatch):
    image, asked, unpack = planned.image("un_000"), [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: asked.append(n) or unpack(self, n))
    file = Path(unpacked_nifti(str(image), tmp_path))
    assert asked[-1] == 352 + 4 * 24**3  # no byte more than the header speaks of
    assert file == tmp_path / "un_000_0000.nii" and file.read_bytes() == gzip.decompress(image.read_bytes())
    read, original = [], SimpleITKIO.read_images
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda self, files: read.extend(files) or original(self, files))
    run(planned)
    assert sorted(Path(file).name for file in read) == [f"un_{i:03d}_0000.nii" for i in range(4)]
    assert not any(Path(file).exists() for file in read)
