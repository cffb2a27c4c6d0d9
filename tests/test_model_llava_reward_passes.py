"""Which samples show one picture, and how a batch is cut into passes; worked out by hand, without a network."""

from __future__ import annotations

import numpy as np
import pytest

from model.llava_reward.passes import Cost, picture_numbers, plan_passes

Arrays = dict[str, np.ndarray]


def arrays(pixels: np.ndarray, *ids: int, **others: np.ndarray) -> Arrays:
    return {"pixels": pixels, "input_ids": np.array(ids, dtype=np.int32), **others}


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (112, 112, 3), dtype=np.uint8)


# --- one picture or another ---


def test_pictures_are_told_by_their_values_and_not_by_their_captions() -> None:
    samples = [arrays(picture(0), 1), arrays(picture(1), 1), arrays(picture(0), 2), arrays(picture(1).copy(), 3)]
    assert picture_numbers(samples) == [0, 1, 0, 1]
    assert picture_numbers([]) == []


@pytest.mark.parametrize("where", [0, 1, 777, 112 * 112 * 3 - 1])
def test_one_other_value_is_another_picture(where: int) -> None:
    other = picture(0).copy()
    other.reshape(-1)[where] ^= 1
    assert picture_numbers([arrays(picture(0)), arrays(other), arrays(picture(0)), arrays(other)]) == [0, 1, 0, 1]


def test_equal_values_in_another_shape_are_another_picture() -> None:
    flat = np.zeros((112, 224, 3), dtype=np.uint8)
    assert picture_numbers([arrays(flat), arrays(flat.transpose(1, 0, 2)), arrays(flat.copy())]) == [0, 1, 0]


def test_everything_that_is_made_of_the_picture_counts() -> None:
    sizes = [np.array(size) for size in ((90, 200), (91, 200), (90, 200))]
    assert picture_numbers([arrays(picture(0), image_size=size) for size in sizes]) == [0, 1, 0]


# --- passes ---


def costs(*rows: tuple[int, int, str]) -> dict[int, Cost]:
    """From (tokens, of them before the caption, group)."""
    return {i: Cost(*row) for i, row in enumerate(rows)}


def test_samples_alone_are_padded_to_the_longest() -> None:
    alone = costs((100, 90, "a"), (200, 90, "b"), (150, 90, "c"), (50, 40, "d"))
    # Longest first: 200 + 200 = 2 x 200 <= 400, a third row would make 3 x 200; then 2 x 100.
    assert plan_passes(alone, 400) == [[1, 2], [0, 3]]
    assert plan_passes(alone, 1) == [[1], [2], [0], [3]]


def test_a_group_counts_what_it_shares_once() -> None:
    captions = costs(*[(100, 90, "a")] * 5)
    assert plan_passes(captions, 140) == [[0, 1, 2, 3, 4]]  # 90 + 5 x 10
    assert plan_passes(captions, 139) == [[0, 1, 2, 3], [4]]
    # One by one these would be five passes: 2 x 100 > 139.
    assert len(plan_passes(costs(*[(100, 90, name) for name in "abcde"]), 139)) == 5


def test_groups_stay_together_beside_others() -> None:
    mixed = costs((100, 90, "a"), (100, 90, "b"), (95, 90, "a"), (120, 90, "c"), (96, 90, "a"))
    # c alone takes 120; a takes 90 + 10 + 5 + 6 = 111; b takes another 120, since it is padded to c.
    assert plan_passes(mixed, 231) == [[3, 0, 4, 2], [1]]
    assert plan_passes(mixed, 351) == [[3, 0, 4, 2, 1]]


def test_a_long_picture_still_takes_captions_along() -> None:
    # 1000 stand before each caption. A quarter of 400 is 100: ten captions of 10, though 1100 exceeds the limit.
    assert plan_passes(costs(*[(1010, 1000, "a")] * 12), 400) == [[*range(10)], [10, 11]]
    # A caption longer than that quarter goes alone.
    assert plan_passes(costs(*[(1150, 1000, "a")] * 2), 400) == [[0], [1]]


def test_every_sample_is_in_one_pass() -> None:
    draw = np.random.default_rng(3)
    many = costs(*((90 + int(draw.integers(1, 80)), 90, str(draw.integers(9))) for _ in range(60)))
    for limit in (1, 200, 500, 5000):
        assert sorted(i for indices in plan_passes(many, limit) for i in indices) == list(many)
