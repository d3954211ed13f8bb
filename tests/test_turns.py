import pytest
import torch

from nnunet_semiseg.training.turns import Turn, draw_turn, planes_to_turn_in

SQUARE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]


@pytest.mark.parametrize(
    "turn, result",
    [
        (Turn(), [[1, 2], [3, 4]]),
        (Turn(flips=(0,)), [[3, 4], [1, 2]]),
        (Turn(flips=(0, 1)), [[4, 3], [2, 1]]),
        (Turn(quarters=1), [[2, 4], [1, 3]]),
        (Turn(flips=(1,), quarters=2), [[3, 4], [1, 2]]),  # flipped: [[2, 1], [4, 3]]; then by 180 degrees
    ],
)
def test_a_flip_and_then_a_turn(turn, result):
    assert turn(SQUARE)[0, 0].tolist() == result


def test_image_and_label_are_turned_alike_in_3d():
    image = torch.arange(2 * 3 * 3.0).view(1, 1, 2, 3, 3)
    turn = Turn(flips=(0,), plane=(1, 2), quarters=3)
    label = (image > 10).short()
    assert turn(image).shape == image.shape and torch.equal(turn(image) > 10, turn(label).bool())
    assert turn(image).is_contiguous() and turn(label).dtype == torch.int16


def test_draws_reach_all_flips_and_turns_and_no_axis_that_is_not_asked_for():
    torch.manual_seed(0)
    drawn = {draw_turn((0, 2), [(0, 2)]) for _ in range(200)}
    assert len(drawn) == 16  # 2 x 2 flips, 4 turns
    assert {draw_turn((1,), []) for _ in range(50)} == {Turn(), Turn(flips=(1,))}
    assert draw_turn((), []) == Turn()


@pytest.mark.parametrize(
    "axes, patch, spacing, planes",
    [
        ((0, 1, 2), (24, 40, 24), (1, 1, 1), [(0, 2)]),
        ((0, 1, 2), (32, 32, 32), (3, 1, 1.05), [(1, 2)]),  # voxels of 3 mm are no others' size
        ((0, 1), (128, 128), (1.4, 1.4), [(0, 1)]),
        ((0,), (128, 128), (1, 1), []),  # texts name left and right
        ((), (128, 128), (1, 1), []),
    ],
)
def test_turns_are_within_planes_of_equal_sides_that_may_be_mirrored(axes, patch, spacing, planes):
    assert planes_to_turn_in(axes, patch, spacing) == planes
