"""`nnunet_semiseg pretrain_vlm`: AMVLM's vision-language pre-training on a dataset's images and texts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from nnunet_semiseg.config import parse_assignments, require, settings_from
from nnunet_semiseg.data.texts import read_texts
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import dataset_folder, read_json, write_json
from nnunet_semiseg.text.open_clip_models import UNTRAINED, load_clip, model_config
from nnunet_semiseg.training.random_state import seed_everything
from nnunet_semiseg.vlm import losses
from nnunet_semiseg.vlm.model import AMVLM
from nnunet_semiseg.vlm.pairs import Pairs, open_cases
from nnunet_semiseg.vlm.text_masks import ABOUT, WEIGHTS

DEFAULT_MODEL = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
OPTIONS = {"model": "--model ", "pretrained": "--model MODEL:", "cache_dir": "--set cache_dir="}
STATE = "training_state"
RECALLS = (1, 5)


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings:
    """Of `pretrain_vlm`; the weights are those of L = L_itc + 0.5 L_CSS + 0.1 L_local + 0.1 L_ICL."""

    num_epochs: int = 30
    batch_size: int = 32
    """of a process; what is contrasted with each other"""
    accumulation: int = 1
    """batches a step"""
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    """share of the training over which the learning rate rises; then it falls (torch's OneCycleLR)"""
    temperature: float = 0.07
    momentum: float = 0.995
    dim: int = 128
    hidden: int = 2048
    itc_weight: float = 1.0
    css_weight: float = 0.5
    local_weight: float = 0.1
    icl_weight: float = 0.1
    held_out: float = 0.1
    """share of the cases that retrieval is measured on"""
    crop: float = 0.9
    """least share of height and width that the random crop of a training image keeps; 1: no crop"""
    slice_axis: int = 0
    """of 3d volumes, after nnU-Net's transposition"""
    missing_texts: Literal["error", "skip"] = "error"
    cache_dir: str | None = None
    num_workers: int = 4
    seed: int = 0

    def __post_init__(self):
        for name in ("num_epochs", "accumulation", "dim", "hidden"):
            require(self, name, minimum=1)
        require(self, "batch_size", minimum=2)
        for name in ("learning_rate", "temperature"):
            require(self, name, minimum=1e-12)
        for name in ("weight_decay", "itc_weight", "css_weight", "local_weight", "icl_weight", "num_workers", "seed"):
            require(self, name, minimum=0)
        for name in ("warmup", "momentum", "crop"):
            require(self, name, minimum=0, maximum=1)
        require(self, "held_out", minimum=0, maximum=0.9)
        require(self, "slice_axis", minimum=0, maximum=2)


# ---------------------------------------------------------------------------------------------------------------- loss


class PretrainingTask(nn.Module):
    """What one step computes: the model, its momentum copy, and the weighted terms of the loss.

    The momentum copy gives the keys of L_itc; all other terms are of the online model, which every gradient reaches.
    """

    def __init__(self, model: AMVLM, settings: PretrainingSettings):
        super().__init__()
        self.model, self.settings = model, settings
        self.momentum = deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PretrainingTask:
        super().train(mode)
        self.momentum.eval()
        return self

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        s, t = self.settings, self.settings.temperature
        image, text = self.model(images, ids)
        with torch.no_grad():
            image_key, text_key = self.momentum(images, ids)
        image_cls, text_cls = gather(image.cls), gather(text.cls)
        terms = {}
        if s.itc_weight:
            to_text, to_image = image_cls @ gather(text_key.cls).T, text_cls @ gather(image_key.cls).T
            terms["itc"] = s.itc_weight * (losses.one_way(to_text, t) + losses.one_way(to_image, t)) / 2
        if s.local_weight:
            local = losses.local_contrast(image.tokens, image.valid, text.cls, t)
            local = local + losses.local_contrast(text.tokens, text.valid, image.cls, t)
            terms["local"] = s.local_weight * local / 2
        if s.css_weight or s.icl_weight:
            image_of, text_of = (
                self.model.distribution(name, encoding.cls, encoding.tokens, encoding.valid)
                for name, encoding in (("image", image), ("text", text))
            )
        if s.css_weight:
            css = self.supervision("image", image, text, image_of[1])
            css = css + self.supervision("text", text, image, text_of[1])
            terms["css"] = s.css_weight * css / 2
        if s.icl_weight:
            icl = losses.distribution_contrast(*(tuple(map(gather, of[0])) for of in (image_of, text_of)), t)
            for encoding, of in ((image, image_of), (text, text_of)):
                icl = icl + losses.intra_modal_contrast(encoding.cls, losses.draw(of[1]), encoding.valid, t)
            terms["icl"] = s.icl_weight * icl
        return terms

    def supervision(self, name: str, own, other, distribution) -> Tensor:
        """L_CSS of one modality's tokens and what they find in the other."""
        t = self.settings.temperature
        found = losses.counterparts(own.tokens, other.tokens, other.valid, t)
        found_of = self.model.distribution(name, other.cls, found, own.valid)[1]
        attention = torch.einsum("bld,bd->bl", own.tokens, own.cls) / t
        attention = attention.masked_fill(~own.valid, -torch.inf).softmax(1)
        weights = losses.token_weights(attention, own.valid)
        return losses.similarity_supervision(own.tokens, found, distribution, found_of, weights, own.valid, t)

    @torch.no_grad()
    def update_momentum(self) -> None:
        average = get_ema_multi_avg_fn(self.settings.momentum)
        average(list(self.momentum.parameters()), list(self.model.parameters()), None)


def gather(x: Tensor) -> Tensor:
    """Of all processes, with gradients."""
    if not distributed.is_initialized():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


@torch.no_grad()
def retrieval(image: Tensor, text: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Share of queries whose partner is among the first k, image to text and text to image.

    Args:
        image, text: CLS (N, d), normalised, of N pairs.
        texts: a pair with the same text as the query's is as right as its own, and no rival.
    """
    similarity = image @ text.T
    number = torch.from_numpy(np.unique(texts, return_inverse=True)[1]).to(image.device)
    same = number[:, None] == number
    result = {}
    for name, s in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        best = s.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        rivals = ((s > best) & ~same).sum(1)
        result |= {f"{name}_recall@{k}": float((rivals < k).float().mean()) for k in RECALLS}
    return result


# ------------------------------------------------------------------------------------------------------------ training


def pretrain(
    dataset: int | str,
    model: str = DEFAULT_MODEL,
    output: str | Path | None = None,
    settings: Iterable[str] = (),
    *,
    configuration: str = "2d",
    plans: str = "nnUNetSemiSegPlans",
    device: str = "cuda",
) -> Path:
    """Pre-train on the images and texts of a dataset; under torchrun on several GPUs. Interrupted, it goes on.

    Args:
        model: `hf-hub:OWNER/NAME`, `NAME:TAG` of open_clip's or a folder (`PATH`, or `PATH:none` for an untrained one).
        output: default `vlm/CONFIGURATION` below the dataset's results.
        settings: `KEY=VALUE`, of `PretrainingSettings`.

    Returns:
        The folder: `vlm.safetensors` and `vlm.json` (what `AMVLMTrainer` loads), the state of the training,
        `progress.png`.

    Raises:
        UserError: wrong settings, texts or model; a folder that holds another pre-training.
    """
    chosen = settings_from(PretrainingSettings, parse_assignments(settings))
    name = dataset_folder("nnUNet_preprocessed", dataset).name
    data, _ = open_cases(name, plans, configuration)
    texts = read_texts(name, data.identifiers, chosen.missing_texts)
    if output is None:
        output = dataset_folder("nnUNet_results", dataset) / "vlm" / configuration
    output = Path(output).absolute()
    about = {"model": model, "dataset": name, "configuration": configuration, "plans": plans}
    about["settings"] = asdict(chosen)
    if (output / ABOUT).is_file():
        before = read_json(output / ABOUT, "remove the folder")
        if any(before[key] != about[key] for key in about):
            raise UserError(f"{output}: holds a pre-training with other settings: remove it, or choose another with -o")

    rank, device = set_up(device)
    seed_everything(chosen.seed)
    base, weights = split_model(model)
    clip, tokenizer = load_clip(base, weights, chosen.cache_dir, OPTIONS)
    vlm = AMVLM(clip, tokenizer, chosen.dim, chosen.hidden)
    cases = np.random.default_rng(chosen.seed).permutation(sorted(texts)).tolist()
    n_held_out = round(chosen.held_out * len(cases))
    held_out, training = cases[:n_held_out], cases[n_held_out:]
    if len(training) // int(os.environ.get("WORLD_SIZE", 1)) < chosen.batch_size:
        few = f"{len(training)} pairs are too few for batches of {chosen.batch_size}"
        raise UserError(f"{few}: --set batch_size=NUMBER")
    parts = [(training, chosen.crop), (held_out, None)]
    try:
        train_pairs, held_out_pairs = (Pairs(data, texts, p, vlm, chosen.slice_axis, crop) for p, crop in parts)
    except UserError as error:
        raise UserError(f"texts.json of {name}: {error}") from None
    about |= {"trained": weights != UNTRAINED, "held_out": held_out}
    if rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_json(model_config(base, clip), output / "open_clip_config.json")
        write_json(about, output / ABOUT)
    Pretraining(vlm, chosen, train_pairs, held_out_pairs, [texts[c] for c in held_out], output, device, rank).run()
    return output


def split_model(model: str) -> tuple[str, str | None]:
    """`NAME:TAG` to name and tag; what has no tag brings its own weights."""
    if model.startswith(("hf-hub:", "local-dir:")) or ":" not in model:
        return model, None
    name, _, tag = model.rpartition(":")
    return name, tag


def set_up(device: str) -> tuple[int, torch.device]:
    """This process's rank and device; joins the group that torchrun made."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("-device cuda: there is no GPU: use -device cpu")
    if "LOCAL_RANK" not in os.environ:
        return 0, torch.device(device)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return distributed.get_rank(), torch.device(device)


class Pretraining:
    """The loop, and all that it needs to go on after an interruption."""

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
        self.scheduler = OneCycleLR(
            self.optimizer, settings.learning_rate, steps, pct_start=settings.warmup, cycle_momentum=False
        )
        self.scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
        self.history: dict[str, list[float]] = {}
        self.epoch = 0

    def run(self) -> None:
        self.load()
        task = DistributedDataParallel(self.task, find_unused_parameters=True) if self.sampler else self.task
        while self.epoch < self.settings.num_epochs:
            means = self.train_epoch(task)
            self.epoch += 1
            if self.rank == 0:
                for name, value in (means | self.evaluate()).items():
                    self.history.setdefault(name, []).append(value)
                last = ", ".join(f"{name} {values[-1]:.3f}" for name, values in self.history.items())
                print(f"epoch {self.epoch} of {self.settings.num_epochs}: {last}", flush=True)
                self.save()
            if self.sampler:
                distributed.barrier()

    def train_epoch(self, task: nn.Module) -> dict[str, float]:
        self.task.train()
        if self.sampler:
            self.sampler.set_epoch(self.epoch)
        totals: dict[str, Tensor] = {}
        bar = tqdm(self.loader, desc=f"epoch {self.epoch + 1}", disable=self.rank > 0, leave=False)
        for i, batch in enumerate(bar, 1):
            images, ids = (x.to(self.device, non_blocking=True) for x in batch)
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                terms = task(images, ids)
            loss = sum(terms.values())
            self.scaler.scale(loss / self.settings.accumulation).backward()
            for name, value in (terms | {"loss": loss}).items():
                totals[name] = totals.get(name, 0) + value.detach()
            if i % self.settings.accumulation == 0 or i == len(self.loader):
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
        encoded = [[e.cls for e in model(*(x.to(self.device) for x in batch))] for batch in self.held_out]
        image, text = (torch.cat(part) for part in zip(*encoded, strict=True))
        return retrieval(image, text, self.held_out_texts)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """The state comes last but one, and its description last: a kill in between leaves the epoch before."""
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
        save_whole(tensors, self.output / f"{STATE}.safetensors", {"state": json.dumps(content)})
        draw_progress(self.history, self.output / "progress.png")

    def load(self) -> None:
        file = self.output / f"{STATE}.safetensors"
        if not file.is_file():
            return
        from safetensors import safe_open

        with safe_open(str(file), "pt") as opened:
            content = json.loads(opened.metadata()["state"])
        tensors = load_file(file, device=str(self.device))
        self.task.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("task.")})
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": content["groups"]})
        self.scheduler.load_state_dict(content["scheduler"])
        self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.history = content["epoch"], content["history"]
        if self.rank:  # the state is that of the first process
            torch.manual_seed(self.settings.seed + 1000 * self.epoch + self.rank)
            return
        torch.set_rng_state(tensors["random.cpu"].cpu())
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"].cpu())


def save_whole(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))
    os.replace(temporary, file)


def draw_progress(history: dict[str, list[float]], file: Path) -> None:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, title in zip(figure.subplots(1, 2), ("loss", "recall"), strict=True):
        for name, values in history.items():
            if ("recall" in name) == (title == "recall"):
                ax.plot(range(1, len(values) + 1), values, label=name)
        ax.set(title=title, xlabel="epoch")
        if ax.lines:
            ax.legend(fontsize=7)
    figure.savefig(file, dpi=120)
