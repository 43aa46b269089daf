"""From track to pose video: geometry, options, gaps, persons and streaming."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pose.people import make_track, moved, with_scores, without_body
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.ops.pixels import half_size
from xicon_infer.pose.camera import default_intrinsics
from xicon_infer.pose.cylinders import render_bodies
from xicon_infer.pose.draw import composite, draw_overlay
from xicon_infer.pose.keypoints import to_node_figure
from xicon_infer.pose.render import RenderOptions, iter_render_track, render_track
from xicon_infer.pose.skeleton import FACE, RIGHT_HAND
from xicon_infer.pose.track import load_tracks, resample_track
from xicon_infer.types import SilentProgress

EXAMPLE = Path(__file__).parents[2] / "examples" / "dance_fullbody.npz"
SIZE = (192, 128)


def draw(*tracks, size=SIZE, device="cpu", progress=None, **options):
    height, width = size
    return render_track(
        tracks,
        width=width,
        height=height,
        options=RenderOptions(**options),
        device=device,
        progress=progress,
    )


def full(*tracks, **options):
    return draw(*tracks, mode="full", **options)


def test_shapes_of_the_modes():
    track = make_track(2)
    assert full(track).shape == (2, 192, 128, 3)
    for mode in ("half", "full_then_half"):
        video = draw(track, mode=mode)
        assert video.shape == (2, 96, 64, 3)
        assert video.dtype == np.uint8
        assert video.any()


def test_full_is_capsules_with_the_figure_on_top():
    track = make_track(2)
    height, width = SIZE
    rgba = render_bodies(
        track.body.joints[:, None], default_intrinsics(*SIZE), height=height, width=width
    )
    expected = rgba[..., :3].copy()
    figure = to_node_figure(track.pose.keypoints, track.pose.scores)
    for index, frame in enumerate(expected):
        composite(frame, draw_overlay([figure], index, height=height, width=width))
    assert np.array_equal(full(track), expected)


def test_default_is_the_mean_of_the_full_picture():
    track = make_track(2)
    blocks = full(track).reshape(2, 96, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.abs(draw(track) - blocks).max() <= 0.5


def test_half_mode_is_the_picture_of_half_the_size():
    track = make_track(2)
    assert np.array_equal(draw(track, mode="half"), full(track, size=(96, 64)))
    assert not np.array_equal(draw(track, mode="half"), draw(track))


@settings(derandomize=True, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_halving_rounds_the_mean(frames, height, width):
    random = np.random.default_rng(frames + 10 * height + 100 * width)
    video = random.integers(0, 256, (frames, 2 * height, 2 * width, 3), dtype=np.uint8)
    means = video.reshape(frames, height, 2, width, 2, 3).mean(axis=(2, 4))
    assert np.array_equal(half_size(video), np.floor(means + 0.5).astype(np.uint8))
    flat = np.full_like(video, 255)
    assert (half_size(flat) == 255).all()


@pytest.mark.parametrize(("dx", "dy"), [(6, 0), (0, -8), (-4, 10)])
def test_picture_moves_with_the_track(dx, dy):
    track = make_track(1)
    before, after = full(track), full(moved(track, dx, dy))
    assert np.array_equal(
        np.roll(before, (dy, dx), (1, 2))[:, 16:-16, 16:-16], (after[:, 16:-16, 16:-16])
    )
    assert not np.array_equal(before, after)


def test_capsules_follow_the_joints_and_the_figure_the_keypoints():
    track = make_track(1)
    joints = track.body.joints + np.array([300, 0, 0], np.float32)
    keypoints = track.pose.keypoints + np.array([10, 0], np.float32)
    only_joints = replace(track, body=replace(track.body, joints=joints))
    only_points = replace(track, pose=replace(track.pose, keypoints=keypoints))
    figure = to_node_figure(track.pose.keypoints, track.pose.scores)
    flat = draw_overlay([figure], 0, height=SIZE[0], width=SIZE[1])[None]
    shifted = np.roll(flat, 10, axis=2)
    for video, overlay in ((only_joints, flat), (only_points, shifted)):
        assert np.array_equal(full(video)[overlay != 0], overlay[overlay != 0])

    bodies = [
        full(with_scores(t, slice(0, 133), [0], 0.0)).any(axis=-1)
        for t in (track, only_joints, only_points)
    ]
    assert np.array_equal(bodies[0], bodies[2])
    columns = [np.nonzero(body)[2].mean() for body in bodies]
    focal = track.body.intrinsics[0, 0]
    assert columns[1] - columns[0] == pytest.approx(300 / 3000 * focal, abs=1)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(192, 160), (160, 128), (256, 96)])
def test_one_affine_keeps_capsules_and_points_together(fit, size):
    track = make_track(1)
    only_nose = with_scores(track, slice(1, 133), [0], 0.0)
    video = full(only_nose, size=size, fit=fit)
    ratios = (size[0] / SIZE[0], size[1] / SIZE[1])
    scale = max(ratios) if fit == "crop" else min(ratios)
    x, y = (track.pose.keypoints[0, 0] - [64, 96]) * scale + [size[1] / 2, size[0] / 2]
    bare = full(with_scores(track, slice(0, 133), [0], 0.0), size=size, fit=fit)
    rows, columns = np.nonzero((video != bare).any(axis=-1)[0])
    assert (columns.mean(), rows.mean()) == pytest.approx((x, y), abs=1)
    # The head joint is where the nose is, so the grey capsule ends under the dot.
    assert bare[0, int(y), int(x)].any()
    lowest = np.nonzero(bare[0].any(axis=(1, 2)))[0].max()
    ankle = (track.pose.keypoints[0, 15:17, 1].max() - 96) * scale + size[0] / 2
    assert lowest == pytest.approx(min(ankle + 1.5 * scale, size[0] - 1), abs=2)


def test_crop_and_pad_agree_where_the_aspect_does():
    track = make_track(1)
    assert np.array_equal(full(track, fit="crop"), full(track, fit="pad"))
    wide = {"size": (192, 256)}
    assert not np.array_equal(full(track, fit="crop", **wide), full(track, fit="pad", **wide))


CHANGES = {
    "mode": "half",
    "fit": "pad",
    "draw_face": False,
    "draw_hands": False,
    "kp_score_thr": 0.0,
    "persons": 2,
    "max_gap_s": 0.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_picture(name):
    one = with_scores(without_body(make_track(4), [2]), RIGHT_HAND, [0], 0.2)
    two = make_track(4, depth=3300, x=250)
    before = draw(one, two, size=(192, 192))
    assert not np.array_equal(before, draw(one, two, size=(192, 192), **{name: CHANGES[name]}))


def test_every_option_is_tested():
    assert {f.name for f in fields(RenderOptions)} == {*CHANGES, "chunk"}


@pytest.mark.parametrize("mode", ["full", "half", "full_then_half"])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunk_does_not_change_the_picture(mode, chunk):
    track = without_body(make_track(5), [3])
    assert np.array_equal(draw(track, mode=mode, chunk=chunk), draw(track, mode=mode))


def test_stream_yields_chunks_that_make_the_video():
    track = make_track(5)
    options = RenderOptions(chunk=2)
    parts = list(iter_render_track([track], width=128, height=192, options=options))
    assert [len(p) for p in parts] == [2, 2, 1]
    assert np.array_equal(np.concatenate(parts), draw(track))
    default = np.concatenate(list(iter_render_track([track], width=128, height=192)))
    assert np.array_equal(default, render_track([track], width=128, height=192))


def test_stream_refuses_before_the_first_chunk():
    with pytest.raises(InvalidRequest, match="multiple of 32"):
        iter_render_track([make_track(1)], width=100, height=192)


def test_progress_is_told_of_every_chunk():
    class Steps(SilentProgress):
        def __init__(self):
            super().__init__()
            self.seen = []

        def step(self, done, total, unit="step"):
            self.seen.append((done, total, unit))

    progress = Steps()
    draw(make_track(5), chunk=2, progress=progress)
    assert progress.seen == [(2, 5, "frame"), (4, 5, "frame"), (5, 5, "frame")]


def test_one_frame_is_drawn_as_it_is_in_a_video():
    track = make_track(4)
    # One frame has its own depth range, so give all frames the same depths.
    still = resample_track(track, [2, 2, 2])
    alone = resample_track(track, [2])
    assert np.array_equal(full(alone)[0], full(still)[1])
    assert full(alone).shape[0] == 1


def test_short_gaps_are_closed_and_long_ones_are_black():
    track = make_track(20)
    assert full(without_body(track, [4, 5])).any(axis=(1, 2, 3)).all()
    long = full(without_body(track, slice(3, 17))).any(axis=(1, 2, 3))
    assert long.tolist() == [True] * 3 + [False] * 14 + [True] * 3


def test_no_figure_without_a_body():
    track = make_track(2)
    joints = track.body.joints.copy()
    joints[1] = 0
    headless = replace(track, body=replace(track.body, joints=joints))
    assert not full(headless)[1].any()


def test_weak_hands_and_back_views_lose_their_points_only():
    track = make_track(1)
    plain = full(track, draw_hands=False, draw_face=False)
    weak = with_scores(with_scores(track, FACE, [0], 0.1), slice(91, 133), [0], 0.1)
    assert np.array_equal(full(weak), plain)
    assert np.array_equal(full(weak, kp_score_thr=0), full(track, kp_score_thr=0))


def test_limbs_to_impossible_joints_are_dropped():
    track = make_track(1)
    for value in (np.nan, np.inf):
        joints, points = track.body.joints.copy(), track.pose.keypoints.copy()
        joints[0, 21] = value
        points[0, 91:] = value
        broken = replace(
            track,
            pose=replace(track.pose, keypoints=points),
            body=replace(track.body, joints=joints),
        )
        picture = full(broken)
        assert picture.any()
        assert not np.array_equal(picture, full(track))


def test_one_person_is_the_first_track_and_two_have_two_palettes():
    one, two = make_track(2, x=-250), make_track(2, x=250)
    assert np.array_equal(full(one, two), full(one))
    both = full(one, two, persons=2, draw_face=False, draw_hands=False)
    left, right = (half.reshape(-1, 3).max(axis=0) for half in (both[:, :, :64], both[:, :, 64:]))
    assert left.any()
    assert right.any()
    # The first is pale: its darkest limb channel is far above black.
    swapped = full(two, one, persons=2, draw_face=False, draw_hands=False)
    assert not np.array_equal(both, swapped)


def test_a_missing_second_person_leaves_the_first():
    one, two = make_track(3), without_body(make_track(3, x=300), slice(0, 2))
    both = full(one, two, persons=2)
    there = make_track(3, x=300)
    assert not np.array_equal(both[2], full(one, there, persons=2)[0])
    right = both[:, :, 92:]
    assert right[2].any()
    assert not right[0].any()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "quarter"}, "mode"),
        ({"fit": "stretch"}, "fit"),
        ({"kp_score_thr": 1.5}, "kp_score_thr"),
        ({"kp_score_thr": float("nan")}, "kp_score_thr"),
        ({"persons": 3}, "persons"),
        ({"persons": 0}, "persons"),
        ({"max_gap_s": -1}, "max_gap_s"),
        ({"max_gap_s": float("inf")}, "max_gap_s"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_wrong_options_are_refused(options, field):
    with pytest.raises(InvalidRequest, match=f"{field} is .*allowed") as caught:
        RenderOptions(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(("height", "width", "field"), [
    (200, 128, "height"), (192, 100, "width"), (0, 128, "height"), (192, -32, "width"),
])  # fmt: skip
def test_wrong_sizes_are_refused(height, width, field):
    with pytest.raises(InvalidRequest, match=f"{field} is .*multiple of 32") as caught:
        draw(make_track(1), size=(height, width))
    assert caught.value.field == field


def test_wrong_sets_of_tracks_are_refused():
    with pytest.raises(InvalidRequest, match="tracks is empty"):
        draw()
    with pytest.raises(InvalidRequest, match="persons is 2, but there are 1 tracks"):
        draw(make_track(1), persons=2)
    with pytest.raises(InvalidRequest, match=r"tracks\[1\] differs"):
        draw(make_track(2), make_track(3))


def test_nobody_is_an_error_that_says_so():
    with pytest.raises(PoseError, match="no person") as caught:
        draw(without_body(make_track(3), slice(0, 3)))
    assert caught.value.code == "NO_PERSON_DETECTED"


def test_the_example_dance_is_drawn_in_place():
    (track,) = load_tracks(EXAMPLE)
    clip = resample_track(track, [0, 20, 120])
    video = draw(clip, size=(448, 256), mode="full")
    assert video.any(axis=(1, 2, 3)).all()
    for frame, box in zip(video, clip.pose.bboxes, strict=True):
        rows, columns = np.nonzero(frame.any(axis=-1))
        scale = 448 / 1280
        low = np.array([columns.min(), rows.min()])
        high = np.array([columns.max(), rows.max()])
        offset = [(256 - 720 * scale) / 2, 0]
        assert np.abs(low - (box[:2] * scale + offset)).max() < 30
        assert np.abs(high - (box[2:] * scale + offset)).max() < 30
