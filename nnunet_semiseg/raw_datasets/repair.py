"""Find problems of headers and voxels. They are fixed only if the user asks for it, and a note always says so."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.data.headers import DATA_FILE, is_spacing
from nnunet_semiseg.data.image_problems import geometry_difference, nifti_damage, one_line_of
from nnunet_semiseg.errors import UserError

TOLERANCE = 0.1
"""Two grids are equal if their corners differ by at most this share of the smallest spacing, because headers are
rounded."""
NRRD = (b"\n\n", (b"spacings",), b"sizes")
META_IMAGE = (b"ElementDataFile", (b"elementspacing", b"elementsize"), b"dimsize")
"""What a header of this kind ends with, and the names of its lines with the voxel size and with the image size."""
FILL = "choose a value for them with --nan fill (an option of convert folder)"


@dataclass(frozen=True)
class Repair:
    """What the user allows to change.

    Args:
        spacing: the voxel size x y z in mm, used if a header has none or an impossible one (0, less, or NaN).
        nan: what replaces NaN and infinity: a number, or `fill` for the smallest finite value of the image.
        reorient: whether axes that are not at right angles are replaced by the nearest axes that are. Voxels do not
            change.
    """

    spacing: tuple[float, ...] | None = None
    nan: float | str | None = None
    reorient: bool = False


def read(path: Path, repair: Repair) -> tuple[sitk.Image, list[str]]:
    """Read an image from a file, with notes on what was changed. Without a note the image is exactly that of the file.

    Raises:
        UserError: the image cannot be read, or has a problem that `repair` does not allow to fix.
    """
    is_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    notes: list[str] = []
    wrong = _nifti_spacing(path) if is_nifti else _text_spacing(path)
    is_refused = bool(wrong) and path.suffix.lower() in (".mha", ".mhd")  # ITK does not read such a file
    if wrong is not None and (repair.spacing is None or is_refused):
        what = f"the header's spacing is {_text(wrong)}" if wrong else "the header has no spacing"
        option = "give it with --spacing X Y Z in mm (an option of convert folder)"
        fix = "correct its line ElementSpacing" if is_refused else option
        raise UserError(f"{path}: {what}: {fix}")
    damage = nifti_damage(path)
    if damage and "NaN" not in damage:
        raise UserError(f"{path}: {damage}: save or download it again")
    if damage and repair.nan is None:
        raise UserError(f"{path}: {damage}: {FILL}")
    try:
        image = sitk.ReadImage(path)
    except Exception as e:
        if not (is_nifti and "orthonormal" in str(e)):
            raise UserError(f"{path}: cannot be read ({one_line_of(e)}): save or download it again") from None
        image, note = _at_right_angles(path, repair.reorient)
        notes.append(note)
    if wrong is not None and repair.spacing is not None:
        image.SetSpacing([float(s) for s in (*repair.spacing, 1)[: image.GetDimension()]])
        was = f"the header's spacing {_text(wrong)}" if wrong else "the spacing that the header lacks"
        notes.append(f"{was} is now {_text(repair.spacing)} ({path.name})")
    voxels = sitk.GetArrayViewFromImage(image)
    if damage:  # ITK reads 0 instead of these
        finite = np.isfinite(np.asanyarray(nibabel.load(path).dataobj)).reshape(voxels.T.shape).T  # type: ignore
    elif np.issubdtype(voxels.dtype, np.floating):
        finite = np.isfinite(voxels)
    else:
        return image, notes
    if not finite.all():
        image, note = _fill(image, finite, path, repair.nan)
        notes.append(note)
    return image, notes


def _fill(image: sitk.Image, finite: np.ndarray, path: Path, value: float | str | None) -> tuple[sitk.Image, str]:
    """Replace NaN and infinity in the image."""
    if value is None:
        raise UserError(f"{path}: has voxels that are NaN or infinite: {FILL}")
    if not finite.any():
        raise UserError(f"{path}: has no finite voxel: remove the case")
    voxels = sitk.GetArrayFromImage(image)
    number = float(voxels[finite].min()) if value == "fill" else float(value)
    voxels[~finite] = number
    filled = sitk.GetImageFromArray(voxels, isVector=image.GetNumberOfComponentsPerPixel() > 1)
    filled.CopyInformation(image)
    return filled, f"{np.count_nonzero(~finite)} voxels that were NaN or infinite are now {number:g} ({path.name})"


def _nifti_spacing(path: Path) -> list[float] | None:
    """The spacing in a NIfTI file if it is not valid, else None. Readers replace 0 by 1, and ITK also replaces NaN."""
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as stream:
            header = nibabel.Nifti1Header.from_fileobj(stream, check=False)
    except Exception:  # not NIfTI-1; its reader will report the reason
        return None
    spacing = [float(s) for s in header["pixdim"][1:4]][: int(header["dim"][0])]
    return None if is_spacing(spacing) else spacing


def _text_spacing(path: Path) -> list[float] | None:
    """The spacing in the header of an NRRD or MetaImage file if it is not valid, else None. These headers are text.

    Empty if it is missing. ITK replaces a missing spacing by 1, in NRRD also NaN. For pictures no spacing is used.
    """
    ending = path.suffix.lower()
    if ending not in DATA_FILE:
        return None
    is_nrrd = ending in (".nrrd", ".nhdr")
    end, wanted, sizes = NRRD if is_nrrd else META_IMAGE
    with open(path, "rb") as stream:
        head = stream.read(1 << 16).replace(b"\r\n", b"\n").partition(end)[0]
    lines = {key.strip().lower(): value.split() for key, value in re.findall(rb"(?m)^([^:=\n]+)[:=](.*)$", head)}
    found = next((lines[key] for key in wanted if key in lines), [])
    if len(lines.get(sizes, ())) < 3 or (is_nrrd and b"space directions" in lines):
        return None
    try:
        spacing = [float(value) for value in found]
    except ValueError:
        return None  # its reader will report the reason
    of_other_axes = sum(kind not in (b"domain", b"space") for kind in lines.get(b"kinds", ()))  # colours have none
    lengths = sum(np.isfinite(s) and s > 0 for s in spacing)
    return None if lengths >= len(lines[sizes]) - of_other_axes else spacing


def _at_right_angles(path: Path, allowed: bool) -> tuple[sitk.Image, str]:
    """Read an image with the nearest axes that are at right angles, because ITK refuses to read other axes."""
    nifti = nibabel.load(path)
    affine = np.diag([-1, -1, 1, 1]) @ nifti.affine  # type: ignore  # RAS to LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and spacing.all() and len(nifti.shape) == 3):  # type: ignore
        raise UserError(f"{path}: its header has no valid axes of a volume: save the file again with another program")
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    direction = left @ right
    corner = np.array(nifti.shape[:3]) - 1  # type: ignore
    shift = np.abs((affine[:3, :3] - direction * spacing) @ corner).max()
    if not allowed:
        raise UserError(
            f"{path}: its axes are not at right angles (a sheared header): with --reorient (an option of convert"
            " folder) the nearest right angles are written, voxels stay as they are, and the far corner moves by"
            f" {shift:.3g} mm; or, in your own raw dataset, let nnU-Net read it as it is:"
            ' "overwrite_image_reader_writer": "NibabelIO" in dataset.json'
        )
    image = sitk.GetImageFromArray(np.asanyarray(nifti.dataobj).T)  # type: ignore
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    return image, f"axes are now at right angles, the far corner is {shift:.3g} mm off ({path.name})"


def grid_difference(image: sitk.Image, expected: sitk.Image) -> tuple[str | None, str | None]:
    """Compare two grids. Returns their difference as an error; if it is only rounding, as a note instead.

    Two grids are equal if all their corners differ by at most `TOLERANCE` of the smallest spacing.
    """
    difference = geometry_difference(image, expected, origin=1e-5)
    if difference is None or image.GetSize() != expected.GetSize():
        return difference, None
    off = np.linalg.norm(corners_of(image) - corners_of(expected), axis=1).max()
    if off <= TOLERANCE * min(expected.GetSpacing()):
        return None, f"{difference}: a rounding error of {off:.2g} mm, so the grid of the first image is taken"
    return difference, None


def corners_of(image: sitk.Image) -> np.ndarray:
    """The centres of the corner voxels, in mm, as an array (2 ** dimensions, dimensions)."""
    ends = [(0, n - 1) for n in image.GetSize()]
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, len(ends))
    return np.array([image.TransformIndexToPhysicalPoint([int(i) for i in corner]) for corner in corners])


def _text(values: Sequence[float]) -> str:
    return " ".join(f"{v:g}" for v in values)
