"""Frames without the subject: held, told, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pose.dancers import figure
from xicon_infer.errors import PoseError
from xicon_infer.pose.dancer_lost import hold_lost


def away(frames: int, *missing: int):
    film = figure(frames)
    film.body_visible[list(missing)] = False
    return film


def test_nobody_lost_changes_nothing():
    film = figure(4)
    held, runs = hold_lost(film, anchor_frame=0)
    np.testing.assert_array_equal(held.body, film.body)
    assert runs == []


def test_the_last_pose_is_held():
    film = away(12, 4, 5, 9)
    held, runs = hold_lost(film, anchor_frame=0)
    assert runs == [(4, 5), (9, 9)]
    np.testing.assert_array_equal(held.body[[4, 5, 9]], film.body[[3, 3, 8]])
    np.testing.assert_array_equal(held.hands[5], film.hands[3])
    assert held.body_visible.all()


def test_before_the_first_the_first_is_held():
    film = away(10, 0, 1)
    held, runs = hold_lost(film, anchor_frame=2)
    assert runs == [(0, 1)]
    np.testing.assert_array_equal(held.body[:3], film.body[[2, 2, 2]])
    assert hold_lost(film, anchor_frame=None)[1] == runs


def test_a_missing_anchor_names_a_frame_to_take():
    with pytest.raises(PoseError, match="use anchor_frame=2") as caught:
        hold_lost(away(10, 0, 1), anchor_frame=1)
    assert caught.value.field == "anchor_frame"


def test_up_to_three_in_ten_frames_may_be_lost():
    hold_lost(away(10, 3, 4, 5), anchor_frame=0)
    with pytest.raises(PoseError, match=r"4 of 10 frames.*40%.*at most 30%") as caught:
        hold_lost(away(10, 3, 4, 5, 6), anchor_frame=0)
    assert caught.value.code == "PERSON_LOST"
    with pytest.raises(PoseError, match="1 of 1"):
        hold_lost(away(1, 0), anchor_frame=0)
    assert hold_lost(figure(1), anchor_frame=0)[1] == []
