"""The two modalities of an image for Semi-CML: two groups of its channels, or two contrasts of a single channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nnunet_semiseg.data.empty_channels import empty_channels, values_of_nothing
from nnunet_semiseg.errors import UserError


class ChannelGroups(nn.Module):
    """Split an image (B, C, *S) into two modalities (B, C_i, *S), which are groups of its channels.

    An empty channel becomes 0.

    Args:
        groups: the channels of each modality.
        nothing: for each channel its value if it is empty, see `values_of_nothing`.
    """

    nothing: Tensor

    def __init__(self, groups: Sequence[Sequence[int]], nothing: Sequence[float]):
        super().__init__()
        self.groups = tuple(tuple(group) for group in groups)
        self.register_buffer("nothing", torch.tensor(nothing), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        empty = empty_channels(x, self.nothing)
        x = x.masked_fill(empty.view(*empty.shape, *[1] * (x.ndim - 2)), 0)
        return [x[:, list(group)] for group in self.groups]


class TwoContrasts(nn.Module):
    """Show a single channel (B, 1, *S) in two contrasts of the same shape. They take the place of two modalities.

    Args:
        contrasts: two functions of intensities, such as `Window` and `ContrastCurve`.
    """

    def __init__(self, contrasts: Sequence[Callable[[Tensor], Tensor]]):
        super().__init__()
        self.contrasts = tuple(contrasts)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [contrast(x) for contrast in self.contrasts]


class Window:
    """A CT window for a normalised image. It maps level - width / 2 and below to -1, level + width / 2 and above to 1.

    Args:
        level, width: in HU.
        mean, std: the mean and standard deviation that nnU-Net's `CTNormalization` uses, in HU.
    """

    def __init__(self, level: float, width: float, mean: float, std: float):
        self.centre, self.half_width = (level - mean) / std, width / (2 * std)

    def __call__(self, x: Tensor) -> Tensor:
        return ((x - self.centre) / self.half_width).clamp(-1, 1)


class ContrastCurve:
    """Change z-scores x to 2 sigmoid(x)^gamma - 1.

    A gamma below 1 gives contrast to dark values, above 1 to bright ones.
    """

    def __init__(self, gamma: float):
        self.gamma = gamma

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x.sigmoid() ** self.gamma - 1


def halves(n_channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide the channels 0 to n - 1 into two groups. If n is odd, the second group has one channel more."""
    middle = n_channels // 2
    return tuple(range(middle)), tuple(range(middle, n_channels))


def is_ct(configuration_manager) -> bool:
    """Whether nnU-Net normalises the first channel as CT."""
    return configuration_manager.normalization_schemes[0] == "CTNormalization"


def kept_range(plans_manager) -> tuple[float, float]:
    """The intensities, in HU, that nnU-Net's CT normalisation does not clip."""
    about = plans_manager.foreground_intensity_properties_per_channel["0"]
    return about["percentile_00_5"], about["percentile_99_5"]


def two_thirds(low: float, high: float) -> list[tuple[float, float]]:
    """The level and the width of two windows: the lower two thirds and the upper two thirds of a range."""
    third = (high - low) / 3
    return [(low + third, 2 * third), (high - third, 2 * third)]


def check_modalities(settings, n_channels: int, plans_manager, configuration_manager) -> None:
    """Refuse settings of `SemiCMLTrainer` that do not fit the data set.

    Raises:
        UserError: there is one channel, and `modalities` or `modality_dropout` is set, or CT windows are asked for, but
            the images are not CT; there are several channels, and `modality_views` is set; a group is empty, or has a
            channel that does not exist or is in a group already; or see `check_windows`.
    """
    groups = settings.modalities
    if n_channels == 1:
        for name, without in (("modalities", "null"), ("modality_dropout", "0")):
            if value := getattr(settings, name):
                one = "the dataset has a single channel"
                raise UserError(f"setting {name}={json.dumps(value)}: {one}: set it to {without}")
        if settings.modality_views == "ct_windows" and not is_ct(configuration_manager):
            raise UserError("setting modality_views=ct_windows: the images are not CT: set it to contrast")
        if settings.ct_windows and is_ct(configuration_manager):
            check_windows(settings.ct_windows, *kept_range(plans_manager))
    elif settings.modality_views != "auto":
        raise UserError(
            f"setting modality_views={settings.modality_views}: the dataset has {n_channels} channels, which are used"
            " as modalities: set it to auto"
        )
    elif groups:
        listed = [channel for group in groups for channel in group]
        if not all(groups) or len(set(listed)) < len(listed) or not set(listed) <= set(range(n_channels)):
            raise UserError(
                f"setting modalities={[list(group) for group in groups]}: must be two lists of different channels"
                f" from 0 to {n_channels - 1}"
            )


def check_windows(windows, low: float, high: float) -> None:
    """Refuse two windows that both show the whole range, and a window that shows nothing of it.

    Args:
        windows: the level and the width of each, in HU.
        low, high: the range, in HU.

    Raises:
        UserError: the windows are of no use.
    """
    bounds = [(level - width / 2, level + width / 2) for level, width in windows]
    if all(a <= low and high <= b for a, b in bounds) or any(b <= low or high <= a for a, b in bounds):
        raise UserError(
            f"setting ct_windows={[list(window) for window in windows]}: nnU-Net keeps {low:g} to {high:g} HU of these"
            " images: both windows show all of it, or one shows nothing: choose other ones, or null"
        )


def make_modalities(settings, n_channels: int, plans_manager, configuration_manager) -> tuple[nn.Module, list[int]]:
    """A module that turns an image (B, C, *S) into its two modalities, and the number of channels of each."""
    if n_channels == 1:
        return make_two_contrasts(settings, plans_manager, configuration_manager), [1, 1]
    groups = settings.modalities or halves(n_channels)
    nothing = values_of_nothing(plans_manager, configuration_manager)
    return ChannelGroups(groups, nothing), [len(group) for group in groups]


def make_two_contrasts(settings, plans_manager, configuration_manager) -> TwoContrasts:
    """Make CT windows or contrast curves, as `modality_views` says. With `auto`, CT gets windows, all else curves."""
    kind = settings.modality_views
    if kind == "ct_windows" or kind == "auto" and is_ct(configuration_manager):
        about = plans_manager.foreground_intensity_properties_per_channel["0"]
        windows = settings.ct_windows or two_thirds(*kept_range(plans_manager))
        return TwoContrasts([Window(level, width, about["mean"], about["std"]) for level, width in windows])
    return TwoContrasts([ContrastCurve(gamma) for gamma in settings.contrast_gammas])


def draw_present(groups, images: Tensor, p: float) -> Tensor:
    """Draw which channels are shown, (B, C, 1, ..., 1) of 0 and 1.

    With probability p a sample loses one of its two groups.

    Both groups are lost equally often. If a sample has only one group, because the other one is 0 everywhere, it keeps
    this group.

    Args:
        groups: the channels of both groups.
        images: (B, C, *S).
    """
    drawn = torch.rand(len(images), device=images.device)
    keep = images.new_ones(images.shape[:2])
    for i, group in enumerate(groups):
        has_other = (images[:, list(groups[1 - i])] != 0).flatten(1).any(1)
        lost = (i * p / 2 <= drawn) & (drawn < (i + 1) * p / 2) & has_other
        keep[:, list(group)] = (~lost).to(keep.dtype)[:, None]
    return keep.view(*keep.shape, *[1] * (images.ndim - 2))
