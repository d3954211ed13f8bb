"""Measure what the texts of busi_small, a set of tools/yardstick.py, are worth.

    python tools/words.py pretrain --data DATA --work WORK --towers true
    python tools/words.py measure --data DATA --work WORK --towers true
    python tools/yardstick.py --data DATA --work WORK --sets busi_small --trainers AMVLMTrainer
        --name true --set vlm=WORK/vlm/true

The first command pre-trains an image and a text network (towers), the second measures them, the third trains with them.
WORK must be an absolute path in the third command. The control is the same with texts of other images: `--towers
shuffled`, and in the third command `--sets busi_shuffled --name shuffled --set vlm=WORK/vlm/shuffled`. Towers that know
nothing are another control: `--towers random` does not train them.

The sentences of this set were made from its masks, so they say more than a report would. Each pre-training uses the
labels of three quarters of the labelled cases, except `--towers random`, which uses none. `measure` prints
how well held-out images and texts find each other, and how well the masks match the labels: the area under the ROC
curve and the Dice at the best threshold, with the own text and with the text of another case.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from yardstick_sets import PLANS, SETS, dataset_name, prepare

TOWERS = {
    "true": ("busi_small", []),
    "shuffled": ("busi_shuffled", []),
    "random": ("busi_small", ["num_epochs=1", "learning_rate=1e-12", "mask_weight=0"]),
}
"""For each kind of towers, the set with the texts that they are trained with, and other settings."""
SETTINGS = {"text_model": "wordllama", "num_epochs": 40, "batch_size": 32, "learning_rate": 1e-3, "hidden": 512}
IMAGES = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear", "image_size": 128}
"""The smallest ResNet of timm, untrained. It needs 0.6 s for a step on one core."""
NO_TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}


def pretrain_towers(work: Path, towers: str, labels: str, changes: list[str]) -> Path:
    """Pre-train towers, or continue to do so. Returns their folder."""
    from nnunet_semiseg.vlm.pretraining import pretrain

    (name, others), tower = TOWERS[towers], work / "image_tower"
    tower.mkdir(exist_ok=True)
    config = {"model_cfg": {"embed_dim": 128, "vision_cfg": IMAGES, "text_cfg": NO_TEXT}, "preprocess_cfg": {}}
    (tower / "open_clip_config.json").write_text(json.dumps(config))
    settings = dict(word.split("=", 1) for word in (*others, *changes))
    assignments = [f"{key}={value}" for key, value in (SETTINGS | {"num_workers": 0} | settings).items()]
    return pretrain(
        dataset_name(name, labels), f"{tower}:none", work / "vlm" / towers, assignments,
        configuration=SETS[name].configuration, plans=PLANS, device="cpu",
    )  # fmt: skip


def examples(raw: Path, plans: dict, part: str, cases: list[str], ending: str) -> dict[str, tuple]:
    """The preprocessed image (1, H, W) and the bool label (H, W) of each case."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager, found = PlansManager(plans), {}
    configuration = manager.get_configuration("2d")
    preprocessor = configuration.preprocessor_class(verbose=False)
    dataset_json = json.loads((raw / "dataset.json").read_bytes())
    for case in cases:
        image, label = (
            raw / f"{kind}{part}" / f"{case}{end}{ending}" for kind, end in (("images", "_0000"), ("labels", ""))
        )
        data, mask, _ = preprocessor.run_case([str(image)], str(label), manager, configuration, dataset_json)
        found[case] = torch.from_numpy(data[:, 0]), np.asarray(mask)[0, 0] > 0
    return found


@torch.no_grad()
def quality(generator, shown: dict[str, tuple], texts: dict[str, str]) -> dict:
    """Measure how good the masks are with the own text, and with the text of another case; see `gate.measure`."""
    from nnunet_semiseg.vlm.gate import measure

    cases, masks = list(shown), {"own text": [], "another's text": []}
    for i, case in enumerate(cases):
        later = [c for c in (*cases[i + 1 :], *cases[:i]) if texts[c] != texts[case]]
        for name, words in zip(masks, (texts[case], texts[later[0]]), strict=True):
            features = generator.encode_texts([words])
            masks[name].append(generator(shown[case][0][None], features[None])[1][0, 0].numpy())
    labels = [label for _, label in shown.values()]
    return {name: measure(found, labels, [np.ones_like(y) for y in labels]) for name, found in masks.items()}


def measure_towers(data: Path, work: Path, towers: str, labels: str) -> None:
    """Print how well held-out pairs find each other, and how good masks are on labelled and on test cases."""
    from nnunet_semiseg.vlm.pretrained import load_vlm, read_about, read_state
    from nnunet_semiseg.vlm.text_mask_generator import TextMaskGenerator

    folder, name = work / "vlm" / towers, TOWERS[towers][0]
    texts = json.loads((data / "busi_small" / "texts.json").read_bytes())
    for key, values in read_state(folder)["history"].items():
        if "recall" in key:
            print(f"{key} {values[-1]:.3f}")
    held_out = read_about(folder, "pre-train again")["held_out"]
    print(f"of {len(held_out)} pairs with {len({texts[case] for case in held_out})} different texts")
    seen = set(read_about(folder, "pre-train again").get("mask_cases", ()))
    raw, generator = work / "raw" / dataset_name(name, labels), TextMaskGenerator(load_vlm(folder)).eval()
    plans = json.loads((work / "preprocessed" / raw.name / f"{PLANS}.json").read_bytes())
    ending = SETS[name].ending
    labelled = sorted(file.name.removesuffix(ending) for file in (raw / "labelsTr").iterdir())
    test = sorted(file.name.removesuffix(ending) for file in (raw / "labelsTs").iterdir())
    groups = {
        "labelled, seen": ("Tr", [case for case in labelled if case in seen]),
        "labelled, not seen": ("Tr", [case for case in labelled if case not in seen]),
        "dev_test": ("Ts", test),
    }
    for group, (part, cases) in groups.items():
        for which, q in quality(generator, examples(raw, plans, part, cases, ending), texts).items() if cases else ():
            print(f"{group} ({len(cases)}), {which}: area {q.area:.3f}, Dice {q.dice:.3f} above {q.threshold:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pretrain", "measure"], help="pretrain: train the towers; measure: test them")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder with a folder for each set, such as DATA/la_small"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all files, the same as for tools/yardstick.py"
    )
    parser.add_argument(
        "--towers",
        choices=TOWERS,
        required=True,
        help="the texts of the pre-training: true, shuffled, or random weights without a training",
    )
    parser.add_argument("--labels", default="24", help="number of labelled cases; default: 24")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of the pre-training"
    )
    args = parser.parse_args()
    work = args.work.absolute()
    os.environ.update({f"nnUNet_{n}": str(work / n) for n in ("raw", "preprocessed", "results")})
    os.environ.update(OMP_NUM_THREADS="1", nnUNet_def_n_proc="1")
    torch.set_num_threads(1)
    for name in ("raw", "preprocessed", "results", "logs", "vlm"):
        (work / name).mkdir(parents=True, exist_ok=True)
    prepare(args.data, work, TOWERS[args.towers][0], args.labels)
    if args.what == "pretrain":
        print(pretrain_towers(work, args.towers, args.labels, args.set))
    else:
        measure_towers(args.data, work, args.towers, args.labels)


if __name__ == "__main__":
    main()
