"""Layouts are told from names alone: those of public data sets' documentation, no files."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest

from nnunet_semiseg.dataset_conversion import folder
from nnunet_semiseg.raw_datasets.layouts import recognise
from nnunet_semiseg.raw_datasets.names import is_session, is_visit, kind_of, label_core, part_of
from nnunet_semiseg.raw_datasets.patients import find_patients


def tree(text: str) -> list[str]:
    """Paths; `a/{b,c}.png` stands for two."""
    paths = []
    for word in text.split():
        before, brace, rest = word.partition("{")
        names, _, after = rest.partition("}")
        paths += [f"{before}{name}{after}" for name in names.split(",")] if brace else [word]
    return paths


# name: tree, what is said, channels, case to path of the first channel, case to label's path (or class to path), parts
LAYOUTS = {
    "BraTS 2023": (
        "Train/BraTS-GLI-00000-000/BraTS-GLI-00000-000-{seg,t1c,t1n,t2f}.nii.gz "
        "Train/BraTS-GLI-00002-000/BraTS-GLI-00002-000-{seg,t1c,t1n,t2f}.nii.gz "
        "Validation/BraTS-GLI-00001-000/BraTS-GLI-00001-000-{t1c,t1n,t2f}.nii.gz",
        "3 folders of cases: 3 cases, 2 with a label, channels t1c t1n t2f",
        {"BraTS-GLI-00001-000": "Validation/BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1c.nii.gz"},
        {"BraTS-GLI-00000-000": "Train/BraTS-GLI-00000-000/BraTS-GLI-00000-000-seg.nii.gz"},
        {},
    ),
    "AMOS": (
        "amos22/imagesTr/amos_{0001,0004}.nii.gz amos22/labelsTr/amos_0001.nii.gz amos22/imagesVa/amos_0008.nii.gz "
        "amos22/labelsVa/amos_0008.nii.gz amos22/imagesTs/amos_0002.nii.gz",
        "folders of images and of labels: 4 cases, 2 with a label",
        {"amos_0004": "amos22/imagesTr/amos_0004.nii.gz"},
        {"amos_0001": "amos22/labelsTr/amos_0001.nii.gz", "amos_0008": "amos22/labelsVa/amos_0008.nii.gz"},
        {"amos_0002": "test", "amos_0008": "val"},
    ),
    "images, labels and a test folder": (
        "images/{c1,c2}_0000.nii.gz labels/c1.nii.gz test/images/t1_0000.nii.gz test/labels/t1.nii.gz",
        "folders of images and of labels: 3 cases, 2 with a label",
        {"c2": "images/c2_0000.nii.gz", "t1": "test/images/t1_0000.nii.gz"},
        {"c1": "labels/c1.nii.gz", "t1": "test/labels/t1.nii.gz"},
        {"t1": "test"},
    ),
    "KiTS": (
        "data/case_00000/{imaging,segmentation}.nii.gz data/case_00001/{imaging,segmentation}.nii.gz "
        "data/case_00210/imaging.nii.gz",
        "3 folders of cases: 3 cases, 2 with a label, channels imaging",
        {"case_00210": "data/case_00210/imaging.nii.gz"},
        {"case_00001": "data/case_00001/segmentation.nii.gz"},
        {},
    ),
    "CHAOS": (
        "Train_Sets/CT/{1,2}/DICOM_anon.dicom Train_Sets/CT/1/Ground/liver_GT_{000,001,002}.png",
        "2 folders of cases: 2 cases, 1 with a label",
        {"2": "Train_Sets/CT/2/DICOM_anon.dicom"},
        {"1": "Train_Sets/CT/1/Ground.stack"},
        {},
    ),
    "TotalSegmentator": (
        "Totalsegmentator_v2/{s0000,s0001}/ct.nii.gz "
        "Totalsegmentator_v2/s0000/segmentations/{liver,spleen}.nii.gz",
        "2 folders of cases: 2 cases, 1 with a label, channels ct",
        {"s0001": "Totalsegmentator_v2/s0001/ct.nii.gz"},
        {"s0000": {f"{n}": f"Totalsegmentator_v2/s0000/segmentations/{n}.nii.gz" for n in ("liver", "spleen")}},
        {},
    ),
    "Decathlon": (
        "Task09_Spleen/imagesTr/spleen_{2,3}.nii.gz Task09_Spleen/labelsTr/spleen_{2,3}.nii.gz "
        "Task09_Spleen/imagesTs/spleen_1.nii.gz",
        "folders of images and of labels: 3 cases, 2 with a label",
        {"spleen_1": "Task09_Spleen/imagesTs/spleen_1.nii.gz"},
        {"spleen_2": "Task09_Spleen/labelsTr/spleen_2.nii.gz"},
        {"spleen_1": "test"},
    ),
    "nnU-Net": (
        "imagesTr/a_{0000,0001}.nii.gz labelsTr/a.nii.gz imagesUn/u_{0000,0001}.nii.gz imagesTs/t_{0000,0001}.nii.gz "
        "labelsTs/t.nii.gz",
        "folders of images and of labels: 3 cases, 2 with a label, channels 0000 0001",
        {"a": "imagesTr/a_0000.nii.gz", "u": "imagesUn/u_0000.nii.gz"},
        {"t": "labelsTs/t.nii.gz"},
        {"t": "test", "u": "unlabeled"},
    ),
    "ATLAS": (
        "ATLAS_2/Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI_T1w.nii.gz "
        "ATLAS_2/Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI_label-L_desc-T1lesion_mask.nii.gz "
        "ATLAS_2/Training/R001/sub-r001s002/ses-1/anat/sub-r001s002_ses-1_space-MNI_T1w.nii.gz "
        "ATLAS_2/Testing/R002/sub-r002s003/ses-1/anat/sub-r002s003_ses-1_space-MNI_T1w.nii.gz",
        "BIDS names: 3 cases, 1 with a label, channels space-MNI_T1w",
        {"sub-r001s002_ses-1": "ATLAS_2/Training/R001/sub-r001s002/ses-1/anat/sub-r001s002_ses-1_space-MNI_T1w.nii.gz"},
        {"sub-r001s001_ses-1": "ATLAS_2/Training/R001/sub-r001s001/ses-1/anat/"
         "sub-r001s001_ses-1_space-MNI_label-L_desc-T1lesion_mask.nii.gz"},
        {"sub-r002s003_ses-1": "test"},
    ),
    "ISLES 2022": (
        "I/sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_{dwi,adc}.nii.gz "
        "I/sub-strokecase0002/ses-0001/dwi/sub-strokecase0002_ses-0001_{dwi,adc}.nii.gz "
        "I/derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz",
        "BIDS names: 2 cases, 1 with a label, channels adc dwi",
        {"sub-strokecase0002_ses-0001": "I/sub-strokecase0002/ses-0001/dwi/sub-strokecase0002_ses-0001_adc.nii.gz"},
        {"sub-strokecase0001_ses-0001":
         "I/derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz"},
        {},
    ),
    "FLARE 2022": (
        "Training/FLARE22_LabeledCase50/images/FLARE22_Tr_{0001,0002}_0000.nii.gz "
        "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_{0001,0002}.nii.gz "
        "Training/FLARE22_UnlabeledCase2000/Case_00001_0000.nii.gz",
        "folders of images and of labels: 3 cases, 2 with a label",
        {"Case_00001": "Training/FLARE22_UnlabeledCase2000/Case_00001_0000.nii.gz"},
        {"FLARE22_Tr_0002": "Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0002.nii.gz"},
        {"Case_00001": "unlabeled"},
    ),
    "WORD": (
        "WORD/imagesTr/word_{0002,0003}.nii.gz WORD/labelsTr/word_0002.nii.gz WORD/imagesVal/word_0001.nii.gz "
        "WORD/labelsVal/word_0001.nii.gz WORD/imagesTs/word_0009.nii.gz WORD/labelsTs/word_0009.nii.gz",
        "folders of images and of labels: 4 cases, 3 with a label",
        {"word_0003": "WORD/imagesTr/word_0003.nii.gz"},
        {"word_0009": "WORD/labelsTs/word_0009.nii.gz"},
        {"word_0001": "val", "word_0009": "test"},
    ),
    "BTCV": (
        "RawData/Training/img/img{0001,0002}.nii.gz RawData/Training/label/label{0001,0002}.nii.gz "
        "RawData/Testing/img/img0061.nii.gz",
        "folders of images and of labels: 3 cases, 2 with a label",
        {"img0061": "RawData/Testing/img/img0061.nii.gz"},
        {"img0001": "RawData/Training/label/label0001.nii.gz"},
        {"img0061": "test"},
    ),
    "ACDC": (
        "training/patient001/patient001_{frame01,frame01_gt,frame12,frame12_gt}.nii.gz "
        "training/patient002/patient002_{frame01,frame01_gt,frame12,frame12_gt}.nii.gz",
        "2 folders of several cases each: 4 cases, 4 with a label",
        {"patient001_frame12": "training/patient001/patient001_frame12.nii.gz"},
        {"patient001_frame12": "training/patient001/patient001_frame12_gt.nii.gz"},
        {},
    ),
    "LiTS": (
        "volume-{0,1,10}.nii segmentation-{0,10}.nii",
        "one folder for images and labels: 3 cases, 2 with a label",
        {"volume-1": "volume-1.nii"},
        {"volume-10": "segmentation-10.nii"},
        {},
    ),
    "LA 2018": (
        "Training/A1/{lgemri,laendo_label}.nrrd Testing/B1/{lgemri,laendo_label}.nrrd",
        "2 folders of cases: 2 cases, 2 with a label, channels lgemri",
        {"A1": "Training/A1/lgemri.nrrd"},
        {"B1": "Testing/B1/laendo_label.nrrd"},
        {"B1": "test"},
    ),
    "PROMISE12": (
        "TrainingData/Case{00,01}.mhd TrainingData/Case{00,01}_segmentation.mhd",
        "one folder for images and labels: 2 cases, 2 with a label",
        {"Case00": "TrainingData/Case00.mhd"},
        {"Case01": "TrainingData/Case01_segmentation.mhd"},
        {},
    ),
    "MM-WHS": (
        "ct_train/ct_train_{1001,1002}_image.nii.gz ct_train/ct_train_{1001,1002}_label.nii.gz",
        "one folder for images and labels: 2 cases, 2 with a label, channels image",
        {"ct_train_1001": "ct_train/ct_train_1001_image.nii.gz"},
        {"ct_train_1002": "ct_train/ct_train_1002_label.nii.gz"},
        {},
    ),
    "ISIC": (
        "ISIC2018_Task1_Training_Input/ISIC_{0000000,0000001}.jpg "
        "ISIC2018_Task1_Training_GroundTruth/ISIC_{0000000,0000001}_segmentation.png",
        "one folder for images and labels: 2 cases, 2 with a label",
        {"ISIC_0000001": "ISIC2018_Task1_Training_Input/ISIC_0000001.jpg"},
        {"ISIC_0000001": "ISIC2018_Task1_Training_GroundTruth/ISIC_0000001_segmentation.png"},
        {},
    ),
    "slices in folders": (
        "images/{p1,p2}/s1.png images/{p1,p2}/s2.png masks/{p1,p2}/s1.png masks/{p1,p2}/s2.png",
        "folders of images and of labels, with folders therein: 4 cases, 4 with a label",
        {"p1_s1": "images/p1/s1.png"},
        {"p2_s2": "masks/p2/s2.png"},
        {},
    ),
    "sites with the same names": (
        "A/images/{1,2}.png A/labels/{1,2}.png B/images/{1,2}.png B/labels/1.png",
        "2 folders of several cases each: 4 cases, 3 with a label",
        {"A_1": "A/images/1.png", "B_2": "B/images/2.png"},
        {"B_1": "B/labels/1.png"},
        {},
    ),
    "a folder a kind in each case": (
        "P{1,2}/images/flair.nii.gz P1/images/t1.nii.gz P2/images/t1.nii.gz P1/masks/mask.nii.gz",
        "2 folders of cases: 2 cases, 1 with a label, channels flair t1",
        {"P2": "P2/images/flair.nii.gz"},
        {"P1": "P1/masks/mask.nii.gz"},
        {},
    ),
    "follow-up scans": (
        "P1/{2020-01-05,2021-03-09}/flair.nii.gz P2/2020-01-05/flair.nii.gz P1/2020-01-05/seg.nii.gz",
        "3 folders of cases: 3 cases, 1 with a label, channels flair",
        {"P1_2021-03-09": "P1/2021-03-09/flair.nii.gz"},
        {"P1_2020-01-05": "P1/2020-01-05/seg.nii.gz"},
        {},
    ),
    "CHAOS, all of it": (
        "Train_Sets/CT/{1,2}/DICOM_anon.dicom Train_Sets/CT/1/Ground/liver_GT_{000,001}.png "
        "Train_Sets/CT/2/Ground/liver_GT_{000,001}.png Train_Sets/MR/11/T1DUAL/DICOM_anon/{InPhase,OutPhase}.dicom "
        "Train_Sets/MR/11/T1DUAL/Ground/IMG-{1,2}.png Train_Sets/MR/11/T2SPIR/DICOM_anon.dicom "
        "Train_Sets/MR/11/T2SPIR/Ground/IMG-{1,2}.png Train_Sets/MR/13/T1DUAL/DICOM_anon/{InPhase,OutPhase}.dicom "
        "Test_Sets/CT/3/DICOM_anon.dicom "
        "Test_Sets/MR/12/T2SPIR/DICOM_anon.dicom",
        "7 folders of cases: 7 cases, 4 with a label",
        {"3": "Test_Sets/CT/3/DICOM_anon.dicom", "11_T2SPIR": "Train_Sets/MR/11/T2SPIR/DICOM_anon.dicom",
         "11_T1DUAL": "Train_Sets/MR/11/T1DUAL/DICOM_anon.dicom"},
        {"2": "Train_Sets/CT/2/Ground.stack", "11_T1DUAL": "Train_Sets/MR/11/T1DUAL/Ground.stack"},
        {"3": "test", "12_T2SPIR": "test"},
    ),
    "visits of a PACS export": (
        "P1/20200101/{301,302}.dicom P1/20210303/{1,2}.dicom P1/20210303/seg.nii.gz P2/20200201/{7,8}.dicom P3/9.dicom",
        "4 folders of cases: 4 cases, 1 with a label",
        {"P1_20200101": "P1/20200101.dicom", "P2_20200201": "P2/20200201.dicom", "P3": "P3/9.dicom"},
        {"P1_20210303": "P1/20210303/seg.nii.gz"},
        {},
    ),
    "LiTS, all of it": (
        "Training_Batch_1/{volume-0,segmentation-0,volume-1,segmentation-1}.nii Test_Batch/test-volume-0.nii "
        "Training_Batch_2/{volume-28,segmentation-28}.nii",
        "3 folders of several cases each: 4 cases, 3 with a label",
        {"volume-28": "Training_Batch_2/volume-28.nii"},
        {"volume-0": "Training_Batch_1/segmentation-0.nii"},
        {"test-volume-0": "test"},
    ),
    "MM-WHS, CT and MR": (
        "ct_train/ct_train_{1001,1002}_image.nii.gz ct_train/ct_train_{1001,1002}_label.nii.gz "
        "mr_train/mr_train_{1001,1002}_image.nii.gz mr_train/mr_train_1001_label.nii.gz "
        "ct_test/ct_test_2001_image.nii.gz",
        "3 folders of several cases each: 5 cases, 3 with a label, channels image",
        {"mr_train_1002": "mr_train/mr_train_1002_image.nii.gz"},
        {"mr_train_1001": "mr_train/mr_train_1001_label.nii.gz"},
        {"ct_test_2001": "test"},
    ),
    "ISIC with a test set": (
        "ISIC2018_Task1-2_Training_Input/ISIC_{0000000,0000001}.jpg ISIC2018_Task1-2_Test_Input/ISIC_0000009.jpg "
        "ISIC2018_Task1_Training_GroundTruth/ISIC_{0000000,0000001}_segmentation.png",
        "one folder for images and labels: 3 cases, 2 with a label",
        {"ISIC_0000009": "ISIC2018_Task1-2_Test_Input/ISIC_0000009.jpg"},
        {"ISIC_0000001": "ISIC2018_Task1_Training_GroundTruth/ISIC_0000001_segmentation.png"},
        {"ISIC_0000009": "test"},
    ),
    "PI-CAI": (
        "public_fold0/10000/10000_100_{adc,hbv,t2w}.mha public_fold0/10001/10001_101_{adc,hbv,t2w}.mha "
        "picai_labels/human_expert/10000_100.nii.gz",
        "one folder for images and labels: 2 cases, 1 with a label, channels adc hbv t2w",
        {"10001_101": "public_fold0/10001/10001_101_adc.mha"},
        {"10000_100": "picai_labels/human_expert/10000_100.nii.gz"},
        {},
    ),
    "BUSI": (
        "BUSI_with_GT/benign/benign-(1).png BUSI_with_GT/benign/benign-(1)_mask_1.png "
        "BUSI_with_GT/malignant/malignant-({1,2}).png BUSI_with_GT/malignant/malignant-({1,2})_mask.png",
        "2 folders of several cases each: 3 cases, 3 with a label",
        {"malignant-(2)": "BUSI_with_GT/malignant/malignant-(2).png"},
        {"benign-(1)": "BUSI_with_GT/benign/benign-(1)_mask_1.png"},
        {},
    ),
    "a folder for each channel": (
        "images/t1/{a,b,c}.nii.gz images/t2/a_T2.nii.gz images/t2/{b,c}.nii.gz labels/a_seg.nii.gz labels/b.nii.gz",
        "a folder for each channel: 3 cases, 2 with a label, channels t1 t2",
        {"c": "images/t1/c.nii.gz"},
        {"a": "labels/a_seg.nii.gz"},
        {},
    ),
    "a folder for each channel, twice": (
        "train/{t1,t2}/a.nii.gz train/{t1,t2}/b.nii.gz train/labels/a.nii.gz test/{t1,t2}/c.nii.gz",
        "a folder for each channel: 3 cases, 1 with a label, channels t1 t2",
        {"b": "train/t1/b.nii.gz"},
        {"a": "train/labels/a.nii.gz"},
        {"c": "test"},
    ),
    "the same names for training and test": (
        "train/images/{0,1}.png train/masks/{0,1}.png test/images/0.png test/masks/0.png unlabeled/{0,1}.png",
        "folders of images and of labels: 5 cases, 3 with a label",
        {"train_0": "train/images/0.png", "unlabeled_1": "unlabeled/1.png"},
        {"test_0": "test/masks/0.png"},
        {"test_0": "test", "unlabeled_0": "unlabeled", "unlabeled_1": "unlabeled"},
    ),
    "labels among images": (
        "d/images/{a,b}.nii.gz d/images/a_seg.nii.gz",
        "one folder for images and labels: 2 cases, 1 with a label",
        {"b": "d/images/b.nii.gz"},
        {"a": "d/images/a_seg.nii.gz"},
        {},
    ),
    "one case": (
        "Smith/t1.nii.gz Smith/t2.nii.gz Smith/seg.nii.gz",
        "a folder of one case: 1 cases, 1 with a label, channels t1 t2",
        {"Smith": "Smith/t1.nii.gz"},
        {"Smith": "Smith/seg.nii.gz"},
        {},
    ),
    "one case with a mask a class": (
        "Smith/ct.nii.gz Smith/masks/{liver,spleen}.nii.gz",
        "a folder of one case: 1 cases, 1 with a label, channels ct",
        {"Smith": "Smith/ct.nii.gz"},
        {"Smith": {n: f"Smith/masks/{n}.nii.gz" for n in ("liver", "spleen")}},
        {},
    ),
    "one DICOM study": (
        "Smith/CT.dicom Smith/RT/rs.dicom-rtstruct",
        "a folder of one case: 1 cases, 1 with a label",
        {"Smith": "Smith/CT.dicom"},
        {"Smith": "Smith/RT/rs.dicom-rtstruct"},
        {},
    ),
    "a Mac's names": (
        "images/Jo\u0308rg.nii.gz images/b.nii.gz labels/J\u00f6rg.nii.gz",
        "folders of images and of labels: 2 cases, 1 with a label",
        {"J\u00f6rg": "images/Jo\u0308rg.nii.gz"},
        {"J\u00f6rg": "labels/J\u00f6rg.nii.gz"},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name):
    text, said, images, labels, parts = LAYOUTS[name]
    layout = recognise(tree(text))
    assert str(layout) == said
    assert {case: next(iter(layout.images[case].values())) for case in images} == images
    assert {c: path if isinstance(path, dict) else {"": path} for c, path in labels.items()} == {
        case: layout.labels[case] for case in labels
    }
    assert layout.parts == parts
    used = {p for files in (*layout.images.values(), *layout.labels.values()) for p in files.values()}
    folders = tuple(f"{path.rpartition('.')[0]}/" for path in used if path.endswith((".stack", ".dicom")))
    assert {p for p in tree(text) if not p.startswith(folders)} - used == set() == layout.left_out.keys()


def test_bids_derivatives_that_are_no_labels_and_what_some_cases_lack():
    anat = "sub-01/anat/sub-01_"
    layout = recognise([
        f"{anat}T1w.nii.gz", f"{anat}FLAIR.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz", "README.nii",
        "derivatives/manual/sub-01/anat/sub-01_label-lesion_mask.nii.gz",
        "derivatives/manual/sub-02/ses-1/anat/sub-02_ses-1_dseg.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
    ])  # fmt: skip
    assert str(layout) == "BIDS names: 2 cases, 2 with a label, channels T1w"
    assert layout.patients == {"sub-01": "sub-01", "sub-02_ses-1": "sub-02"}
    assert layout.left_out == {
        "README.nii": "its name is not in BIDS style",
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz": "a derivative that is not a label",
        f"{anat}FLAIR.nii.gz": "channel FLAIR is missing in some labelled case",
    }


FLAT = tree("images/a-{T1,t2}.nii.gz images/b_t1.nii.gz images/b-T2.nii.gz")


@pytest.mark.parametrize("separator", "_-")
@pytest.mark.parametrize(
    "label", ["labels/a", "a{}seg", "a{}Label", "masks/a{}mask", "labels/mask{}a", "labelsTr/A_gt"]
)
def test_labels_by_their_many_names(separator, label):
    label = label.replace("A", "a").format(separator) + ".nii.gz"
    folder = "images/" if "/" in label else ""
    layout = recognise([f"{folder}a.nii.gz", f"{folder}b.nii.gz", label])
    assert layout.images == {"a": {"": f"{folder}a.nii.gz"}, "b": {"": f"{folder}b.nii.gz"}}
    assert layout.labels == {"a": {"": label}} and layout.channels == ()


def test_channels_are_suffixes_in_any_case():
    for labels, channels in ((["labels/a.nii.gz"], None), ([], ["T1", "t2"])):
        layout = recognise([*FLAT, *labels], channels)
        assert list(layout.channels) == ["T1", "t2"] and layout.images == {
            "a": {"T1": "images/a-T1.nii.gz", "t2": "images/a-t2.nii.gz"},
            "b": {"T1": "images/b_t1.nii.gz", "t2": "images/b-T2.nii.gz"},
        }


PATIENTS = tree("P1/{flair,t1,t1ce,seg}.nii.gz P2/{flair,t1,t1ce}.nii.gz")


def test_channels_are_chosen_and_put_in_order():
    layout = recognise(PATIENTS, ["T1CE", "flair"])
    assert layout.images["P2"] == {"T1CE": "P2/t1ce.nii.gz", "flair": "P2/flair.nii.gz"}
    assert layout.left_out == {f"P{i}/t1.nii.gz": "channel t1 is not named with --channels" for i in (1, 2)}


@pytest.mark.parametrize(
    "paths, channels, words",
    [
        (PATIENTS, ["t1", "pet"], "--channels pet: is not the name of a channel: use names of the channels"),
        (tree("P1/{a_t1,b_t1,x,seg}.nii.gz P2/x.nii.gz"), ["t1", "x"], "--channels t1: fits a_t1 and b_t1"),
        (tree("P1/{a,b,seg}.nii.gz P2/{c,d,seg}.nii.gz"), None, "no channel is in every labelled case: choose"),
        (tree("images/{a,b}.png labels/c.png"), None, "/d/labels/c.png: no image of case c: rename this label"),
        (tree("images/a.png images/a.bmp"), None, "/d/images/a.png: case a appears twice, also as /d/images/a.bmp"),
        (tree("images/P1.nii.gz labels/P1/{a,b}/1.png"), None, "slices of one volume lie in labels/P1/a and labels"),
        (tree("images/P1/{01,02}.png labels/P1.nii.gz"), None, "/d/images/P1: 2 numbered pictures lie there: if"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_read_in_one_way(paths, channels, words):
    with pytest.raises(ValueError) as error:
        recognise(paths, channels, source="/d")
    assert words in str(error.value)


def test_one_mask_a_case_is_a_label_unless_few_classes_have_it_in_turn():
    layout = recognise(tree("P{1,2,3}/ct.nii.gz P1/x_seg.nii.gz P2/y_seg.nii.gz"))
    assert layout.labels == {"P1": {"": "P1/x_seg.nii.gz"}, "P2": {"": "P2/y_seg.nii.gz"}}
    layout = recognise(tree("P{1,2,3,4}/ct.nii.gz P{1,2}/masks/liver.nii.gz P{3,4}/masks/spleen.nii.gz"))
    assert [next(iter(files)) for files in layout.labels.values()] == ["liver", "liver", "spleen", "spleen"]


def test_numbered_pictures_are_slices_where_a_spacing_is_given():
    layout = recognise(tree("images/P1/{1,2,10}.png labels/P1/{1,2,10}.png images/P2/{1,2}.png"), stacked=True)
    assert layout.images == {"P1": {"": "images/P1.stack"}, "P2": {"": "images/P2.stack"}}
    assert layout.labels == {"P1": {"": "labels/P1.stack"}}


def test_a_pacs_export_is_a_folder_a_patient_and_series_are_told_by_their_headers():
    layout = recognise(tree("export/P1/study/{s1,s2}.dicom export/P2/s1.dicom export/P1/study/s3.dicom-seg"))
    assert layout.images == {"P1": {"": "export/P1/study.dicom"}, "P2": {"": "export/P2/s1.dicom"}}
    assert layout.labels == {"P1": {"": "export/P1/study/s3.dicom-seg"}}


def test_words_of_folders():
    kinds = {name: kind_of(name) for name in ("imagesTr", "TrainingImg", "Ground-truths", "img001", "BraTS", "CT")}
    assert kinds == {"imagesTr": "image", "TrainingImg": "image", "Ground-truths": "label", "img001": None,
                     "BraTS": None, "CT": None}  # fmt: skip
    parts = {name: part_of(name) for name in ("imagesTs", "labelsVal", "Testing", "BraTS-GLI", "FLARE_UnlabeledCase")}
    assert parts == {"imagesTs": "test", "labelsVal": "val", "Testing": "test", "BraTS-GLI": None,
                     "FLARE_UnlabeledCase": "unlabeled"}  # fmt: skip
    assert [label_core(stem) for stem in ("c_seg", "mask-c", "seg", "c", "c1_dseg", "c_mask_2")] == [
        "c", "c", "", None, "c1", "c",
    ]  # fmt: skip


PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
GALLERY = re.findall(
    r"### (.*?)\n\n```\n(.*?)```\n\n    (nnunet_semiseg convert .*?)\n\ntaken for (.*?)\n", PAGE, re.DOTALL
)


@pytest.mark.parametrize("title, paths, command, said", GALLERY, ids=[entry[0] for entry in GALLERY])
def test_the_gallery_says_what_is_printed(title, paths, command, said):
    parser = ArgumentParser()
    folder.add_arguments(parser)
    options, rest = parser.parse_known_args(shlex.split(command)[3:])
    assert rest == ["-i", "MYDATA", "-d", "501"]
    names = [path.replace("/*.dcm", ".dicom") for path in paths.split() if not path.endswith(".json")]
    layout = recognise(names, options.channels, options.spacing is not None)
    assert str(layout) == said and not layout.left_out


def test_the_gallery_is_read():
    assert len(GALLERY) == PAGE.count("\n### ") == 18


@pytest.mark.parametrize(
    "cases, known, patients",
    [
        (["BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00007-000"], {}, "BraTS-GLI-00005 BraTS-GLI-00007"),
        (["patient001_frame01", "patient001_frame12", "patient002_frame01"], {}, "patient001 patient002"),
        (["s1_ses-2", "s2_baseline_1"], {}, "s1 s2"),
        (["a_2020-01-01", "a_2021-01-01", "b"], {"a_2020-01-01": "a", "a_2021-01-01": "a"}, "a b"),
    ],
)
def test_patients_by_folders_or_names(cases, known, patients):
    assert sorted(set(find_patients(cases, known, "patient").values())) == patients.split()
    assert find_patients(["x_07_scan1"], {}, r"(.+)_scan") == {"x_07_scan1": "x_07"}


def test_folders_of_visits():
    folders = [("1", "P7"), ("1", "CT"), ("2020-01-05", "Smith"), ("05.01.2020", "Smith"), ("follow-up", "Smith")]
    assert [is_session(folder, above) for folder, above in folders] == [True, False, True, True, True]
    assert [is_visit(folder) for folder in ("baseline", "ses-1", "T1", "301")] == [True, True, False, False]


def test_one_case_needs_labels_of_no_other_name():
    for paths in (tree("{a,b}.nii.gz masks/{x,y}.nii.gz"), tree("images/a.nii.gz labels/{x,y}.nii.gz")):
        with pytest.raises(ValueError, match="no image of case x"):
            recognise(paths)
    layout = recognise(tree("{t1,t2}.nii.gz masks/{x,y}.nii.gz"), ["t1", "t2"], source="/data/Smith")
    assert layout.labels == {"Smith": {"x": "masks/x.nii.gz", "y": "masks/y.nii.gz"}}


def test_two_labels_of_a_case():
    with pytest.raises(ValueError, match="^/d/a_mask_1.png: case a has two labels, this one and /d/a_mask.png: "):
        recognise(tree("{a,b}.png a_mask.png a_mask_1.png"), source="/d")


def test_masks_beside_a_label_of_the_whole_case():
    paths = tree(
        "case_{0,1}/imaging.nii.gz case_0/segmentation.nii.gz case_0/instances/k_instance-1_annotation-{1,2}.nii.gz"
    )
    layout = recognise(paths, ["CT"], classes=["kidney", "tumour"])
    assert layout.labels == {"case_0": {"": "case_0/segmentation.nii.gz"}} and layout.channels == ("CT",)
    assert layout.left_out == dict.fromkeys(
        tree("case_0/instances/k_instance-1_annotation-{1,2}.nii.gz"), "beside a label of the whole case"
    )
    paths = tree("s{0,1}/ct.nii.gz s0/seg.nii.gz s0/{brain,liver}_mask.nii.gz")
    assert recognise(paths, classes=["liver"]).labels["s0"].keys() == {"", "brain", "liver"}


def test_a_folder_that_is_called_like_a_channel_holds_cases():
    layout = recognise(tree("CT/{1,2}/D.dicom MR/{1,2}/D.dicom CT/1/Ground/{1,2}.png"), ["CT"])
    assert layout.images == {"1": {"": "CT/1/D.dicom"}, "2": {"": "CT/2/D.dicom"}}
    assert layout.labels == {"1": {"": "CT/1/Ground.stack"}}
    assert layout.left_out == dict.fromkeys(tree("MR/{1,2}/D.dicom"), "in no folder with the name CT")
