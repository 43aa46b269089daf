"""What alignment refuses, what it leaves alone, and what must never crash it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.pose.fitting import SIZE, align, driver, hidden, picture_of
from tests.pose.people import with_scores, without_body
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.align import align_tracks, why_refused
from xicon_infer.pose.align_overlay import face_ratio
from xicon_infer.pose.align_solver import WIDE_BOUNDS, Bounds, CameraFit
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.render import render_track
from xicon_infer.pose.skeleton import FACE, LEFT_HAND, RIGHT_HAND

LEGS = slice(11, 17)

# Each breaks one rule alone: camera [f, cx, cy] on a 192 x 128 canvas, p, q and error.
GOOD = {"focal": 184.0, "p": 0.0, "q": 0.0, "error": 1.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"focal": np.nan}, "not finite"),
        ({"p": 100.0}, "shift"),
        ({"q": -150.0}, "shift"),
        ({"cx": 190.0}, "outside"),
        ({"focal": 420.0}, "fills"),
        ({"error": 40.0}, "miss"),
    ],
)
def test_each_rail_refuses(change, reason):
    points = np.array([[-400, -600, 2000], [400, 600, 2000], [0, 0, 2000], [50, 0, 2000]], float)
    values = GOOD | change
    camera = default_intrinsics(*SIZE)
    camera[[0, 1], [0, 1]] = values["focal"]
    camera[0, 2] = values.get("cx", camera[0, 2])
    fit = CameraFit(camera, 1.0, 1.0, values["p"], values["q"], values["error"])
    said = why_refused(fit, points, SIZE)
    assert reason in said if reason else said == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"p": 110}, "shift"), ({"m": 4, "s": 1.0}, "outside")],
)
def test_a_refused_solution_leaves_the_person_alone(change, reason):
    track = driver()
    reference = picture_of(track, **change)
    (left,), alignment = align(track, reference, bounds=WIDE_BOUNDS)
    assert (alignment.mode, reason in alignment.reason) == ("skipped", True)
    assert (alignment.m, alignment.p, alignment.reprojection_error_px) == (1, 0, None)
    assert np.array_equal(left.pose.keypoints, track.pose.keypoints)
    (taken,), alignment = align(track, reference, bounds=WIDE_BOUNDS, guard=False)
    assert alignment.mode == "down"
    assert not np.allclose(taken.pose.keypoints, track.pose.keypoints, atol=1)


def test_too_few_confident_joints_are_not_enough():
    track = driver()
    few = hidden(picture_of(track, p=5), slice(0, 5), slice(7, 17), score=0.2)
    _, alignment = align(track, few)
    assert alignment.mode == "skipped" and "shows 3 joints" in alignment.reason
    _, alignment = align(track, few, guard=False)
    assert alignment.mode == "central"
    _, alignment = align(track, hidden(few, slice(0, 133)), guard=False)
    assert alignment.mode == "skipped"


def test_a_half_length_reference_is_fitted_by_the_upper_body():
    track = driver()
    reference = hidden(picture_of(track, m=2.0, q=60), LEGS)
    _, narrow = align(track, reference)
    _, wide = align(track, reference, bounds=WIDE_BOUNDS)
    assert (narrow.mode, wide.mode) == ("central", "central")
    assert (narrow.m, wide.m) == (pytest.approx(1.4), pytest.approx(2.0, abs=0.01))
    assert wide.reprojection_error_px < narrow.reprojection_error_px
    assert set(wide.joints) == {0, 1, 2, 3, 5, 6}


MISSING = {
    "face": (FACE,),
    "one hand": (LEFT_HAND,),
    "hands and face": (FACE, LEFT_HAND, RIGHT_HAND),
    "head": (slice(0, 5), FACE),
    "centres": (0, FACE.start + 30, LEFT_HAND.start),
}


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("place", [None, -1.0, 0.0, np.nan])
@pytest.mark.parametrize("what", sorted(MISSING))
def test_missing_points_never_crash(what, place, guard):
    track = driver()
    reference = hidden(picture_of(track, m=1.1, p=5), *MISSING[what], place=place)
    points = track.pose.keypoints.copy()
    for part in MISSING[what]:
        track = with_scores(track, part, slice(None), 0.0)
        if place is not None:
            points[:, part] = place
    track = replace(track, pose=replace(track.pose, keypoints=points))
    (aligned,), alignment = align(track, reference, guard=guard)
    assert alignment.mode == "down"
    assert np.isfinite(aligned.pose.keypoints).all()
    render_track([aligned], width=128, height=192)


def test_a_face_that_loses_its_centre_stays_in_place():
    track = driver()
    centre = FACE.start + 30
    points = track.pose.keypoints.copy()
    points[2, centre] = 0
    lost = with_scores(track, slice(centre, centre + 1), [2], 0.0)
    lost = replace(lost, pose=replace(lost.pose, keypoints=points))
    reference = picture_of(track, m=1.2)
    seen = [i for i in range(FACE.start, FACE.stop) if i != centre]
    whole, kept, thrown = (
        align(t, reference, guard=guard)[0][0].pose.keypoints[2, seen].mean(axis=0)
        for t, guard in ((track, True), (lost, True), (lost, False))
    )
    # The fixed point differs by half a face, and so the place by a fifth of that.
    assert np.abs(kept - whole).max() < 1.5
    assert np.abs(thrown - whole).max() > 5


def test_few_common_face_points_measure_nothing():
    rng = np.random.default_rng(0)
    face, centre = rng.uniform(20, 60, (68, 2)), 30
    usable = np.zeros(68, bool)
    usable[[centre, *range(8)]] = True
    assert face_ratio(1.2 * face, face, size=SIZE, usable=usable) == 1.0
    usable[8] = True
    assert face_ratio(1.2 * face, face, size=SIZE, usable=usable) == pytest.approx(1.2)
    usable[9] = True
    usable[centre] = False
    assert face_ratio(1.2 * face, face, size=SIZE, usable=usable) == 1.0
    assert face_ratio(1.2 * face, np.zeros((68, 2)), size=SIZE) == 1.0


def test_without_guard_the_face_is_measured_in_the_first_frame():
    track = without_body(driver(), [0])
    track.pose.keypoints[0, FACE] *= 1.1
    reference = picture_of(driver(), m=1.3)
    scales = [align(track, reference, guard=guard)[1].face_scale for guard in (True, False)]
    assert scales == pytest.approx([1.3, 1.3 / 1.1], abs=1e-3)


def test_reference_points_that_are_no_numbers_are_not_targets():
    for name in ("keypoints", "scores"):
        reference = picture_of(driver(), m=1.1)
        getattr(reference, name)[0, 13] = np.nan
        _, alignment = align(driver(), reference)
        assert alignment.m == pytest.approx(1.1, abs=1e-3)
        assert alignment.joints == (1, 0, 2, 3, 5, 6)


def test_a_driver_without_a_neck_is_fitted_by_the_rest():
    track = driver()
    track.body.joints[:, 12] = 0
    _, alignment = align(track, picture_of(track, m=1.1))
    assert alignment.joints == (9, 10, 12, 13)
    assert alignment.m == pytest.approx(1.1, abs=1e-3)


def test_nobody_in_the_driver_is_said():
    track = without_body(driver(2), slice(None))
    _, alignment = align(track, picture_of(driver()))
    assert (alignment.mode, alignment.frame) == ("skipped", -1)
    assert "no person" in alignment.reason


def test_joints_behind_the_camera_are_left_out():
    track = driver()
    track.body.joints[:, 7, 2] = -100
    (aligned,), alignment = align(track, picture_of(driver(), m=1.1))
    assert alignment.mode == "central" and 13 not in alignment.joints
    assert not aligned.body.joints[:, 7].any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "head"),
        ("bounds", Bounds((0.0, 1.4), (0.8, 1.15))),
        ("bounds", Bounds((0.7, 1.4), (1.1, 1.15))),
        ("bounds", Bounds((0.7, float("inf")), (0.8, 1.15))),
        ("fit", "stretch"),
        ("reference_fit", "stretch"),
    ],
)
def test_wrong_options_are_refused(field, value):
    with pytest.raises(InvalidRequest) as caught:
        align(driver(), picture_of(driver()), **{field: value})
    assert caught.value.field == ("fit" if "fit" in field else field)


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(PoseError, match="one frame"):
        align(driver(), driver().pose)
    short = picture_of(driver())
    with pytest.raises(PoseError, match="133"):
        align(driver(), replace(short, keypoints=short.keypoints[:, :17]))
    with pytest.raises(InvalidRequest, match="at least one"):
        align_tracks([], short, size=SIZE)
