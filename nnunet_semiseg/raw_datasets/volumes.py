"""Read volumes that are not one file with one channel: stacks of pictures, files of all channels, masks of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.files import read_json
from nnunet_semiseg.raw_datasets.names import PICTURES, natural
from nnunet_semiseg.raw_datasets.readers import read_grid, series_files
from nnunet_semiseg.raw_datasets.repair import Repair, grid_difference, read
from nnunet_semiseg.schema import check


def read_tiff_volume(path: Path, spacing: Sequence[float] | None) -> sitk.Image:
    """Read a TIFF stack. Its voxel size is in the file CASE.json beside it, as in nnU-Net (z y x), or in `spacing`.

    Args:
        spacing: x y z in mm. If there is a CASE.json, its voxel size is used instead.

    Raises:
        UserError: there is no voxel size, or CASE.json does not have it.
    """
    volume = sitk.ReadImage(path)
    beside = next((f for s in (path.stem, path.stem[:-5]) if (f := path.with_name(f"{s}.json")).is_file()), None)
    if beside:
        fix = 'write {"spacing": [z, y, x]}, in mm, or remove this file'
        content = read_json(beside, fix)
        check(content, {"spacing": list[float]}, beside, fix)
        spacing = content["spacing"][::-1]
    if not spacing:
        raise UserError(f"{path}: this volume has no voxel size: give it with --spacing X Y Z (mm)")
    volume.SetSpacing([float(s) for s in spacing])
    return volume


def read_channel(path: Path, channel: int, repair: Repair) -> tuple[sitk.Image, str]:
    """Read one channel, counted from 0, of a file with four dimensions x y z c."""
    image, notes = read(path, repair)
    size = image.GetSize()
    if len(size) != 4 or channel >= size[3]:
        raise UserError(
            f"{path}: has no channel {channel + 1}, because its size is {' x '.join(map(str, size))}: save all"
            f" channels in the file"
        )
    return image[:, :, :, channel], "; ".join([
        *notes,
        f"channel {channel + 1} of {size[3]} of a 4D file ({path.name})",
    ])


def slices_of(folder: Path) -> list[Path]:
    """The pictures in a folder in the order of their numbers, so that `2.png` comes before `10.png`."""
    files = (f for f in folder.iterdir() if f.name.lower().endswith(PICTURES) and not f.name.startswith("."))
    return sorted(files, key=lambda file: natural(file.name))


def read_stack(folder: Path, spacing: Sequence[float] | None) -> tuple[sitk.Image, str]:
    """Read the pictures in a folder as slices of a volume, in the order of their names. `spacing` is x y z in mm.

    Raises:
        UserError: there is no spacing; or the pictures have colours or different sizes.
    """
    if not spacing:
        raise UserError(
            f"{folder}: the pictures in it are slices of a volume: give the size of a voxel with --spacing X Y Z (mm)"
        )
    volume = _stacked(folder, sitk.ReadImage)
    volume.SetSpacing([float(s) for s in spacing])
    return volume, f"{volume.GetSize()[2]} pictures are the slices of a volume, in the order of their names"


def read_mask_stack(
    folder: Path,
    image: Path,
    read_slice: Callable[[Path], sitk.Image],
    channel: str | None = None,
    spacing: Sequence[float] | None = None,
) -> tuple[sitk.Image, str]:
    """Read the masks in a folder on the grid of their image.

    The slices have the same order as those of the image. If the image is DICOM, this is the order of the names of its
    files, else the order of its slices.

    Args:
        image: the file of the image, or the folder of its DICOM files or pictures.
        channel: the series, if there are several.
        spacing: the spacing of an image that consists of pictures, else None.

    Raises:
        UserError: the masks and the image have different sizes; or `read_stack` or `read_dicom_series` would raise it.
    """
    mask = _stacked(folder, read_slice)
    grid = read_stack(image, spacing)[0] if spacing else read_grid(image, channel)
    if mask.GetSize() != grid.GetSize():
        raise UserError(
            f"{folder}: its masks have the size {mask.GetSize()}, but {image} has {grid.GetSize()}: use the"
            f" masks that belong to this image"
        )
    note = f"{mask.GetSize()[2]} pictures are the slices of the label, in the order of their names"
    voxels = sitk.GetArrayFromImage(mask)
    if image.is_dir() and not spacing:
        by_position = series_files(image, channel)
        by_name = {file: i for i, file in enumerate(sorted(by_position, key=natural))}
        voxels = voxels[[by_name[file] for file in by_position]]
        note += " and of the names of DICOM files"
    mask = sitk.GetImageFromArray(voxels)
    mask.CopyInformation(grid)
    return mask, note


def _stacked(folder: Path, read_slice: Callable[[Path], sitk.Image]) -> sitk.Image:
    files = slices_of(folder)
    slices = [sitk.GetArrayFromImage(read_slice(file)) for file in files]
    for file, voxels in zip(files, slices, strict=True):
        if voxels.ndim != 2:
            raise UserError(f"{file}: has colours or several pages: each slice must be one grey picture: save it again")
        if voxels.shape != slices[0].shape:
            raise UserError(
                f"{file}: its shape is {voxels.shape}, but that of {files[0].name} is {slices[0].shape}: give all"
                " slices of a volume the same size"
            )
    return sitk.GetImageFromArray(np.stack(slices))


def read_class_masks(*paths: Path, values: Sequence[int], names: Sequence[str], missing: Sequence[str], repair: Repair):
    """Join several binary masks to one label. Where two overlap, the later one is taken, and a note says so.

    Args:
        values: the value of each mask in the label.
        missing: classes without a mask in this case.

    Raises:
        UserError: masks have different grids, or one has more than two values.
    """
    label = first = None
    notes = [f"there is no mask of {', '.join(missing)}, so it is taken to be empty"] if missing else []
    for path, value, name in zip(paths, values, names, strict=True):
        mask, found = read(path, repair)
        notes += found
        voxels = sitk.GetArrayViewFromImage(mask)
        if len(present := np.unique(voxels)) > 2:
            raise UserError(f"{path}: has {len(present)} values, but a mask of {name} must have two: correct it")
        if label is None or first is None:
            first, label = mask, np.zeros(voxels.shape, np.uint8)
        elif difference := grid_difference(mask, first)[0]:
            raise UserError(f"{path}: {difference} in {paths[0].name}: give all masks of a case the same grid")
        if n := np.count_nonzero(label[voxels > 0]):
            notes.append(f"{n} voxels of {name} are in another mask, too: they become {name}")
        label[voxels > 0] = value
    result = sitk.GetImageFromArray(label)
    result.CopyInformation(first)
    return result, "; ".join(notes)
