"""Fitting a driver to a reference: identity, place and size of the result, options.

The parity of camera, points and pictures with the graph's node is in test_golden.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.pose.fitting import SIZE, align, driver, hidden, picture_of
from tests.pose.people import moved, without_body
from xicon_infer.pose.align import (
    AlignOptions,
    align_tracks,
    choose_joints,
    joint_weights,
    to_canvas,
)
from xicon_infer.pose.align_solver import WIDE_BOUNDS, Bounds
from xicon_infer.pose.camera import project
from xicon_infer.pose.render import RenderOptions, render_track
from xicon_infer.pose.skeleton import FACE, LEFT_HAND, RIGHT_HAND, SMPL_HEAD


def spread(points):
    return np.ptp(points, axis=-2)


@pytest.mark.parametrize("variant", ["official", "node"])
@pytest.mark.parametrize("guard", [True, False])
def test_nothing_happens_if_the_reference_is_the_driver(variant, guard):
    track = driver()
    (same,), alignment = align(track, picture_of(track), variant=variant, guard=guard)
    assert alignment.mode == "down"
    done = [alignment.m, alignment.s, alignment.p, alignment.q, alignment.face_scale]
    assert np.allclose(done, [1, 1, 0, 0, 1], atol=1e-3)
    assert np.allclose(same.pose.keypoints, track.pose.keypoints, atol=0.02)
    assert np.allclose(same.pose.bboxes, track.pose.bboxes, atol=0.02)
    assert np.allclose(same.body.intrinsics, track.body.intrinsics, atol=0.02)


@pytest.mark.parametrize("variant", ["official", "node"])
def test_the_person_goes_where_the_reference_is(variant):
    track = driver()
    reference = picture_of(track, m=0.9, s=1.1, p=6, q=-4)
    (aligned,), alignment = align(track, reference, variant=variant)
    done = [alignment.m, alignment.s, alignment.p, alignment.q]
    assert np.allclose(done, [0.9, 1.1, 6, -4], atol=0.01)
    assert alignment.reprojection_error_px < 0.01
    # Knees and ankles of the first frame, drawn by the new camera, cover those of the reference.
    legs = project(aligned.body.joints[0, [4, 5, 7, 8]], aligned.body.intrinsics)
    assert np.allclose(legs, reference.keypoints[0, 13:17], atol=0.05)
    # The head follows its joint; a box follows the picture.
    head = project(aligned.body.joints[:, SMPL_HEAD], aligned.body.intrinsics)
    assert np.allclose(aligned.pose.keypoints[:, 0], head, atol=0.05)
    sides = np.array([0.9, 0.99, 0.9, 0.99]) * (track.pose.bboxes - np.array([64, 96, 64, 96]))
    assert np.allclose(aligned.pose.bboxes, sides + np.array([70, 92, 70, 92]), atol=0.05)


def test_bones_and_inputs_stay_as_they_are():
    track = driver()
    reference = picture_of(track, m=1.2, p=9)
    arrays = [
        track.pose.keypoints,
        track.pose.scores,
        track.pose.bboxes,
        track.body.joints,
        track.body.intrinsics,
        reference.keypoints,
        reference.scores,
    ]
    before = [a.copy() for a in arrays]
    (aligned,), _ = align(track, reference)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))
    assert np.array_equal(aligned.body.joints, track.body.joints)
    assert np.array_equal(aligned.pose.scores, track.pose.scores)
    assert not np.allclose(aligned.pose.keypoints, track.pose.keypoints)


def test_hands_keep_to_their_wrists_and_scale_with_the_picture():
    track = driver()
    (aligned,), alignment = align(track, picture_of(track, m=1.2, s=0.9, p=5))
    growth = np.array([alignment.m, alignment.m * alignment.s])
    for hand, wrist in ((LEFT_HAND, 20), (RIGHT_HAND, 21)):
        way = project(track.body.joints[:, wrist], aligned.body.intrinsics) - project(
            track.body.joints[:, wrist], track.body.intrinsics
        )
        gone = aligned.pose.keypoints[:, hand.start] - track.pose.keypoints[:, hand.start]
        assert np.allclose(gone, way, atol=1e-3)
        now, then = spread(aligned.pose.keypoints[:, hand]), spread(track.pose.keypoints[:, hand])
        assert np.allclose(now / then, growth, atol=1e-3)


def test_the_face_grows_like_the_reference_within_limits():
    track = driver()
    for m, expected in ((1.3, 1.3), (0.5, 0.8), (2.0, 1.5)):
        (aligned,), alignment = align(track, picture_of(track, m=m), bounds=WIDE_BOUNDS)
        assert alignment.face_scale == pytest.approx(expected, abs=1e-3)
        now, then = spread(aligned.pose.keypoints[:, FACE]), spread(track.pose.keypoints[:, FACE])
        assert np.allclose(now / then, expected, atol=1e-3)


def test_tracks_come_back_on_the_canvas():
    track = driver()
    reference = picture_of(track, p=4)
    canvas = (256, 256)
    for fit in ("crop", "pad"):
        (aligned,), done = align_tracks(
            [track], reference, size=canvas, options=AlignOptions(fit=fit, reference_fit=fit)
        )
        assert aligned.pose.size == canvas
        scale = 256 / (128 if fit == "crop" else 192)
        assert np.allclose([done.m, done.s, done.p], [1, 1, 4 * scale], atol=0.02)


@pytest.mark.parametrize("mode", ["full_then_half", "half", "full"])
def test_skipped_tracks_are_drawn_as_before(mode):
    track = driver(2)
    (placed,), alignment = align(track, hidden(picture_of(track), slice(0, 133)))
    assert alignment.mode == "skipped"
    assert np.array_equal(placed.pose.keypoints, track.pose.keypoints)
    assert np.array_equal(placed.body.intrinsics, track.body.intrinsics)
    large = to_canvas(track, (384, 256))
    options = RenderOptions(mode=mode)
    drawn = [render_track([t], width=256, height=384, options=options) for t in (track, large)]
    assert (np.abs(drawn[0].astype(int) - drawn[1]).max(axis=-1) > 6).mean() < 1e-3


def test_the_picture_moves_with_the_reference():
    track = driver(2)
    plain = render_track([track], width=128, height=192, options=RenderOptions(mode="full"))
    (aligned,), _ = align(track, picture_of(track, p=8, q=-16))
    drawn = render_track([aligned], width=128, height=192, options=RenderOptions(mode="full"))
    back = np.roll(drawn, (16, -8), axis=(1, 2))
    assert (np.abs(back.astype(int) - plain).max(axis=-1) > 30).mean() < 3e-3
    assert (drawn != plain).any()


def test_first_frames_without_a_person_are_passed_over():
    track = without_body(driver(4), [0, 1])
    (aligned,), alignment = align(track, picture_of(driver(4), m=1.1, frame=2))
    assert alignment.frame == 2
    assert alignment.m == pytest.approx(1.1, abs=0.01)
    assert not aligned.body.joints[:2].any()
    hand = track.pose.keypoints[0, LEFT_HAND]
    assert np.allclose(aligned.pose.keypoints[0, LEFT_HAND], hand)
    assert alignment.face_scale == pytest.approx(1.1, abs=1e-3)


OPTIONS = {
    "variant": "node",
    "scale_hands": False,
    "bounds": Bounds((0.99, 1.01), (0.99, 1.01)),
    "fit": "pad",
    "reference_fit": "pad",
    "guard": False,
    "several": True,
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_changes_the_result(name):
    tracks = [driver()]
    reference = picture_of(tracks[0], m=1.15, s=1.05, p=5, q=3)
    reference.keypoints[:, 5:9, 1] -= 6
    size = (192, 160)
    if name == "guard":
        # With guard, the face is not measured where the reference does not show it.
        reference = hidden(reference, FACE)
    if name == "several":
        tracks.append(driver(x=300))
    results = [
        align_tracks(tracks, reference, size=size, options=AlignOptions(**options))[0][0]
        for options in ({}, {name: OPTIONS[name]})
    ]
    assert not np.allclose(results[0].pose.keypoints, results[1].pose.keypoints, atol=0.1)


def test_size_and_reference_count():
    track = driver()
    results = [
        align_tracks([track], reference, size=size)[0][0].body.intrinsics
        for reference, size in (
            (picture_of(track), SIZE),
            (picture_of(track, p=3), SIZE),
            (picture_of(track), (384, 256)),
        )
    ]
    assert not np.allclose(results[0], results[1], atol=0.1)
    assert not np.allclose(results[0], results[2], atol=0.1)


def test_several_persons_are_aligned_only_if_asked():
    tracks = [driver(), driver(x=250)]
    reference = picture_of(tracks[0], m=1.1, p=5)
    left, alignment = align(tracks, reference)
    assert alignment.mode == "skipped" and "2 persons" in alignment.reason
    assert np.array_equal(left[1].pose.keypoints, tracks[1].pose.keypoints)
    both, alignment = align(tracks, reference, several=True)
    assert alignment.mode == "down"
    assert np.array_equal(both[0].body.intrinsics, both[1].body.intrinsics)
    nose = project(both[1].body.joints[:, SMPL_HEAD], both[1].body.intrinsics)
    assert np.allclose(both[1].pose.keypoints[:, 0], nose, atol=0.05)


@pytest.mark.parametrize(
    ("variant", "seen", "expected", "weighting"),
    [
        ("official", range(18), (1, 9, 10, 12, 13), "down"),
        ("official", range(9), (1, 0, 2, 3, 5, 6), "central"),
        ("official", (0, 9, 10, 12), (1, 0), "central"),
        ("node", range(18), (1, 9, 10, 12, 13, 0, 2, 3, 5, 6), "down"),
        ("node", range(9), (1, 0, 2, 3, 5, 6), "central"),
        ("node", (0, 2, 3, 9, 10, 12, 13), (1, 9, 10, 12, 13), "down"),
        ("node", (0, 2, 3, 5, 9), (1, 9, 0, 2, 3, 5), "central"),
        ("node", (), (1,), "central"),
    ],
)
def test_joints_are_chosen_by_rule(variant, seen, expected, weighting):
    visible = np.isin(np.arange(18), list(seen))
    everything = np.ones(18, bool)
    assert choose_joints(visible, everything, variant) == (expected, weighting)
    assert choose_joints(everything, visible, variant) == (expected, weighting)


def test_weights_favour_the_neck_or_the_legs():
    assert joint_weights((1, 9, 10), "central").tolist() == [8, 1, 1]
    assert joint_weights((1, 9, 10), "down").tolist() == [1, 4, 4]


def test_the_alignment_goes_into_a_report():
    for reference in (picture_of(driver()), hidden(picture_of(driver()), slice(0, 133))):
        _, alignment = align(driver(), reference)
        assert json.loads(json.dumps(asdict(alignment)))["mode"] == alignment.mode


def test_moving_driver_and_reference_together_moves_the_result():
    track = driver()
    reference = picture_of(track, m=1.1)
    (plain,), first = align(track, reference)
    shifted = replace(reference, keypoints=reference.keypoints + np.float32(10))
    (along,), second = align(moved(track, 10, 10), shifted)
    assert np.allclose(along.pose.keypoints, plain.pose.keypoints + 10, atol=0.02)
    assert np.allclose([first.m, first.s, first.p], [second.m, second.s, second.p], atol=1e-3)
