"""A case that lacks a modality: a channel of 0 in the files, whatever normalisation and augmentation make of it."""

import numpy as np
import pytest
import torch
from conftest import write_image
from training import make_trainer

from nnunet_semiseg.data.empty_channels import EmptyChannels, RememberEmptyChannels, empty_channels
from nnunet_semiseg.data.image_problems import intensity_problems, missing_channels
from nnunet_semiseg.networks.modalities import ChannelGroups
from nnunet_semiseg.networks.mutual_learning import presence
from nnunet_semiseg.trainers.semi_cml import SemiCMLTrainer


def test_a_channel_is_empty_where_it_holds_its_value_of_nothing_or_padding():
    x = torch.zeros(2, 2, 8, 8, 8)
    x[0, 0] = -0.7
    x[0, 0, :2] = 0  # padding
    x[1, 0, 4, 4, 4] = 0.5
    x[:, 1] = torch.tensor([-0.7, 0.0]).view(2, 1, 1, 1)  # -0.7 is a value like any other in the second channel
    assert empty_channels(x, torch.tensor([-0.7, 0.0])).tolist() == [[True, False], [False, True]]


def test_noise_on_nothing_is_nothing():
    remember, restore = RememberEmptyChannels([-0.7, 0.0]), EmptyChannels()
    data = {"image": torch.stack((torch.full((8, 8, 8), -0.7), torch.ones(8, 8, 8)))}
    data = remember(**data)
    data["image"] = data["image"] + 0.1
    image = restore(**data)["image"]
    assert (image[0] == 0).all() and (image[1] == 1.1).all()


def test_a_missing_modality_has_no_share():
    x = torch.randn(2, 2, 8, 8, 8)
    x[0, 0] = -0.7
    images = ChannelGroups([[0], [1]], [-0.7, 0.0])(x)
    assert presence(images).tolist() == [[0.0, 0.5], [1.0, 0.5]]
    assert (images[0][0] == 0).all() and torch.equal(images[0][1], x[1, :1])


def test_only_zero_beside_something_is_missing():
    nothing, three, something = np.zeros((8, 8, 8)), np.full((8, 8, 8), 3.0), np.arange(512.0).reshape(8, 8, 8)
    assert missing_channels(np.stack((something, nothing)), ["CT", "PET"]) == ["PET"]
    assert missing_channels(np.stack((nothing, nothing)), ["CT", "PET"]) == []
    assert not intensity_problems(np.stack((something, nothing)), ["a", "b"], ["CT", "PET"])
    (problem,) = intensity_problems(np.stack((something, three)), ["a", "b"], ["CT", "PET"])
    assert problem.startswith("b: constant, every voxel is 3")
    assert len(intensity_problems(np.stack((nothing, nothing)), ["a", "b"], ["CT", "PET"])) == 2


@pytest.mark.parametrize("names", [{"0": "CT", "1": "PET"}, {"0": "T1", "1": "T2"}], ids=["CT", "MR"])
def test_from_the_files_to_the_batch(names, tiny_dataset, monkeypatch, capsys):
    dataset = tiny_dataset(channels=2, labeled=2, unlabeled=2, channel_names=names)
    for case, folder in (("tr_000", "imagesTr"), ("un_000", "imagesUn"), ("un_001", "imagesUn")):
        write_image(np.zeros((24, 24, 24), np.float32), dataset.image(case, 0, folder))
    dataset.plan()
    assert f"un_000: {names['0']} is 0 everywhere: this case is taken to lack this channel" in capsys.readouterr().out
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(SemiCMLTrainer, dataset)
    trainer.on_train_start()
    trainer.network.train()
    for _ in range(3):
        batch = next(trainer.dataloader_train)
        streams = [(batch["data"], batch["keys"])]
        streams += [(view, batch["cases"]) for view in batch["views"].values()]
        for images, keys in streams:
            present = presence(trainer.network.modalities(images))[0]
            assert present.tolist() == [0.5 if key == "tr_001" else 0.0 for key in keys]
        assert all(torch.isfinite(v) for v in trainer.train_step(batch).values())
