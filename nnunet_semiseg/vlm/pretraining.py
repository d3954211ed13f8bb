"""`nnunet_semiseg pretrain_vlm`: AMVLM's vision-language pre-training on the images and texts of a dataset."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from nnunet_semiseg.data.labeled_subset import cases_of_fold, take_labeled
from nnunet_semiseg.data.texts import read_texts, texts_file
from nnunet_semiseg.devices import check_device
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import (
    dataset_folder,
    disk_errors,
    folder_for,
    make_folder,
    only_one,
    reading,
    write_json,
    written_whole,
)
from nnunet_semiseg.schema import load_plans, read_dataset_json
from nnunet_semiseg.settings.plans import parse_assignments, settings_from
from nnunet_semiseg.text.encoder import is_hf
from nnunet_semiseg.text.open_clip_models import UNTRAINED, save_text_config
from nnunet_semiseg.text.static_words import WORDLLAMA
from nnunet_semiseg.training.distributed import Ranks, join
from nnunet_semiseg.training.log_lines import expected_end
from nnunet_semiseg.training.random_state import seed_everything
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.pairs import Pairs, may_be_mirrored, open_cases
from nnunet_semiseg.vlm.pretrained import ABOUT, STATE, WEIGHTS, read_about, read_state
from nnunet_semiseg.vlm.task import PretrainingSettings, PretrainingTask, retrieval
from nnunet_semiseg.vlm.towers import TIMM, load_towers, split_model

DEFAULT_MODEL = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
OPTIONS = {"model": "--model ", "pretrained": "--model MODEL:", "cache_dir": "--set cache_dir="}
LOCK = "training.lock"
HARMLESS = ("num_workers", "cache_dir")
"""The settings that do not change the result."""


def pretrain(
    dataset: int | str,
    model: str = DEFAULT_MODEL,
    output: str | Path | None = None,
    settings: Iterable[str] = (),
    *,
    configuration: str = "2d",
    plans: str = "nnUNetPlans",
    device: str = "cuda",
) -> Path:
    """Pre-train on the images and texts of a dataset, on several GPUs if torchrun starts it. A repeated call continues.

    Args:
        model: `hf-hub:OWNER/NAME`; `NAME:TAG` of open_clip; a folder; or `timm:NAME`, an image network of timm together
            with WordLlama. With `:none` at its end the model is untrained.
        output: the folder to write. None: `vlm/CONFIGURATION` in the results of the dataset.
        settings: settings `KEY=VALUE` of `PretrainingSettings`.

    Returns:
        The folder. It has `vlm.safetensors` and `vlm.json`, which `AMVLMTrainer` loads, the state of the training, and
        `progress.png`.

    Raises:
        UserError: settings, texts, model or preprocessed data are wrong; there are too few cases for a batch; the
            folder holds another pre-training, or a damaged one; the loss is not finite.
        BusyError: another process pre-trains in this folder.
        DiskError: the disk is full or read-only.
    """
    chosen = settings_from(PretrainingSettings, parse_assignments(settings))
    name = dataset_folder("nnUNet_preprocessed", dataset).name
    data, unlabeled_cases = open_cases(name, plans, configuration)
    if model.startswith(TIMM):
        chosen = replace(chosen, text_model=WORDLLAMA)
    masks, ignore_label = cases_with_masks(name, sorted(set(data.identifiers) - set(unlabeled_cases)), chosen)
    texts = read_texts(name, data.identifiers, chosen.missing_texts)
    if output is None:
        output = dataset_folder("nnUNet_results", dataset) / "vlm" / configuration
    output = folder_for(output)
    about = {"model": model, "dataset": name, "configuration": configuration, "plans": plans}
    about["texts"] = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    about["settings"] = json.loads(json.dumps(asdict(chosen)))
    check_goes_on(about, output)

    rank, device = set_up(device)
    seed_everything(chosen.seed)
    base, weights = split_model(model)
    clip, tokenizer, config = load_towers(base, weights, chosen.text_model, chosen.cache_dir, OPTIONS)
    vlm = AMVLM(clip, tokenizer, chosen.dim, chosen.hidden)
    cases = np.random.default_rng(chosen.seed).permutation(sorted(texts)).tolist()
    n_held_out = round(chosen.held_out * len(cases))
    held_out, training = cases[:n_held_out], cases[n_held_out:]
    world = int(os.environ.get("WORLD_SIZE", 1))
    if len(training) // world < chosen.batch_size:
        each = f" in each of {world} processes" if world > 1 else ""
        few = f"{len(training)} pairs are too few for batches of {chosen.batch_size}{each}"
        raise UserError(f"{few}: choose a smaller number with --set batch_size=NUMBER")
    plans_of_it = load_plans(dataset_folder("nnUNet_preprocessed", dataset) / f"{plans}.json", "plan again")
    mirror = chosen.mirror and may_be_mirrored(plans_of_it, chosen.slice_axis)
    parts = [(training, chosen.crop, mirror), (held_out, None, False)]
    try:
        train_pairs, held_out_pairs = (
            Pairs(data, texts, p, vlm, chosen.slice_axis, crop, masks, ignore_label, flip) for p, crop, flip in parts
        )
    except UserError as error:
        raise UserError(f"{texts_file(name)}: {error}") from None
    about |= {"trained": weights != UNTRAINED, "held_out": held_out, "mask_cases": sorted(set(masks) & set(training))}
    with alone(output, rank), reading(Path(data.folders[0])):
        if rank == 0:
            write_json(config, output / "open_clip_config.json")
            if not chosen.text_model and is_hf(clip.text):
                save_text_config(clip, tokenizer, output)
            write_json(about, output / ABOUT)
        Pretraining(vlm, chosen, train_pairs, held_out_pairs, [texts[c] for c in held_out], output, device, rank).run()
    return output


def cases_with_masks(
    dataset: str, labeled_cases: list[str], settings: PretrainingSettings
) -> tuple[list[str], int | None]:
    """The labelled cases whose labels the pre-training may use, and the ignore label."""
    if not settings.mask_weight:
        return [], None
    base = dataset_folder("nnUNet_preprocessed", dataset)
    dataset_json = read_dataset_json(base)
    training = cases_of_fold(base, labeled_cases, "all" if settings.fold is None else settings.fold)
    cases = take_labeled(training, [], settings.num_labeled, dataset_json)[0]
    kept = np.random.default_rng(settings.seed).permutation(sorted(cases))[round(settings.mask_held_out * len(cases)) :]
    return kept.tolist(), dataset_json["labels"].get("ignore")


def what_it_saw(output: Path) -> str:
    """A sentence that says whose labels a pre-training used, and which trainings may use it."""
    about = read_about(output, f"remove {output} to begin again")
    if not (seen := about.get("mask_cases")):
        return "It used no label: a training of any fold may use it."
    fold, number = about["settings"].get("fold"), about["settings"].get("num_labeled")
    only = f"fold {'all' if fold is None else fold}" + ("" if number is None else f" with num_labeled={number}")
    return f"It used the labels of {len(seen)} cases: it is for trainings of {only}."


@contextmanager
def alone(output: Path, rank: int) -> Iterator[None]:
    """Make the folder, and keep other pre-trainings out of it. Under torchrun the first process does so for all.

    Raises:
        BusyError: another process pre-trains there.
        DiskError: the disk is full or read-only.
    """
    with disk_errors(output):
        if rank:
            yield
            return
        make_folder(output)
        with only_one(output / LOCK, "pre-trains this model"):
            yield


def check_goes_on(about: dict, output: Path) -> None:
    """Refuse to continue a pre-training with another model, other texts or other settings that change the result.

    Raises:
        UserError: the folder holds such a pre-training, or a damaged `vlm.json`.
    """
    if not (output / ABOUT).is_file():
        return
    before = read_about(output, f"remove {output} to begin again")
    flat = [{**a, **a.get("settings", {})} for a in (before, about)]
    keys = (about.keys() | about["settings"].keys()) - {"settings", *HARMLESS}
    if changed := sorted(key for key in keys if flat[0].get(key) != flat[1].get(key)):
        other = f"holds a pre-training with other values of {', '.join(changed)}"
        raise UserError(f"{output}: {other}: remove this folder, or choose another folder with -o")


def set_up(device: str) -> tuple[int, torch.device]:
    """The rank and the device of this process. The process joins the group that torchrun made, if any."""
    check_device(device)
    join(device)
    return Ranks().number, torch.device(device)


class Pretraining:
    """The training loop, and everything that is needed to continue it after an interruption."""

    def __init__(
        self, model: AMVLM, settings: PretrainingSettings, pairs: Pairs, held_out: Pairs, held_out_texts: list[str],
        output: Path, device: torch.device, rank: int,
    ):  # fmt: skip
        self.settings, self.output, self.device, self.rank = settings, output, device, rank
        self.task = PretrainingTask(model, settings).to(device)
        self.sampler = DistributedSampler(pairs, seed=settings.seed) if distributed.is_initialized() else None
        common = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
        common["pin_memory"] = device.type == "cuda"
        self.loader = DataLoader(pairs, shuffle=self.sampler is None, sampler=self.sampler, drop_last=True, **common)
        self.held_out, self.held_out_texts = DataLoader(held_out, **common), held_out_texts
        decayed = {True: [], False: []}
        for p in model.parameters():
            if p.requires_grad:
                decayed[p.ndim > 1].append(p)
        groups = [{"params": decayed[True], "weight_decay": settings.weight_decay}, {"params": decayed[False]}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
        steps = settings.num_epochs * math.ceil(len(self.loader) / settings.accumulation)
        warmup = min(settings.warmup, 1 - 1 / steps)
        if warmup * steps <= 1:  # OneCycleLR divides by the length of its parts minus one step
            warmup = 0.0
        self.scheduler = OneCycleLR(
            self.optimizer, settings.learning_rate, steps, pct_start=warmup, cycle_momentum=False
        )
        self.scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
        self.history: dict[str, list[float]] = {}
        self.epoch = 0

    def run(self) -> None:
        self.load()
        task = DistributedDataParallel(self.task, find_unused_parameters=True) if self.sampler else self.task
        durations = []
        while self.epoch < self.settings.num_epochs:
            start = time.perf_counter()
            try:
                means = self.train_epoch(task)
            except UserError as error:  # an error from a loader's process begins with its traceback
                raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None
            if not math.isfinite(means["loss"]):
                terms = ", ".join(name for name, value in means.items() if not math.isfinite(value) and name != "loss")
                raise UserError(
                    f"{self.output}: epoch {self.epoch + 1}: the loss is {means['loss']} (of {terms}): the"
                    " pre-training ends here: look for images with extreme intensities, or begin in another folder (-o)"
                    " with a smaller learning_rate or weight of a loss term"
                )
            self.epoch += 1
            if self.rank == 0:
                for name, value in (means | self.evaluate()).items():
                    self.history.setdefault(name, []).append(value)
                last = ", ".join(f"{name} {values[-1]:.3f}" for name, values in self.history.items())
                durations.append(time.perf_counter() - start)
                left = self.settings.num_epochs - self.epoch
                end = f"; {expected_end(durations, left, datetime.now())}" if left else ""
                print(f"epoch {self.epoch} of {self.settings.num_epochs}: {last}{end}", flush=True)
                self.save()
            if self.sampler:
                distributed.barrier()

    def train_epoch(self, task: nn.Module) -> dict[str, float]:
        self.task.train()
        if self.sampler:
            self.sampler.set_epoch(self.epoch)
            # each process has its own crops and noise
            torch.manual_seed(self.settings.seed + 1000 * self.epoch + self.rank)
        totals: dict[str, Tensor] = {}
        accumulation = self.settings.accumulation
        # None: only where there is a terminal
        bar = tqdm(self.loader, f"Epoch {self.epoch + 1}", disable=True if self.rank else None, leave=False)
        for i, batch in enumerate(bar, 1):
            given = [x.to(self.device, non_blocking=True) for x in batch]
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                terms = task(*given)
            loss = sum(terms.values())
            window = (i - 1) // accumulation * accumulation
            self.scaler.scale(loss / min(accumulation, len(self.loader) - window)).backward()
            for name, value in (terms | {"loss": loss}).items():
                totals[name] = totals.get(name, 0) + value.detach()
            if i % accumulation == 0 or i == len(self.loader):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.task.model.parameters(), 1.0)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad(set_to_none=True)
                self.scheduler.step()
                self.task.update_momentum()
        return {name: float(value) / len(self.loader) for name, value in totals.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        if not self.held_out_texts:
            return {}
        self.task.eval()
        model = self.task.model
        encoded = [[e.cls for e in model(*(x.to(self.device) for x in batch[:2]))] for batch in self.held_out]
        image, text = (torch.cat(part) for part in zip(*encoded, strict=True))
        return retrieval(image, text, self.held_out_texts)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Save the state of the pre-training.

        After the last epoch the model is written before it. A model is written only when it is finished.
        """
        if self.epoch == self.settings.num_epochs:
            save_whole(self.task.model.state_dict(), self.output / WEIGHTS)
        tensors = {f"task.{k}": v for k, v in self.task.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for i, state in optimizer["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        content = {
            "epoch": self.epoch, "history": self.history, "groups": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        save_whole(tensors, self.output / STATE, {"state": json.dumps(content)})
        plot_progress(self.history, self.output / "progress.png")

    def load(self) -> None:
        file = self.output / STATE
        if not file.is_file():
            return
        content = read_state(self.output)
        try:
            tensors = load_file(file, device=str(self.device))
            self.restore(content, tensors)
        except torch.OutOfMemoryError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{file}: cannot be read ({what}): remove {self.output} to begin again") from None

    def restore(self, content: dict, tensors: dict[str, Tensor]) -> None:
        """Continue from a saved state. A damaged state, or one of another training, raises errors of many kinds."""
        self.task.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("task.")})
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": content["groups"]})
        before, now = content["scheduler"], self.scheduler.state_dict()
        if before["total_steps"] != now["total_steps"]:  # another number of processes: an epoch has other steps
            if self.rank == 0:
                print("continues with another number of processes: other batches and random numbers than so far")
            before = now | {"last_epoch": round(before["last_epoch"] * now["total_steps"] / before["total_steps"])}
        self.scheduler.load_state_dict(before)
        self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.history = content["epoch"], content["history"]
        if self.sampler:  # each process gets a new seed in every epoch
            return
        torch.set_rng_state(tensors["random.cpu"].cpu())
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"].cpu())


def save_whole(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file completely or not at all."""
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    with written_whole(file) as temporary:
        temporary.write_bytes(content)


def plot_progress(history: dict[str, list[float]], file: Path) -> None:
    """Plot two panels over the epochs: the loss with its terms, and how well images and texts find each other."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, title in zip(figure.subplots(1, 2), ("loss", "recall"), strict=True):
        for name, values in history.items():
            if ("recall" in name) == (title == "recall"):
                ax.plot(range(1, len(values) + 1), values, label=name)
        ax.set(title=title, xlabel="epoch")
        if ax.lines:
            ax.legend(fontsize=7)
    with written_whole(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
