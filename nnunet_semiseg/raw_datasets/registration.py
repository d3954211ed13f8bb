"""Measure whether the channels of a case are aligned, and align them rigidly if they are not."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from nnunet_semiseg.data.image_problems import one_line_of
from nnunet_semiseg.errors import UserError
from nnunet_semiseg.raw_datasets.repair import corners_of

REGISTER = ("off", "check", "rigid")
"""What to do with channels: do not compare them, report their displacement, or align them with the first one."""
BINS, SHARE, STEPS = 50, 0.2, 200
"""Numbers for the registration: bins of Mattes' histogram, share of the voxels in a step, largest number of steps at
each resolution."""
SMALLEST = 16
"""An image is shrunk only so far that each axis keeps at least this number of voxels."""


def align(moving: sitk.Image, fixed: sitk.Image, channel: str, first: str, how: str) -> tuple[sitk.Image, str]:
    """Align a channel with the first one, and resample it to the grid of the first one.

    Returns the channel, and a note on its displacement.

    A channel is displaced if a corner of the first channel's image must move by more than one voxel (of the smallest
    spacing). Smaller displacements cannot be told from the error of the registration. A channel that is not displaced
    and has the same grid keeps its voxels.

    Args:
        moving, fixed: volumes with one value for each voxel.
        channel, first: the names of both channels.
        how: `rigid` or `check`. With `check` the channel is returned unchanged, on its own grid, with the note.

    Raises:
        UserError: the channel cannot be aligned. Callers put the name of its file before the message.
    """
    if is_constant(moving) or is_constant(fixed):
        return moving, f"{channel}: not compared with {first}: one of them is empty"
    transform, mm = find_rigid(moving, fixed)
    limit = min(fixed.GetSpacing())
    if how == "check":
        advice = ": move it with --register rigid" if mm > limit else ""
        return moving, f"{channel} lies {mm:.1f} mm off {first}{advice}"
    if mm <= limit and same_grid(moving, fixed):
        return moving, f"{channel} lies {mm:.1f} mm off {first}, less than a voxel: not moved"
    outside = float(sitk.GetArrayViewFromImage(moving).min())
    on_grid = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, outside)
    return on_grid, f"{channel} was moved onto {first}, by up to {mm:.1f} mm"


def find_rigid(moving: sitk.Image, fixed: sitk.Image) -> tuple[sitk.Transform, float]:
    """Find the rotation and the shift that align two volumes, by mutual information.

    It starts from the positions in the headers.

    Returns:
        The transform from points of the fixed image to points of the moving one, or the identity if that is as good.
        And the largest distance, in mm, by which the transform moves a corner of the fixed image.

    Raises:
        UserError: the registration fails, usually because the volumes do not overlap.
    """
    fixed, moving = (sitk.Cast(image, sitk.sitkFloat32) for image in (fixed, moving))
    middle = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    identity, transform = sitk.Euler3DTransform(), sitk.Euler3DTransform()
    transform.SetCenter(middle)
    factors = [factor for factor in (4, 2) if min(fixed.GetSize()) // factor >= SMALLEST] + [1]
    method = measure()
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SHARE, 1)  # the seed
    method.SetShrinkFactorsPerLevel(factors)
    method.SetSmoothingSigmasPerLevel([factor / 2 if factor > 1 else 0 for factor in factors])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, STEPS, gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
        before, after = (evaluate(fixed, moving, x) for x in (identity, transform))
    except RuntimeError as error:
        why = one_line_of(error).rpartition("): ")[2].partition(". ")[0]
        raise UserError(
            f"cannot be aligned with the first channel ({why}): remove this case, or align this channel by hand"
        ) from None
    if before <= after:  # less is better
        return identity, 0.0
    corners = corners_of(fixed)
    moved = np.array([transform.TransformPoint(corner.tolist()) for corner in corners])
    return transform, float(np.linalg.norm(moved - corners, axis=1).max())


def measure() -> sitk.ImageRegistrationMethod:
    """Set up SimpleITK's mutual information of two images.

    It uses one thread, because converters have many processes.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    return method


def evaluate(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> float:
    """The negative mutual information of two images, over all voxels."""
    method = measure()
    method.SetInitialTransform(transform)
    return method.MetricEvaluate(fixed, moving)


def is_constant(image: sitk.Image) -> bool:
    """Whether all voxels have the same value, as in a channel that the case lacks."""
    voxels = sitk.GetArrayViewFromImage(image)
    return bool(voxels.min() == voxels.max())


def same_grid(image: sitk.Image, other: sitk.Image) -> bool:
    """Whether the voxels of both images have the same positions, to some thousandths of a millimetre."""
    return image.GetSize() == other.GetSize() and np.allclose(corners_of(image), corners_of(other), atol=1e-3)
