"""Labels from text masks, if the masks have found the labels of labelled cases."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunet_semiseg.vlm.gate import STEPS, Example, evidence, measure, with_evidence


class TextLabels:
    """Makes probabilities from text masks. Masks that find the labels of labelled cases too badly are not used.

    Args:
        n_classes: the number of masks of an image, K.
        kind: how masks are used, as the setting `mask_labels`.
        gate: how well masks must find the labels, as the setting `mask_gate`.
        label_manager: the `LabelManager` of nnU-Net.

    Attributes:
        state: what was measured, on the CPU. A resumed training needs it. `mask_used` (K,) is 1 where masks are used;
            `mask_threshold` (K,); `mask_evidence` (K, 65).
    """

    def __init__(self, n_classes: int, kind: str, gate: float, label_manager):
        self.kind, self.gate, self.label_manager = kind, gate, label_manager
        self.state = {
            "mask_used": torch.zeros(n_classes),
            "mask_threshold": torch.full((n_classes,), 0.5),
            "mask_evidence": torch.zeros(n_classes, STEPS),
        }
        if gate == 0:
            self.state["mask_used"].fill_(1)

    def __call__(self, masks: Tensor, has_text: Tensor, taught: Tensor) -> Tensor | None:
        """Make probabilities (N, heads, H, W) from the text masks. None if no class has good masks.

        The teacher's probabilities are used for images without a text and for classes whose masks are not used.

        Args:
            masks: (N, K, H, W); has_text: (N,); taught: the teacher's probabilities (N, heads, H, W).
        """
        used, thresholds = (self.state[name].tolist() for name in ("mask_used", "mask_threshold"))
        if not any(used):
            return None
        if self.kind == "hard":
            masks = torch.stack([mask > t for mask, t in zip(masks.unbind(1), thresholds, strict=True)], 1).float()
        of_teacher = taught if self.label_manager.has_regions else taught[:, 1:]
        if self.kind == "evidence":
            tables = self.state["mask_evidence"].to(masks, non_blocking=True)
            of_classes = zip(of_teacher.unbind(1), masks.unbind(1), tables, strict=True)
            masks = torch.stack([with_evidence(p, mask, table) for p, mask, table in of_classes], 1)
        pairs = zip(masks.unbind(1), of_teacher.unbind(1), used, strict=True)
        masks = torch.stack([mask if use else teacher for mask, teacher, use in pairs], 1)
        return torch.where(has_text.view(-1, 1, 1, 1), with_background(masks, self.label_manager), taught)

    def measure(self, masks: Sequence[np.ndarray], examples: Sequence[Example], names: Sequence[str]) -> str:
        """Measure the text masks on labelled training cases. Returns which are used, for the log.

        Args:
            masks: the masks (K, H, W) of each example.
            names: the names of the classes or regions.
        """
        gate, said = self.gate, []
        for k, name in enumerate(names) if masks else ():
            labels, known = [e.labels[k] for e in examples], [e.known for e in examples]
            quality = measure([mask[k] for mask in masks], labels, known)
            use = gate == 0 or quality.area >= gate
            self.state["mask_used"][k], self.state["mask_threshold"][k] = use, quality.threshold
            table = evidence([mask[k] for mask in masks], labels, known)
            self.state["mask_evidence"][k] = torch.from_numpy(table)
            unused = "no labelled case shows it" if np.isnan(quality.area) else f"below {gate}"
            what = f"used above {quality.threshold:.2f}, Dice {quality.dice:.2f}" if use else f"{unused}: not used"
            said.append(f"{name} {quality.area:.2f} ({what})")
        nothing = (
            "no labelled case has a text, so the masks are not used;"
            " to use them anyway, --set mask_gate=0 mask_labels=soft"
        )
        return ", ".join(said) or (nothing if gate else "")


def with_background(masks: Tensor, label_manager) -> Tensor:
    """Make the probabilities for nnU-Net's heads from the masks of the classes. The background is prod_k (1 - m_k).

    Args:
        masks: (B, K, H, W), in 0 to 1.

    Returns:
        (B, K + 1, H, W) with a sum of 1. For regions there is no head for the background, and the masks are returned.
    """
    if label_manager.has_regions:
        return masks
    p = torch.cat(((1 - masks).prod(1, keepdim=True), masks), 1)
    return p / p.sum(1, keepdim=True).clamp_min(1e-6)
