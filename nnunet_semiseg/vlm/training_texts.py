"""The texts of a training, encoded: one for each case, or the prompts of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_semiseg.vlm.sides import Flip, NamedSides
from nnunet_semiseg.vlm.text_mask_generator import TextMaskGenerator


class CaseTexts:
    """A text for each case. A text mask shows where an image has what its text says.

    Args:
        generator: makes text masks and encodes texts.
        own: the texts of the unlabelled cases.
        labeled: the texts of the labelled cases.
        sides: which flips exchange words. Each text is encoded as it is, and as it is after each of these flips.
        number: how many texts each image is compared with in the loss.
    """

    n_classes = 1

    def __init__(
        self,
        generator: TextMaskGenerator,
        own: Mapping[str, str],
        labeled: Mapping[str, str],
        sides: NamedSides,
        number: int,
    ):
        self.generator, self.number = generator, number
        self.texts = sorted({*own.values(), *labeled.values()})
        row = {text: i for i, text in enumerate(self.texts)}
        self.row = {case: row[text] for case, text in own.items()}
        self.labeled_row = {case: row[text] for case, text in labeled.items()}
        self.features = {flip: generator.encode_texts(sides.exchange(self.texts, flip)) for flip in sides.flips}

    def masks(self, images: Tensor, cases: list[str], flip: Flip) -> tuple[Tensor, Tensor, Tensor]:
        """Make the text masks (N, classes, H, W) of 2d images.

        Also returns which images have a text, (N,), and the loss of the text mask generator.
        """
        known, generator = [i for i, case in enumerate(cases) if case in self.row], self.generator
        all_texts = self.features[flip]
        raw, masks, features = generator(images, all_texts[[self.row.get(case, 0) for case in cases]][:, None])
        has_text = torch.tensor([case in self.row for case in cases]).to(images.device, non_blocking=True)
        if not known:
            return masks, has_text, raw.new_zeros(())
        rows = [self.row[cases[i]] for i in known]
        drawn = self.draw(rows)
        own = torch.tensor([drawn.index(row) for row in rows]).to(images.device, non_blocking=True)
        return masks, has_text, generator.loss_between_images(features[known], all_texts[drawn], own)

    def draw(self, rows: list[int]) -> list[int]:
        """Choose texts: those of the batch, and random other ones, up to `number` in all. Returns their numbers."""
        own = set(rows)
        others = [i for i in torch.randperm(len(self.texts)).tolist() if i not in own]
        return [*sorted(own), *others[: max(self.number - len(own), 0)]]

    def of_labeled(self, case: str) -> Tensor:
        """The features (1, d) of the text of a labelled case."""
        return self.features[False, False][[self.labeled_row[case]]]


class ClassTexts:
    """The prompts of the classes, the same for all cases. There is a text mask for each class.

    Args:
        generator: makes text masks and encodes texts.
        prompts: the texts of each class. The first class is the background.
    """

    def __init__(self, generator: TextMaskGenerator, prompts: Sequence[Sequence[str]]):
        self.generator, self.n_classes = generator, len(prompts) - 1
        features = [generator.encode_texts(list(texts)).mean(0) for texts in prompts]
        self.features = F.normalize(torch.stack(features), dim=1)

    def masks(self, images: Tensor, cases: list[str], flip: Flip) -> tuple[Tensor, Tensor, Tensor]:
        """Make the text masks, as `CaseTexts.masks` does. All cases have the same texts, and no flip changes them."""
        texts, background = self.features[1:], self.features[0]
        raw, masks, features = self.generator(images, texts.expand(len(images), -1, -1))
        loss = self.generator.loss_between_classes(features, raw, texts, background)
        return masks, torch.ones(len(images), dtype=torch.bool, device=images.device), loss

    def of_labeled(self, case: str) -> Tensor:
        """The features (K, d) of the texts of a labelled case."""
        return self.features[1:]
