"""Alignment: bones get the reference's lengths, and what cannot be measured is replaced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pose.dancers import SIZE, figure, hide_joints, with_body
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.dancer_align import (
    MAX_RATIO,
    MIN_RATIO,
    SCALE_NAMES,
    apply_alignment,
    lay_on_canvas,
    measure,
)
from xicon_infer.pose.dancer_points import rows

RATIO = SIZE[1] / SIZE[0]
BONES = [(2, 3), (3, 4), (5, 6), (6, 7), (8, 9), (9, 10), (11, 12), (12, 13), (0, 1)]


def fitted(reference, driver, **options):
    ratios = {"driving_ratio": RATIO, "canvas_ratio": RATIO} | options
    alignment = measure(reference, rows(driver, [0]), **ratios)
    return apply_alignment(driver, alignment), alignment


def length(person, frame, bone, ratio=RATIO):
    points = person.body[frame] * [ratio, 1]
    return np.linalg.norm(points[bone[0]] - points[bone[1]])


def stretched(person, seed=0):
    """Returns the person with other proportions, symmetric: each part of the body its own."""
    rng = np.random.default_rng(seed)
    names = dict(zip(SCALE_NAMES, rng.uniform(0.6, 1.6, len(SCALE_NAMES)), strict=True))
    alignment = measure(person, person, driving_ratio=RATIO, canvas_ratio=RATIO)
    return apply_alignment(person, replace(alignment, scales=names)), names


@pytest.mark.parametrize("mode", ["robust", "official"])
def test_a_driver_like_the_reference_is_left_alone(mode):
    film = figure(3)
    moved, alignment = fitted(film, film, mode=mode)
    assert set(alignment.scales) == set(SCALE_NAMES)
    np.testing.assert_allclose(list(alignment.scales.values()), 1)
    for part in ("body", "hands", "face"):
        np.testing.assert_allclose(getattr(moved, part), getattr(film, part), atol=1e-12)


@pytest.mark.parametrize("mode", ["robust", "official"])
def test_the_anchor_frame_gets_the_references_bones_and_place(mode):
    film = figure(3)
    reference, names = stretched(rows(film, [0]), 1)
    reference = with_body(reference, reference.body + np.array([0.05, -0.03]))
    moved, alignment = fitted(reference, film, mode=mode)
    for name in set(SCALE_NAMES) - {"hand"}:
        assert alignment.scales[name] == pytest.approx(names[name])
    assert alignment.scales["hand"] == pytest.approx((names["arm_upper"] + names["arm_lower"]) / 2)
    np.testing.assert_allclose(moved.body[0], reference.body[0], atol=1e-12)
    # Later frames: the same bones, longer by the same factor, in the driver's directions.
    for bone in BONES:
        factor = length(moved, 0, bone) / length(film, 0, bone)
        assert length(moved, 2, bone) == pytest.approx(factor * length(film, 2, bone))
    # The way of the neck is the driver's.
    np.testing.assert_allclose(np.diff(moved.body[:, 1], axis=0), np.diff(film.body[:, 1], axis=0))


def test_both_modes_agree_where_everything_is_visible():
    film, reference = figure(4), stretched(figure(), 2)[0]
    robust, official = (fitted(reference, film, mode=m)[0] for m in ("robust", "official"))
    np.testing.assert_allclose(robust.body, official.body)
    np.testing.assert_allclose(robust.hands, official.hands)


def test_the_face_follows_the_nose_in_the_robust_mode_alone():
    film, reference = figure(2), stretched(figure(), 3)[0]
    for mode, follows in (("robust", True), ("official", False)):
        moved, alignment = fitted(reference, film, mode=mode)
        before = film.face - film.body[:, :1]
        grown = (alignment.scales["face_left"] + alignment.scales["face_right"]) / 2
        expected = moved.body[:, :1] + grown * before
        assert np.allclose(moved.face, expected) == follows


@pytest.mark.parametrize(
    ("hidden", "changed"),
    [
        ((3,), {"arm_upper", "arm_lower"}),
        ((16,), {"face_left"}),
        ((8,), {"body_len", "leg_upper"}),
        ((9, 12), {"leg_upper", "leg_lower"}),
    ],
)
def test_a_hidden_joint_is_not_measured(hidden, changed):
    film, reference = figure(), stretched(figure(), 4)[0]
    whole = fitted(reference, film)[1]
    wrong = film.body.copy()
    wrong[:, list(hidden)] += 0.3
    guessed = hide_joints(with_body(film, wrong), *hidden)
    part = fitted(reference, guessed)[1]
    assert set(part.replaced) == changed
    for name in set(SCALE_NAMES) - changed - {"hand"}:
        assert part.scales[name] == pytest.approx(whole.scales[name])
    official = fitted(reference, guessed, mode="official")[1]
    assert not official.replaced
    assert any(abs(official.scales[n] - whole.scales[n]) > 0.05 for n in changed)


def test_replacements_come_from_the_other_side_then_from_the_mean():
    film = figure()
    reference, names = stretched(film, 5)
    _, one_arm = fitted(reference, hide_joints(film, 3))
    assert one_arm.scales["arm_upper"] == pytest.approx(names["arm_upper"])
    _, one_ear = fitted(reference, hide_joints(film, 16))
    assert one_ear.scales["face_left"] == pytest.approx(names["face_right"])
    _, no_legs = fitted(hide_joints(reference, 9, 10, 12, 13), film)
    measured = [n for n in SCALE_NAMES if n not in ("hand", "leg_upper", "leg_lower")]
    mean = np.mean([names[name] for name in measured])
    assert no_legs.scales["leg_upper"] == pytest.approx(mean)
    assert no_legs.scales["leg_lower"] == pytest.approx(mean)
    assert "mean" in no_legs.replaced["leg_upper"]


@pytest.mark.parametrize("which", ["driver", "both"])
def test_a_bone_without_length_is_replaced_or_ruins_the_official_picture(which):
    film, reference = figure(2), stretched(figure(), 6)[0]
    flat = film.body.copy()
    flat[:, [10, 13]] = flat[:, [9, 12]]
    if which == "both":
        theirs = reference.body.copy()
        theirs[:, [10, 13]] = theirs[:, [9, 12]]
        reference = with_body(reference, theirs)
    moved, alignment = fitted(reference, with_body(film, flat))
    assert "leg_lower" in alignment.replaced
    assert np.isfinite(moved.body).all()
    np.testing.assert_allclose(moved.body[:, 10], moved.body[:, 9])
    official, kept = fitted(reference, with_body(film, flat), mode="official")
    if which == "both":
        assert kept.scales["leg_lower"] == 1
    else:
        assert kept.scales["leg_lower"] == np.inf
        # The sentinel, moved with everything else.
        expected = (np.array([-1, -1]) + kept.offset) / [RATIO, 1]
        np.testing.assert_allclose(official.body[:, [10, 13]], np.tile(expected, (2, 2, 1)))


@pytest.mark.parametrize(("factor", "limit"), [(0.01, MAX_RATIO), (100.0, MIN_RATIO)])
def test_ratios_are_kept_within_belief(factor, limit):
    film = figure()
    body = film.body.copy()
    body[:, 2] = body[:, 1] + factor * (body[:, 2] - body[:, 1])
    body[:, 5] = body[:, 1] + factor * (body[:, 5] - body[:, 1])
    _, alignment = fitted(film, with_body(film, body))
    assert alignment.scales["shoulder"] == limit
    assert "kept within" in alignment.replaced["shoulder"]


def test_hidden_points_stay_hidden_or_move_with_the_picture():
    film, reference = figure(2), stretched(figure(), 7)[0]
    reference = with_body(reference, reference.body + 0.1)
    hands = film.hands.copy()
    hands[:, 0] = -1
    film = replace(film, hands=hands)
    robust, _ = fitted(reference, film)
    assert (robust.hands[:, 0] == -1).all()
    official, kept = fitted(reference, film, mode="official")
    expected = (np.array([-1, -1]) + kept.offset) / [RATIO, 1]
    np.testing.assert_allclose(official.hands[0, 0, 0], expected)
    np.testing.assert_allclose(robust.hands[:, 1], official.hands[:, 1])


def test_the_aspects_of_both_pictures_count():
    film, reference = figure(2), stretched(figure(), 8)[0]
    base = fitted(reference, film)[0].body
    for name in ("driving_ratio", "canvas_ratio"):
        assert not np.allclose(fitted(reference, film, **{name: 1.3})[0].body, base)


def test_nothing_in_common_is_said():
    with pytest.raises(PoseError, match="no bone of the body in common") as caught:
        fitted(hide_joints(figure(), *range(18)), figure())
    assert caught.value.code == "NOTHING_TO_ALIGN"
    with pytest.raises(InvalidRequest, match="robust, official"):
        fitted(figure(), figure(), mode="other")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_the_robust_mode_gives_believable_numbers_for_any_joints(seed, share):
    rng = np.random.default_rng(seed)

    def invented():
        body = rng.normal(0.5, 0.4, (1, 18, 2)) * rng.choice([1, 0, 1e6, 1e-9], (1, 18, 1))
        return replace(
            with_body(figure(), body), body_visible=rng.random((1, 18)) < 0.5 + share / 2
        )

    reference, driver = invented(), invented()
    try:
        moved, alignment = fitted(reference, driver)
    except PoseError:
        return
    assert all(MIN_RATIO <= scale <= MAX_RATIO for scale in alignment.scales.values())
    assert np.isfinite(moved.body).all()
    assert np.isfinite(moved.hands).all()


@pytest.mark.parametrize(("fit", "expected"), [("crop", 2.0), ("pad", 1.0)])
def test_a_frame_is_laid_on_the_picture_whole(fit, expected):
    film = figure(1, size=(100, 100))
    hands = film.hands.copy()
    hands[:, 0, 3] = -1
    film = replace(film, hands=hands)
    laid = lay_on_canvas(film, (100, 100), (100, 200), fit)
    middle = laid.body * [200, 100] - [100, 50]
    np.testing.assert_allclose(middle, expected * (film.body * 100 - 50), atol=1e-9)
    assert (laid.hands[:, 0, 3] == -1).all()
    assert lay_on_canvas(film, (100, 100), (100, 200), "stretch") is film
