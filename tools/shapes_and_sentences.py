"""Make a synthetic 2d data set with sentences for training, and a small untrained model to pre-train on it.

    python tools/shapes_and_sentences.py WORK [--pairs 400] [--labeled 40] [--test 100] [--faint] [--shuffled]

It writes WORK/raw/Dataset520_Sentences. An image has one to three lesions of two shapes, in its quadrants, and other
objects that are not lesions. texts.json has a sentence for each image except the test images, such as "two lesions: a
round one at the upper left, a long one at the lower right". WORK/towers is a small model of open_clip (an image and a
text network) without weights. With `--faint` the noise is stronger and lesions are fainter. `--shuffled` is the
control: it writes the same images as Dataset521_Shuffled, each with the sentence of another image. docs/results.md has
the commands that use them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from skimage.io import imsave

SIZE = 64
QUADRANTS = {"upper left": (-1, -1), "upper right": (-1, 1), "lower left": (1, -1), "lower right": (1, 1)}
SHAPES = {"round": (1.0, 1.0), "long": (1.9, 0.55)}
NUMBERS = {1: "one lesion", 2: "two lesions", 3: "three lesions"}


def ellipse(center, radii, angle) -> np.ndarray:
    y, x = np.indices((SIZE, SIZE))
    dy, dx = y - center[0], x - center[1]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, -np.sin(angle) * dx + np.cos(angle) * dy
    return (u / radii[0]) ** 2 + (v / radii[1]) ** 2 < 1


def make_pair(rng: np.random.Generator, faint: bool = False) -> tuple[np.ndarray, np.ndarray, str]:
    """Make an image, its label and its sentence.

    Objects that are not lesions are smaller. On average they are as bright as lesions; with `faint` they are brighter.
    """
    noise, contrast = (30, (15, 45)) if faint else (8, (40, 70))
    image = np.full((SIZE, SIZE), 90.0) + noise * rng.standard_normal((SIZE, SIZE))
    label = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(4):
        image[ellipse(rng.uniform(4, SIZE - 4, 2), rng.uniform(1.5, 2.5, 2), 0)] += rng.uniform(40, 70)
    chosen = [list(QUADRANTS)[i] for i in sorted(rng.permutation(4)[: rng.integers(1, 4)])]
    parts = []
    for quadrant in chosen:
        shape = str(rng.choice(list(SHAPES)))
        center = SIZE / 2 + np.multiply(QUADRANTS[quadrant], rng.uniform(11, 20, 2))
        inside = ellipse(center, rng.uniform(5, 7) * np.array(SHAPES[shape]), rng.uniform(0, np.pi))
        image[inside] += rng.uniform(*contrast)
        label[inside] = 1
        parts.append(f"a {shape} one at the {quadrant}")
    return image.clip(0, 255).astype(np.uint8), label, f"{NUMBERS[len(chosen)]}: {', '.join(parts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "work",
        type=Path,
        metavar="WORK",
        help="folder to write: the data set, and the configuration of a small untrained open_clip model",
    )
    parser.add_argument("--pairs", type=int, default=400, help="number of training images; default: %(default)s")
    parser.add_argument(
        "--labeled", type=int, default=40, help="number of training images that keep their labels; default: %(default)s"
    )
    parser.add_argument("--test", type=int, default=100, help="number of test images; default: %(default)s")
    parser.add_argument("--faint", action="store_true", help="make the noise strong and the lesions faint")
    parser.add_argument(
        "--shuffled", action="store_true", help="write the control: each image with the sentence of another one"
    )
    args = parser.parse_args()
    raw = args.work / "raw" / ("Dataset521_Shuffled" if args.shuffled else "Dataset520_Sentences")
    for folder in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsTs"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    texts = {}
    for i in range(args.pairs + args.test):
        image, label, text = make_pair(np.random.default_rng([520, i]), args.faint)
        part = "Tr" if i < args.labeled else "Un" if i < args.pairs else "Ts"
        case = f"pair_{i:04d}"
        imsave(raw / f"images{part}" / f"{case}_0000.png", image, check_contrast=False)
        if part != "Un":
            imsave(raw / f"labels{part}" / f"{case}.png", label, check_contrast=False)
        if part != "Ts":
            texts[case] = text
    if args.shuffled:  # each text moves on by one
        texts = dict(zip(texts, [*list(texts.values())[1:], texts["pair_0000"]], strict=True))
    (raw / "texts.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
    content = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "lesion": 1}}
    content |= {"numTraining": args.labeled, "file_ending": ".png"}
    content["semiseg"] = {"prompts": {"lesion": ["a lesion"]}}
    (raw / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    model = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 96, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1},
    }
    (args.work / "towers").mkdir(exist_ok=True)
    (args.work / "towers" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))


if __name__ == "__main__":
    main()
