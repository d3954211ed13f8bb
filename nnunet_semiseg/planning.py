"""Planning for semi-supervised training, with nnU-Net's planners or ours, which have other rules for batch or patch."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import nnunetv2
import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_semiseg.data.headers import count_channels, read_header, spacing_problem, total_memory
from nnunet_semiseg.data.image_problems import IMAGES_FOLDER, take_out
from nnunet_semiseg.data.labeled_cases import channel_names, inspect_labeled, labeled_images
from nnunet_semiseg.data.preprocessed import blame_the_disk, look_at_labeled
from nnunet_semiseg.data.records import FINGERPRINT, record_file, why_fingerprint_is_old, write_record
from nnunet_semiseg.data.unlabeled_cases import check_headers, find_unlabeled_cases
from nnunet_semiseg.data.unlabeled_preprocessing import DEFAULT_CONFIGURATIONS, preprocess_unlabeled
from nnunet_semiseg.discovery import find_class, iter_classes
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import (
    dataset_folder,
    disk_errors,
    make_folder,
    only_one,
    put_back,
    read_json,
    rewriting,
    write_json,
)
from nnunet_semiseg.parallel import killed_workers
from nnunet_semiseg.planning_request import PlanningRequest
from nnunet_semiseg.schema import check_name, load_plans, names_of_plans, read_dataset_json, read_splits
from nnunet_semiseg.settings.plans import PLANS_KEY, locked, parse_assignments, store_settings, update_settings
from nnunet_semiseg.text.prompts import read_prompts
from nnunet_semiseg.training.checks import check_depth

NUM_FOLDS = 5  # of nnU-Net's own split
LEAST_GPU = 0.5  # GB; with less, nnU-Net's planner finds no network


class SemiSegPlans:
    """Mixin for nnU-Net's planners: the plans have another name and their own preprocessed data."""

    default_plans_name: str

    def __init__(self, dataset_name_or_id: str | int, *, plans_name: str | None = None, **kwargs):
        super().__init__(dataset_name_or_id, plans_name=plans_name or self.default_plans_name, **kwargs)

    def generate_data_identifier(self, configuration_name: str) -> str:
        # nnU-Net's ResEnc planners write into the folders of nnUNetPlans. If only the batch size differs, we could do
        # so, too. But nnU-Net empties a folder and fills it again each time it preprocesses. With another target
        # spacing, or with a new fingerprint, the folder would then hold other data than nnUNetPlans were made for.
        # nnU-Net does not notice that, and a training that reads from the folder would break. So our plans have their
        # own folders.
        return f"{self.plans_identifier}_{configuration_name}"


class CountUnlabeled(SemiSegPlans):
    """Mixin for nnU-Net's planners: the limit of the batch size counts all images, not only the labelled ones.

    Against overfitting, nnU-Net limits a batch to a share of the voxels of the data set: 5 % with its default planner,
    100 % with its ResEnc presets. It counts the labelled cases only, but semi-supervised training also uses the
    unlabelled ones. With few labels, nnU-Net's batch would be small and have few unlabelled images.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        folder = Path(self.raw_dataset_folder, IMAGES_FOLDER)
        ending = self.dataset_json["file_ending"]
        cases = get_identifiers_from_splitted_dataset_folder(str(folder), ending) if folder.is_dir() else ()
        unlabeled_cases = sum(not case.startswith(".") for case in cases)
        # only the planner's copy is changed; the file itself is copied to the preprocessed data as it is
        self.dataset_json = {**self.dataset_json, "numTraining": self.dataset_json["numTraining"] + unlabeled_cases}


class SemiSegMemory(SemiSegPlans):
    """Mixin for nnU-Net's planners. It makes patch and batch so small that a step fits into memory as a whole.

    The batch size in the plans is that of the labelled stream. All trainers use the same plans. So the estimate is for
    the method that needs most memory: TextSemiSegTrainer, with a teacher and with one backward pass for a whole step.
    Trainers work like that with `memory=fast`. By default they need less: with nnU-Net's own patch about as much
    memory as nnU-Net.
    """

    num_decoders = 2
    """The number of decoders on one encoder."""
    num_streams = 2
    """The number of streams that go through the encoder and all decoders: the labelled samples, and as many unlabelled
    ones."""
    num_mixed_streams = 2
    """The number of streams that are mixed from the other two. They go through the encoder and one decoder, and are
    kept for the same backward pass."""
    has_teacher = True
    """Whether an EMA teacher predicts the unlabelled stream, without gradients."""

    def __init__(self, dataset_name_or_id: str | int, *, plans_name: str | None = None, **kwargs):
        super().__init__(dataset_name_or_id, plans_name=plans_name or self.default_plans_name, **kwargs)

    @classmethod
    def static_estimate_VRAM_usage(
        cls,
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """Estimate the peak memory for one sample in each stream. The unit is a voxel of the output of a convolution.

        nnU-Net uses this unit, too. It counts the outputs of all convolutions in the encoder (E) and in the decoder
        (D), because the backward pass needs them. Then it compares E + D with a reference. Here the estimate is

            num_streams * (E + num_decoders * D) + num_mixed_streams * (E + D) + teacher.

        A pass without gradients frees a feature map as soon as it was used. The teacher needs most memory in the last
        normalisation of the last decoder stage: for all skips; for the output of the stage below, which is as large as
        the second skip; and for five maps as large as the first skip: the concatenation (two), the output of its first
        convolution, and the input and output of the normalisation. Each counts half, because each counted output stands
        for two maps that the backward pass needs, before and after its normalisation.
        """
        with torch.device("meta"):  # only the shapes are needed
            net = get_network_from_plans(
                arch_class_name,
                arch_kwargs,
                arch_kwargs_req_import,
                input_channels,
                output_channels,
                allow_init=False,
            )
        encoder, decoder = (part.compute_conv_feature_map_size(patch_size) for part in (net.encoder, net.decoder))
        size, skips = np.array(patch_size), []
        for channels, stride in zip(net.encoder.output_channels, net.encoder.strides, strict=True):
            size = size // stride
            skips.append(channels * np.prod(size, dtype=np.int64))
        return int(
            cls.num_streams * (encoder + cls.num_decoders * decoder)
            + cls.num_mixed_streams * (encoder + decoder)
            + cls.has_teacher * (sum(skips) + sum(skips[1:2]) + 5 * skips[0]) / 2
        )


def plan_and_preprocess(request: PlanningRequest) -> None:
    """Run nnU-Net's fingerprint, planning and preprocessing for labelled cases; then preprocess the unlabelled ones.

    Raises:
        UserError: options, files or headers are wrong (this is checked for all data sets before any work); images or
            labels are bad, one line for each; the disk is full.
    """
    planner_class = find_planner(request.planner)
    if os.environ.get("nnUNet_n_proc_DA") == "0" and not issubclass(planner_class, SemiSegMemory):
        # nnU-Net's planner asks torch for that number of threads
        raise UserError(f"nnUNet_n_proc_DA=0: nnU-Net's {request.planner} needs 1 or more: set it to 1 while you plan")
    if request.overwrite_plans_name is not None:
        check_name("-overwrite_plans_name", request.overwrite_plans_name)
    plans_name = request.overwrite_plans_name or _default_plans_name(planner_class)
    changes = parse_assignments(request.settings)
    update_settings({}, changes)
    num_processes = request.processes
    if len(num_processes) not in (1, len(request.configurations)):
        raise UserError(f"-np {' '.join(map(str, num_processes))}: give one number, or one for each of -c")
    if unknown := sorted(set(request.configurations) - {*DEFAULT_CONFIGURATIONS, "3d_cascade_fullres"}):
        raise UserError(f"-c {unknown[0]}: no such configuration: use {' or '.join(DEFAULT_CONFIGURATIONS)}")
    if request.gpu_memory_target is not None and request.gpu_memory_target < LEAST_GPU:
        raise UserError(f"-gpu_memory_target {request.gpu_memory_target:g}: give {LEAST_GPU:g} GB or more")
    for dataset_id in request.dataset_ids:
        _check(dataset_id, request.verify_dataset_integrity, request.labeled_only, request.overwrite_target_spacing)

    for dataset_id in request.dataset_ids:
        raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
        plans_file = preprocessed / f"{plans_name}.json"
        if request.preprocess:
            _refuse_while_used(plans_file, request.configurations)

        make_folder(preprocessed.parent)
        with only_one(preprocessed.with_name(f".{preprocessed.name}.lock"), "plans this data set"):
            print("Fingerprint extraction...")
            with _in_one_line(raw):
                stamps = inspect_labeled(raw, preprocessed, read_dataset_json(raw), request.num_processes_fingerprint)
            if why := why_fingerprint_is_old(preprocessed, stamps):
                print(f"{preprocessed / FINGERPRINT}.json: {why}: it is made again")
            with _in_one_line(preprocessed):
                extract_fingerprint_dataset(
                    dataset_id,
                    num_processes=request.num_processes_fingerprint,
                    check_dataset_integrity=request.verify_dataset_integrity,
                    clean=request.clean or bool(why),
                    verbose=request.verbose,
                    show_progress_bar=request.show_progress_bar,
                )
            write_record(
                preprocessed, FINGERPRINT, {c: {"files": s, "made": None, "spread": None} for c, s in stamps.items()}
            )
            _check_spacings(raw, preprocessed)
            print("Experiment planning...")
            with locked(plans_file), disk_errors(plans_file), put_back(plans_file):
                kept = load_plans(plans_file, "delete it").get(PLANS_KEY, {}) if plans_file.is_file() else {}
                plan_experiment_dataset(
                    dataset_id,
                    planner_class,
                    request.gpu_memory_target,
                    overwrite_target_spacing=request.overwrite_target_spacing,
                    overwrite_plans_name=request.overwrite_plans_name,
                )
                if kept:
                    write_json({**load_plans(plans_file, "plan again"), PLANS_KEY: kept}, plans_file)
            store_settings(plans_file, changes)
            write_small_split(dataset_id)
        if request.preprocess:
            print("Preprocessing...")
            plans = read_plans(preprocessed, plans_name)
            for configuration, n in zip(
                request.configurations, num_processes * len(request.configurations), strict=False
            ):
                if configuration in plans["configurations"]:
                    check_depth(plans, configuration)
                    _preprocess_labeled(dataset_id, plans, configuration, n, request.verbose, request.show_progress_bar)
                    if request.labeled_only:  # otherwise preprocess_unlabeled does it
                        with _in_one_line(preprocessed):
                            look_at_labeled(raw, preprocessed, plans, configuration, n)
                else:
                    print(f"INFO: configuration {configuration} is not in {plans_file.name}: skipped")
            if not request.labeled_only:
                preprocess_unlabeled(
                    dataset_id,
                    request.configurations,
                    plans_name,
                    num_processes,
                    request.clean,
                    request.show_progress_bar,
                    request.verbose,
                )


def _refuse_while_used(plans_file: Path, configurations: Sequence[str]) -> None:
    """Raise BusyError if a training uses data that will be rewritten. It is called before hours of work begin."""
    if not plans_file.is_file():
        return
    plans = load_plans(plans_file, "delete it")["configurations"]
    for name in {plans.get(c, {}).get("data_identifier") for c in configurations}:
        if name and plans_file.with_name(name).is_dir():
            with rewriting(plans_file.with_name(name)):
                pass


def _preprocess_labeled(
    dataset_id: int, plans: dict, configuration: str, num_processes: int, verbose: bool, show_progress_bar: bool
) -> None:
    """Run nnU-Net's preprocessing of one configuration. If it fails, no folder with only some of the cases is left."""
    preprocessed = dataset_folder("nnUNet_preprocessed", dataset_id)
    folder = preprocessed / PlansManager(plans).get_configuration(configuration).data_identifier
    with rewriting(folder):
        record_file(preprocessed, folder.name).unlink(missing_ok=True)  # first: it belongs to the old files
        try:
            with _in_one_line(folder):
                preprocess_dataset(
                    dataset_id, plans["plans_name"], [configuration], [num_processes or 1], verbose, show_progress_bar
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _in_one_line(place: Path) -> Iterator[None]:
    """Turn nnU-Net's error about a full disk or a killed process into one line."""
    try:
        yield
    except Exception as e:
        blame_the_disk(e, place)
        with killed_workers(place):
            if isinstance(e, RuntimeError) and "background" in str(e):  # nnU-Net's name for workers
                raise BrokenProcessPool from None
            raise


def find_planner(name: str) -> type[ExperimentPlanner]:
    """Find a planner of ours or of nnU-Net. Raises UserError, with similar names, if there is none."""
    planner = find_class("planners", name) or recursive_find_python_class(
        str(Path(nnunetv2.__path__[0], "experiment_planning")), name, "nnunetv2.experiment_planning"
    )
    if not (isinstance(planner, type) and issubclass(planner, ExperimentPlanner)):
        ours = sorted(c.__name__ for c in iter_classes("planners"))
        near = difflib.get_close_matches(name, ours, n=3, cutoff=0.6)
        raise UserError(f"-pl {name}: no such planner: use {' or '.join(near or ours)}, or one of nnU-Net's")
    return planner


def read_plans(preprocessed: Path, name: str, option: str = "-p") -> dict:
    """Read the plans with this name from a dataset's preprocessed data.

    Args:
        option: the option of the command that names the plans, for the message.

    Raises:
        UserError: there are no such plans (the message lists the plans that exist), or the file is not JSON.
    """
    file = preprocessed / f"{name}.json"
    plan_first = f"plan first with {planning_command(preprocessed.name, name)}"
    if file.is_file():
        return load_plans(file, plan_first)
    if there := names_of_plans(preprocessed):
        names = f"there {'are' if len(there) > 1 else 'is'} {', '.join(there)}: choose with {option}"
        raise UserError(f"{file}: no such plans; {names}; or {plan_first}")
    raise UserError(f"{file}: no such plans: {plan_first}")


def planning_command(dataset: str, plans_name: str) -> str:
    """The command that makes plans with this name."""
    command = f"nnunet_semiseg plan_and_preprocess -d {convert_dataset_name_to_id(dataset)}"
    if plans_name == _default_plans_name(ExperimentPlanner):
        return command
    for ours in iter_classes("planners"):
        for planner in ours.__mro__:  # nnU-Net's presets are base classes of ours
            if issubclass(planner, ExperimentPlanner) and _default_plans_name(planner) == plans_name:
                return f"{command} -pl {planner.__name__}"
    return f"{command} -overwrite_plans_name {plans_name}"


def write_settings(plans_file: Path, changes: dict) -> None:
    """Put settings into a plans file, for every trainer that uses it, and print what changes.

    Raises:
        UserError: there are no such plans; a setting does not exist or has the wrong type.
    """
    check_plans_name(plans_file)
    store_settings(plans_file, changes)


def check_plans_name(plans_file: Path) -> None:
    """Raises UserError if there are no such plans, or if the name inside the file is another one."""
    plans = read_plans(plans_file.parent, plans_file.stem)
    if plans["plans_name"] != plans_file.stem:  # nnU-Net names the model after plans_name
        raise UserError(
            f"{plans_file}: its plans_name is {plans['plans_name']}, so a training would overwrite the model of those"
            " plans: copy plans with nnunet_semiseg train ... --as NAME"
        )


def copy_plans(plans_file: Path, name: str) -> Path:
    """Copy plans under another name, for the same preprocessed data.

    Raises:
        UserError: there are no such plans, or plans with the new name exist already.
    """
    plans = read_plans(plans_file.parent, plans_file.stem)
    copy = plans_file.with_name(f"{name}.json")
    with locked(copy):
        if copy.exists():
            raise UserError(f"{copy}: these plans exist already: continue with -p {name}, or choose another name")
        write_json({**plans, "plans_name": name}, copy)
    return copy


def write_small_split(dataset_id: int) -> None:
    """Write leave-one-out folds if there are too few cases for nnU-Net's five folds.

    With one case only `fold all` works.
    """
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    cases = sorted(labeled_images(raw, read_dataset_json(raw)))
    splits_file = preprocessed / "splits_final.json"
    if splits_file.is_file():
        folds = read_splits(splits_file, "delete it")
        if new := sorted(set(cases) - {case for fold in folds for case in (*fold["train"], *fold["val"])}):
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            print(f"WARNING: {splits_file}: no fold has {new[0]}{more}: delete the file to have new folds")
        return
    if not 2 <= len(cases) < NUM_FOLDS:
        return
    write_json([{"train": [c for c in cases if c != held_out], "val": [held_out]} for held_out in cases], splits_file)
    print(f"{splits_file}: {len(cases)} labelled cases, so {len(cases)} leave-one-out folds")


def _check(dataset_id: int, headers: bool, labeled_only: bool, target_spacing: Sequence[float] | None = None) -> None:
    raw, preprocessed = (dataset_folder(v, dataset_id) for v in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset_json = read_dataset_json(raw)
    read_prompts(dataset_json, str(raw / "dataset.json"))
    labeled_cases = labeled_images(raw, dataset_json)
    if not labeled_cases:
        raise UserError(f"{raw / 'imagesTr'}: no labelled cases: put at least one there, and its label into labelsTr")
    if dataset_json["numTraining"] != len(labeled_cases):  # the batch size depends on this number
        count = len(labeled_cases)
        raise UserError(
            f'{raw / "dataset.json"}: "numTraining" is {dataset_json["numTraining"]}, but there are {count} labelled'
            f' cases: write "numTraining": {count}'
        )
    case, images = next(iter(labeled_cases.items()))
    found, named = count_channels(images), len(channel_names(dataset_json))
    if found not in (None, named):
        raise UserError(
            f'{raw / "dataset.json"}: "channel_names" names {named} channels, but {case} has {found}: name those that'
            " there are, or add the missing files"
        )
    for case, files in labeled_cases.items():
        if len(files) != len(images):
            first = next(iter(labeled_cases))
            raise UserError(
                f"{files[0]}: {case} has {len(files)} channels, but {first} has {len(images)}: add or remove files"
            )
    unlabeled_cases = {} if labeled_only else find_unlabeled_cases(raw, dataset_json)
    if target_spacing:
        _check_target_spacing(target_spacing, images[0], named)
    ours, theirs = preprocessed / "splits_final.json", raw / "splits_final.json"
    both = ours.is_file() and theirs.is_file()
    if both and not _agree(read_splits(ours, "delete it"), read_splits(theirs, "fix it")):
        raise UserError(f"{ours}: differs from {theirs}: delete the one that is wrong")
    if headers:
        example = next(iter(labeled_cases.values()))[0]
        check_headers(unlabeled_cases, determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False))


def _check_target_spacing(target: Sequence[float], image: str, channels: int) -> None:
    """Refuse a spacing (z, y, x) if an image would then have no voxels, or more than fit into memory."""
    header, memory = read_header(Path(image)), total_memory()
    if header is None or header.GetDimension() != 3:
        return
    size, spacing = header.GetSize()[::-1], header.GetSpacing()[::-1]
    shape = [n * mm / new for n, mm, new in zip(size, spacing, target, strict=True)]
    if min(shape) < 1 or (memory and math.prod(shape) * channels * 4 > memory):
        wanted, found, result = (" ".join(f"{v:g}" for v in values) for values in (target, spacing, shape))
        raise UserError(
            f"-overwrite_target_spacing {wanted}: {image} has a spacing of {found} and would have {result} voxels:"
            " give a spacing near that of the images"
        )


def _check_spacings(raw: Path, preprocessed: Path) -> None:
    """Refuse labelled images whose spacing is far from that of the others. The error has one line for each."""
    files = labeled_images(raw, read_dataset_json(raw))
    file = preprocessed / f"{FINGERPRINT}.json"
    spacings = read_json(file, "delete it")["spacings"]  # in the order of the cases
    usual, problems = np.quantile(spacings, 0.5, axis=0, method="lower"), []
    for images, spacing in zip(files.values(), spacings, strict=True):
        if odd := spacing_problem(spacing, usual):
            problems.append(f"{images[0]}: {odd}: {take_out(images[0])}")
    if problems:
        raise UserError("\n".join(problems))


def _agree(preprocessed_splits: list[dict], raw_splits: list[dict]) -> bool:
    """Whether two lists of folds agree. By nnU-Net's rule, the first list may have more folds.

    nnU-Net itself would fail with a bare AssertionError.
    """
    return len(preprocessed_splits) >= len(raw_splits) and all(
        set(ours[part]) == set(theirs[part])
        for ours, theirs in zip(preprocessed_splits, raw_splits, strict=False)
        for part in ("train", "val")
    )


def plans_name_of(planner: str) -> str:
    """The name that the plans of this planner have by default."""
    return _default_plans_name(find_planner(planner))


def _default_plans_name(planner_class: type[ExperimentPlanner]) -> str:
    if issubclass(planner_class, SemiSegPlans):
        return planner_class.default_plans_name
    return inspect.signature(planner_class).parameters["plans_name"].default
