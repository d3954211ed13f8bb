"""Read pictures that Pillow reads better than ITK, and masks whose colours stand for classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from PIL import Image

from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.label_values import count, found_text, offer
from nnunet_semiseg.raw_datasets.names import PICTURES
from nnunet_semiseg.raw_datasets.readers import one_channel

Colour = tuple[int, int, int]


def mode_of(path: Path) -> str | None:
    """Pillow's name for the kind of pixels in a picture. Only the header is read.

    None if the file is not a picture or cannot be read.
    """
    if not path.name.lower().endswith(PICTURES):
        return None
    try:
        with Image.open(path) as picture:
            return picture.mode
    except (OSError, Image.DecompressionBombError):
        return None  # its reader will report the reason


def read_jpeg(path: Path, channels: int) -> sitk.Image:
    """Read a JPEG with Pillow, which reports a truncated file.

    Args:
        channels: the number of channels of the data set. If it is 1, the colours must be equal.
    """
    with Image.open(path) as picture:
        image = sitk.GetImageFromArray(np.asarray(picture), isVector=picture.mode != "L")
    return one_channel(image, str(path)) if channels == 1 else image


def read_mask(path: Path) -> sitk.Image:
    """Read a label picture whose values are the indices of a palette, one bit, or grey with transparency.

    Transparency is ignored.
    """
    with Image.open(path) as picture:
        labels = np.asarray(picture.getchannel(0) if picture.mode in ("LA", "PA") else picture)
    return sitk.GetImageFromArray(labels.astype(np.uint8))


def read_colours(path: Path) -> sitk.Image:
    """Read a mask in colour, as RGB. A palette is replaced by its colours, and transparency is ignored."""
    with Image.open(path) as picture:
        return sitk.GetImageFromArray(np.asarray(picture.convert("RGB")), isVector=True)


def read_colour_mask(path: Path, colours: Mapping[Colour, int], labels: Sequence[str] = ()) -> sitk.Image:
    """Turn colours into values, uint8. If `colours` is empty, a grey mask in three channels keeps its values.

    Args:
        labels: the names of the classes, for the message.

    Raises:
        UserError: there is an unknown colour. The message counts the pixels of each and shows the option to use.
    """
    picture = read_colours(path)
    rgb = sitk.GetArrayViewFromImage(picture)
    if not colours and (rgb == rgb[..., :1]).all():  # a grey mask in three channels
        return sitk.GetImageFromArray(np.ascontiguousarray(rgb[..., 0]))
    found = count(picture)
    if unknown := found.keys() - colours.keys():
        new = found if len(unknown) == len(found) else {colour: found[colour] for colour in unknown}
        raise UserError(f"{path}: is a label in colour, with {found_text(found)}: {offer(new, labels)}")
    values = np.zeros(rgb.shape[:-1], np.uint8)
    for colour, value in colours.items():
        values[(rgb == colour).all(-1)] = value
    return sitk.GetImageFromArray(values)
