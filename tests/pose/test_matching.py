"""The cheapest pairing, and what makes two detections one person."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from xicon_infer.pose.matching import assign, find_duplicates, make_look, pair

POINTS = np.zeros((133, 2), np.float32)
POINTS[:17] = np.stack([np.arange(17) * 3, np.arange(17) * 12], axis=1)


def look(boxes, *, shift=None, score=0.9, depths=None, ids=None):
    """Returns persons with the same pose, moved by `shift` pixels each."""
    persons = len(boxes)
    shift = np.zeros((persons, 2)) if shift is None else np.array(shift, float)
    joints = np.zeros((persons, 24, 3), np.float32)
    if depths is not None:
        joints[:, 0, 2] = depths
    return make_look(
        np.array(boxes, np.float32).reshape(persons, 4),
        (POINTS + shift[:, None]).astype(np.float32),
        np.full((persons, 133), score, np.float32),
        joints,
        tuple(ids) if ids else (-1,) * persons,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 10_000))
def test_the_pairing_is_the_cheapest(rows, more, seed):
    costs = np.random.default_rng(seed).integers(0, 6, (rows, rows + more)).astype(float)
    columns = assign(costs)
    assert len(set(columns)) == rows
    assert costs[range(rows), columns].sum() == costs[linear_sum_assignment(costs)].sum()


BOX = (0, 0, 60, 200)


def test_nobody_is_paired_with_nobody():
    someone, nobody = look([BOX]), look([])
    ages = np.array([0.04])
    assert pair(someone, nobody, age_s=ages, frame_s=0.04) == [-1]
    assert pair(nobody, someone, age_s=np.zeros(0), frame_s=0.04) == []


@pytest.mark.parametrize(
    ("move", "age", "same"),
    [(20, 0.04, 1), (80, 0.04, 0), (80, 0.8, 1), (280, 1.9, 1), (330, 1.9, 0)],
)
def test_the_allowed_move_grows_with_time(move, age, same):
    there = look([(move, 0, 60 + move, 200)], shift=[(move, 0)], depths=[3000])
    here = look([BOX], depths=[3000])
    (choice,) = pair(here, there, age_s=np.array([age]), frame_s=0.04)
    assert choice == same - 1


def test_more_unlike_is_allowed_for_who_was_away():
    # Same place and size, another pose and depth.
    there = look([(10, 0, 70, 200)], shift=[(300, 0)], depths=[9000])
    here = look([BOX], depths=[3000])
    middle = look([(30, 0, 90, 200)], shift=[(300, 0)], depths=[9000])
    assert pair(here, there, age_s=np.array([0.04]), frame_s=0.04) == [0]
    assert pair(here, middle, age_s=np.array([0.04]), frame_s=0.04) == [-1]
    assert pair(here, middle, age_s=np.array([0.6]), frame_s=0.04) == [0]


def test_size_and_identity_can_forbid_a_pair():
    ages = np.array([0.04])
    for height, choice in ((82, 0), (78, -1)):
        small = (20, 100 - height / 2, 40, 100 + height / 2)
        assert pair(look([BOX]), look([small]), age_s=ages, frame_s=0.04) == [choice]
    for first, second, choice in ((1, 2, -1), (1, 1, 0), (-1, 2, 0), (1, -1, 0)):
        pairs = pair(look([BOX], ids=[first]), look([BOX], ids=[second]), age_s=ages, frame_s=0.04)
        assert pairs == [choice]


def test_depth_and_pose_decide_between_equal_boxes():
    ages = np.array([0.04, 0.04])
    near_far = look([BOX, BOX], depths=[3000, 5000])
    far_near = look([BOX, BOX], depths=[5000, 3000])
    assert pair(near_far, far_near, age_s=ages, frame_s=0.04) == [1, 0]
    left_right = look([BOX, BOX], shift=[(-10, 0), (10, 0)])
    right_left = look([BOX, BOX], shift=[(10, 0), (-10, 0)])
    assert pair(left_right, right_left, age_s=ages, frame_s=0.04) == [1, 0]


def test_who_was_just_seen_goes_before_who_is_lost():
    expected = look([BOX, BOX])
    assert pair(expected, look([BOX]), age_s=np.array([0.6, 0.04]), frame_s=0.04) == [-1, 0]
    assert pair(expected, look([BOX]), age_s=np.array([0.04, 0.6]), frame_s=0.04) == [0, -1]


def test_a_person_found_twice_is_one():
    half = (5, 5, 55, 110)
    assert find_duplicates(look([BOX, half, BOX])) == [1, 2]
    assert find_duplicates(look([BOX, half], shift=[(0, 0), (30, 0)])) == []
    assert find_duplicates(look([BOX, (100, 0, 160, 200)])) == []
    assert find_duplicates(look([])) == []


def test_bodies_and_identities_keep_persons_apart():
    assert find_duplicates(look([BOX, BOX], depths=[3000, 3100])) == [1]
    assert find_duplicates(look([BOX, BOX], depths=[3000, 3600])) == []
    assert find_duplicates(look([BOX, BOX], ids=[1, 2])) == []
    far = (100, 0, 160, 200)
    assert find_duplicates(look([BOX, far], shift=[(0, 0), (100, 0)], ids=[3, 3])) == [1]


def test_boxes_alone_must_be_all_but_the_same():
    assert find_duplicates(look([BOX, (2, 0, 62, 200)], score=0.1)) == [1]
    assert find_duplicates(look([BOX, (15, 0, 75, 200)], score=0.1)) == []


def test_a_few_common_points_do_not_decide():
    boxes, half = [BOX, (15, 0, 75, 200)], look([BOX, (15, 0, 75, 200)])
    assert find_duplicates(half) == [1]
    for points, expected in ((4, [1]), (3, [])):
        few = half.points.copy()
        few[:, points:] = np.nan
        assert find_duplicates(look(boxes)._replace(points=few)) == expected
