"""The negative pose: draws by seed, a fixed neck, other proportions in every frame."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.pose.dancers import figure
from xicon_infer.pose.dancer_negative import RANGES, negative_draws, stretch_about_neck


def test_draws_are_those_of_python_for_that_seed_and_frame():
    drawn = negative_draws(5, 42)
    random.seed(42)
    expected = [[random.uniform(*limits) for limits in RANGES] for _ in range(5)]
    assert drawn.tolist() == expected
    np.testing.assert_array_equal(negative_draws(3, 42), drawn[:3])
    assert not np.array_equal(negative_draws(5, 43), drawn)
    assert negative_draws(0, 1).shape == (0, 4)


def test_draws_stay_in_their_ranges():
    drawn = negative_draws(2000, 7)
    low, high = np.array(RANGES).T
    assert (drawn >= low).all()
    assert (drawn <= high).all()
    assert (np.ptp(drawn, axis=0) > 0.9 * (high - low)).all()


@pytest.mark.parametrize("mode", ["robust", "official"])
def test_the_neck_stays_and_everything_is_stretched_about_it(mode):
    film, drawn = figure(3), negative_draws(3, 1)
    moved = stretch_about_neck(film, drawn, mode=mode)
    np.testing.assert_allclose(moved.body[:, 1], film.body[:, 1])
    scale, aspect = drawn[:, 2], drawn[:, 3]
    factor = np.stack([scale * aspect, scale], axis=1)[:, None]
    for before, after in (
        (film.body, moved.body),
        (film.hands[:, 0], moved.hands[:, 0]),
        (film.hands[:, 1], moved.hands[:, 1]),
    ):
        neck = film.body[:, 1:2]
        np.testing.assert_allclose(after - neck, factor * (before - neck), atol=1e-12)


def test_the_offsets_are_not_used():
    film, drawn = figure(2), negative_draws(2, 1)
    base = stretch_about_neck(film, drawn).body
    for column in range(4):
        changed = drawn.copy()
        changed[:, column] *= 0.9
        assert np.array_equal(stretch_about_neck(film, changed).body, base) == (column < 2)


def test_modes_differ_in_hidden_points_and_the_face():
    film, drawn = figure(2), negative_draws(2, 3)
    hands = film.hands.copy()
    hands[:, 1] = -1
    film = replace(film, hands=hands)
    robust, official = (stretch_about_neck(film, drawn, mode=m) for m in ("robust", "official"))
    assert (robust.hands[:, 1] == -1).all()
    assert not (official.hands[:, 1] == -1).any()
    np.testing.assert_array_equal(robust.hands[:, 0], official.hands[:, 0])
    np.testing.assert_allclose(np.ptp(official.face, axis=1), np.ptp(film.face, axis=1))
    factor = np.stack([drawn[:, 2] * drawn[:, 3], drawn[:, 2]], axis=1)
    np.testing.assert_allclose(np.ptp(robust.face, axis=1), factor * np.ptp(film.face, axis=1))
