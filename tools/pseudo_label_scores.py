"""Measure the pseudo-labels of a TextSemiSegTrainer over the training, for data whose true labels are known.

    python tools/pseudo_label_scores.py MODEL CHECKPOINT [CHECKPOINT ...] --images DIR --labels DIR --every 5

MODEL is the folder of a trained model (with plans.json, dataset.json and fold_all/checkpoint_final.pth). Each
CHECKPOINT is the path of a file, a copy of the model's `checkpoint_latest.pth` that you made during the training. For
each of them and each decoder it prints the Dice of the foreground (all classes as one), and the predicted volume
divided by the true one: means over every n-th case of `--images`, without mirroring. Images have one channel. The
training itself does not use these numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor


def decode_with(network, decoder):
    """Make a forward function of the network that uses this decoder. Its deep supervision is switched off for good."""
    decoder.deep_supervision = False

    def forward(x):
        *skips, bottleneck = network.encoder(x)
        return decoder([*skips, network.guidance(bottleneck)])

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("checkpoints", nargs="+", help="paths of checkpoint files of different epochs")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images to predict")
    parser.add_argument("--labels", type=Path, required=True, help="folder of the true labels of the images")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="use only every N-th image; default: %(default)s"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(args.model, ("all",), "checkpoint_final.pth")
    network, reader = predictor.network, SimpleITKIO()
    cases = []
    for image in sorted(args.images.iterdir())[:: args.every]:
        label = reader.read_seg(str(args.labels / image.name.replace("_0000", "")))[0][0] > 0
        cases.append((*reader.read_images([str(image)]), label))

    print("| epoch | Dice 1 | volume 1 | Dice 2 | volume 2 |\n|---|---|---|---|---|")
    for file in args.checkpoints:
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        predictor.list_of_parameters = [checkpoint["network_weights"]]
        cells = []
        for decoder in (network.decoder, network.other_decoders[0]):
            network.forward = decode_with(network, decoder)
            dice, volume = [], []
            for image, properties, label in cases:
                found = predictor.predict_single_npy_array(image, dict(properties)) > 0
                dice.append(2 * (found & label).sum() / (found.sum() + label.sum()))
                volume.append(found.sum() / label.sum())
            cells += [f"{np.mean(dice):.3f}", f"{np.mean(volume):.2f}"]
        print(f"| {checkpoint['current_epoch']} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
