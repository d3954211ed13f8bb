"""Class embeddings F_t (K, d) that can be learned. They come from prompts and a frozen text tower, or from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.text.encoder import TextTower, load_text_tower
from nnunet_semiseg.text.open_clip_models import TEXT_OPTIONS
from nnunet_semiseg.text.prompts import read_prompts
from nnunet_semiseg.text.static_words import WordTower


class PromptLearner(nn.Module):
    """Learnable context tokens before the prompts of each class, as in CoOp (Zhou et al., IJCV 2022).

    ``forward() -> (K, d)``, float32 even under autocast, with rows of length 1. All prompts of a class share its
    context tokens. The features of its prompts are normalised, averaged, and normalised again.

    The context tokens are the only parameters and the only state of this module. A checkpoint holds no copy of the
    tower, because the tower's weights can be loaded again. If this module is moved to a device, the tower moves, too.

    Args:
        tower: the frozen text tower. A `WordTower` averages context and words, so there the context only adds an
            offset.
        prompts: for each class its prompts, in the order of the K classes.
        n_ctx: the number of context tokens of a class. With 0 the prompts are used as they are.
        source: how messages name the file with the prompts.

    Raises:
        UserError: a prompt with its context tokens is longer than the tower allows.
    """

    def __init__(
        self,
        tower: TextTower | WordTower,
        prompts: dict[str, tuple[str, ...]],
        n_ctx: int = 4,
        source: str = "dataset.json",
    ):
        super().__init__()
        self._tower = (tower,)  # in a tuple, because nn.Module would register it otherwise
        self.trained = tower.trained
        owner = [k for k, texts in enumerate(prompts.values()) for _ in texts]
        try:
            ids = tower.tokenize([text for texts in prompts.values() for text in texts], n_ctx)
        except UserError as error:
            fewer = f", or learn fewer context tokens than {n_ctx} with --set n_ctx=NUMBER" if n_ctx else ""
            raise UserError(f"{source}: prompt {error}{fewer}") from None
        embeddings = tower.embed_tokens(ids).detach()
        one_hot = F.one_hot(torch.tensor(owner), len(prompts)).T.float()
        device = embeddings.device
        ctx = torch.empty(len(prompts), n_ctx, tower.width, device=device)
        self.ctx = nn.Parameter(nn.init.normal_(ctx, std=0.02))
        self.register_buffer("ids", ids.to(device), persistent=False)
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("owner", torch.tensor(owner, device=device), persistent=False)
        self.register_buffer("mean", (one_hot / one_hot.sum(1, keepdim=True)).to(device), persistent=False)
        with torch.no_grad():
            self.feature_shape: tuple[int, int] = tuple(self().shape)

    @property
    def tower(self) -> TextTower | WordTower:
        return self._tower[0]

    def forward(self) -> Tensor:
        start, n_ctx = self.tower.tokenize.start, self.ctx.shape[1]
        before, after = self.embeddings[:, :start], self.embeddings[:, start + n_ctx :]
        with torch.autocast(self.ctx.device.type, enabled=False):
            spliced = torch.cat([before, self.ctx[self.owner], after], dim=1)
            features = F.normalize(self.tower(spliced, self.ids), dim=-1)
            return F.normalize(self.mean @ features, dim=-1)

    def _apply(self, fn, recurse=True):
        self.tower._apply(fn)
        return super()._apply(fn, recurse)


class EmbeddingLearner(nn.Module):
    """Class embeddings from a file, with a learnable offset.

    ``forward() -> (K, d) = normalize(E + offset)``. The offset is zero at first.

    Args:
        embeddings: E, (K, d). Its rows are normalised first, so that a step of the offset has the same effect for all
            files.
        trained: False if the embeddings were made by a tower with random weights.
    """

    def __init__(self, embeddings: Tensor, trained: bool = True):
        super().__init__()
        self.trained = trained
        self.feature_shape: tuple[int, int] = tuple(embeddings.shape)
        self.register_buffer("embeddings", F.normalize(embeddings.float(), dim=-1), persistent=False)
        self.offset = nn.Parameter(torch.zeros_like(self.embeddings))

    def forward(self) -> Tensor:
        return F.normalize(self.embeddings + self.offset, dim=-1)


def build_prompt_learner(
    settings, dataset_json: dict, source: str = "dataset.json"
) -> PromptLearner | EmbeddingLearner:
    """Make the learner that the settings ask for.

    Args:
        settings: has ``text_model``, ``text_pretrained``, ``text_cache_dir`` (see
            :func:`~nnunet_semiseg.text.encoder.load_text_tower`), ``n_ctx``, and ``text_embeddings``: None, or a file
            of :func:`embed_prompts`, which makes an `EmbeddingLearner` without a text encoder.
        dataset_json: the content of ``dataset.json``.
        source: how messages name that file.

    Raises:
        UserError: the prompts are wrong, or weights or embeddings cannot be loaded.
    """
    prompts = read_prompts(dataset_json, source)
    if settings.text_embeddings:
        return EmbeddingLearner(*_read_embeddings(settings.text_embeddings, prompts))
    tower = load_text_tower(settings.text_model, settings.text_pretrained, settings.text_cache_dir)
    refuse_same_words(tower, prompts, source)
    return PromptLearner(tower, prompts, settings.n_ctx, source)


def refuse_same_words(tower: TextTower | WordTower, prompts: dict[str, tuple[str, ...]], source: str) -> None:
    """Refuse two classes whose prompts have the same words in another order, if the encoder ignores the order.

    Raises:
        UserError: there are two such classes. The message names them.
    """
    if tower.knows_order:
        return
    seen: dict[tuple, str] = {}
    for name, texts in prompts.items():
        words = tuple(sorted(tuple(row.sort().values.tolist()) for text in texts for row in tower.tokenize([text])))
        if words in seen:
            raise UserError(
                f'{source}: the prompts of "{seen[words]}" and "{name}" have the same words, and wordllama does not'
                " know their order: use other words, or another text encoder"
            )
        seen[words] = name


def embed_prompts(
    dataset_json: dict,
    model: str,
    pretrained: str | None,
    cache_dir: str | None,
    output: str | Path,
    source: str = "dataset.json",
    options: Mapping[str, str] = TEXT_OPTIONS,
) -> bool:
    """Write the features F_t of the plain prompts, for a computer that cannot load the encoder's weights.

    Args:
        dataset_json: the content of ``dataset.json``.
        model, pretrained, cache_dir, options: see :func:`~nnunet_semiseg.text.encoder.load_text_tower`.
        output: the file to write (`save_embeddings`).
        source: how messages name the file with the prompts.

    Returns:
        Whether the tower's weights are trained.

    Raises:
        UserError: the prompts are wrong; weights cannot be loaded; the output cannot be written.
    """
    prompts = read_prompts(dataset_json, source)
    _check_folder(output)  # before the download
    tower = load_text_tower(model, pretrained, cache_dir, options)
    refuse_same_words(tower, prompts, source)
    with torch.no_grad():
        embeddings = PromptLearner(tower, prompts, 0, source)()
    save_embeddings(output, embeddings, prompts, f"{model} {pretrained}", tower.trained)
    return tower.trained


def save_embeddings(
    path: str | Path,
    embeddings: Tensor,
    prompts: dict[str, tuple[str, ...]],
    model: str,
    trained: bool = True,
) -> None:
    """Write (K, d) embeddings to a safetensors file. Its metadata, as JSON, has classes, prompts, model and trained.

    The file is written completely or not at all.

    Raises:
        UserError: the folder does not exist, or cannot be written to.
    """
    from safetensors.torch import save_file

    _check_folder(path)
    about = {"classes": list(prompts), "prompts": list(prompts.values()), "model": model, "trained": trained}
    unfinished = f"{path}.{os.getpid()}.tmp"
    tensors = {"embeddings": embeddings.detach().float().cpu().contiguous()}
    try:
        save_file(tensors, unfinished, metadata={k: json.dumps(v) for k, v in about.items()})
        os.replace(unfinished, path)
    except Exception as e:
        Path(unfinished).unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e}): choose another file with -o FILE") from None


def load_embeddings(path: str | Path, prompts: dict[str, tuple[str, ...]]) -> Tensor:
    """Read the (K, d) float32 embeddings from a file of :func:`save_embeddings`.

    Raises:
        UserError: the file is missing, unreadable, or made for other classes or prompts.
    """
    return _read_embeddings(path, prompts)[0]


def _read_embeddings(path: str | Path, prompts: dict[str, tuple[str, ...]]) -> tuple[Tensor, bool]:
    from safetensors import safe_open

    fix = f"make it with `nnunet_semiseg embed_prompts -d ID -o {path}`"
    if not Path(path).is_file():
        raise UserError(f"text_embeddings={path}: no such file: {fix}")
    try:
        with safe_open(path, framework="pt") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            embeddings, classes = file.get_tensor("embeddings").float(), about["classes"]
            made_for = dict(zip(classes, map(tuple, about["prompts"]), strict=True))
    except Exception as e:
        raise UserError(f"text_embeddings={path}: not a readable file of embeddings ({e}): {fix}") from None
    if classes != list(prompts):
        raise UserError(
            f"text_embeddings={path}: made for the classes {', '.join(classes)}, but the data set has "
            f"{', '.join(prompts)}: {fix}"
        )
    other = [name for name in classes if made_for[name] != tuple(prompts[name])]
    if other:
        raise UserError(
            f"text_embeddings={path}: made with other prompts for {', '.join(other)} "
            f"({json.dumps(made_for[other[0]])}, now {json.dumps(prompts[other[0]])}): {fix}"
        )
    if embeddings.ndim != 2 or len(embeddings) != len(classes) or not embeddings.isfinite().all():
        raise UserError(f"text_embeddings={path}: must have one row of finite numbers for each class: {fix}")
    return embeddings, about.get("trained", True)


def _check_folder(path: str | Path) -> None:
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}: make it, or choose another file with -o FILE")
