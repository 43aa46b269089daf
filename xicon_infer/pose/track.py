"""Tracks: reading and writing them, choosing frames, closing gaps, distrusting weak points.

A saved track is an `.npz` with the arrays of `_ARRAYS`. The file may come from anybody, so nothing
in it is trusted: `npz.py` limits sizes, and every array is checked here. Arrays of other names are
not read. One person may be saved without the person axis in the 2-D arrays.

Shape letters: F frames, P persons, K = 133 keypoints, J = 24 joints.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.pose.camera import project
from xicon_infer.pose.keypoints import KP_SCORE_THR
from xicon_infer.pose.npz import Array, read_arrays, refusal, refuse_above
from xicon_infer.pose.skeleton import (
    FACE,
    KEYPOINTS,
    LEFT_HAND,
    LEFT_WRIST,
    NOSE,
    RIGHT_HAND,
    RIGHT_WRIST,
    SMPL_HEAD,
    SMPL_JOINTS,
    SMPL_LEFT_WRIST,
    SMPL_RIGHT_WRIST,
)
from xicon_infer.types import BodyTrack, Float32Array, PoseTrack, Track

BoolArray = npt.NDArray[np.bool_]

MAX_FRAMES = 20_000
MAX_PERSONS = 8
MAX_SIDE_PX = 16_384
MAX_VALUE = 1e9
"""Largest pixel or millimetre; beyond it squares leave float32."""

MAX_GAP_S = 0.5
"""Longest time over which a missing point is guessed from its neighbours."""

# Name -> must it be there?
_ARRAYS = {
    "keypoints": True,
    "scores": True,
    "bboxes": True,
    "joints": True,
    "intrinsics": True,
    "size": True,
    "fps": True,
    "uncertainties": False,
}
# A hand or face whose wrist or head is farther outside than this share of the frame is a guess.
_OUTSIDE_SHARE = 0.1
# Points, the joint they hang on, and the keypoint they hang on (nose and wrists).
_PARTS = (
    (FACE, SMPL_HEAD, NOSE),
    (LEFT_HAND, SMPL_LEFT_WRIST, LEFT_WRIST),
    (RIGHT_HAND, SMPL_RIGHT_WRIST, RIGHT_WRIST),
)


def load_tracks(path: Path) -> list[Track]:
    """Returns the persons of a saved track file, in the order they were saved.

    Args:
        path: an `.npz` with keypoints [F, P, 133, 2] (or [F, 133, 2]) and scores [F, P, 133] (or
            [F, 133]), 0 to 1, bboxes [F, P, 4] (or [F, 4]), all in pixels of size = (H, W); joints
            [F, P, 24, 3] millimetres; intrinsics [3, 3]; fps; optionally uncertainties
            [F, P, 24] millimetres.

    Raises:
        MediaError: if the file cannot be read, is too large, or an array is missing, has another
            shape, or holds a value that is not allowed.
    """
    arrays = read_arrays(path, _ARRAYS)
    joints = _numbers(arrays, "joints", path)
    if joints.ndim != 4 or joints.shape[2:] != (SMPL_JOINTS, 3):
        raise _wrong_shape(path, "joints", joints, f"[F, P, {SMPL_JOINTS}, 3]")
    frames, persons = joints.shape[:2]
    refuse_above(path, "joints frames", frames, MAX_FRAMES)
    refuse_above(path, "joints persons", persons, MAX_PERSONS)
    keypoints = _per_person(arrays, "keypoints", (frames, persons, KEYPOINTS, 2), path)
    scores = _per_person(arrays, "scores", (frames, persons, KEYPOINTS), path)
    if scores.min() < 0 or scores.max() > 1:
        raise refusal(
            path, "scores", f"range from {scores.min():g} to {scores.max():g}; 0 to 1 is needed"
        )
    bboxes = _per_person(arrays, "bboxes", (frames, persons, 4), path)
    uncertainties = np.zeros((frames, persons, SMPL_JOINTS), np.float32)
    if "uncertainties" in arrays:
        uncertainties = _per_person(arrays, "uncertainties", uncertainties.shape, path)
    intrinsics = _camera(arrays, path)
    size = _size(arrays, path)
    fps = _fps(arrays, path)
    return [
        Track(
            PoseTrack(keypoints[:, p], scores[:, p], bboxes[:, p], size),
            BodyTrack(joints[:, p], uncertainties[:, p], intrinsics),
            fps,
        )
        for p in range(persons)
    ]


def save_tracks(path: Path, tracks: Sequence[Track]) -> None:
    """Writes persons of one video to an `.npz` that `load_tracks` reads.

    Args:
        path: where to write; an existing file is replaced.
        tracks: one per person; frame count, frame size, camera and fps must agree.

    Raises:
        InvalidRequest: if there is no track or the tracks do not belong together.
        MediaError: if the file cannot be written.
    """
    check_same_video(tracks)
    first = tracks[0]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        keypoints=np.stack([t.pose.keypoints for t in tracks], axis=1),
        scores=np.stack([t.pose.scores for t in tracks], axis=1),
        bboxes=np.stack([t.pose.bboxes for t in tracks], axis=1),
        joints=np.stack([t.body.joints for t in tracks], axis=1),
        uncertainties=np.stack([t.body.uncertainties for t in tracks], axis=1),
        intrinsics=first.body.intrinsics,
        size=np.array(first.pose.size, np.int64),
        fps=np.float64(first.fps),
    )
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise MediaError(f"The track file {path} cannot be written: {error}.") from error


def check_same_video(tracks: Sequence[Track]) -> None:
    """Refuses tracks that are not persons of one video.

    Raises:
        InvalidRequest: if there is none, or frame count, size, fps or camera differ.
    """
    if not tracks:
        raise InvalidRequest("tracks is empty; at least one person is needed.", field="tracks")
    first = tracks[0]
    for index, track in enumerate(tracks):
        same = (
            len(track.pose.keypoints) == len(first.pose.keypoints) == len(track.body.joints)
            and track.pose.size == first.pose.size
            and track.fps == first.fps
            and np.array_equal(track.body.intrinsics, first.body.intrinsics)
        )
        if not same:
            raise InvalidRequest(
                f"tracks[{index}] differs from tracks[0] in frame count, size, fps or camera; "
                "give persons of one video.",
                field="tracks",
            )


def resample_track(track: Track, indices: Sequence[int], *, fps: Fraction | None = None) -> Track:
    """Returns the track at the chosen frames, for example those chosen from its video.

    Args:
        track: F frames.
        indices: frame numbers, 0 to F - 1, in any order, repeats allowed.
        fps: the rate of the result; the track's own if None.

    Raises:
        InvalidRequest: if there is no index or one is out of range.
    """
    chosen = np.asarray(indices, np.int64)
    frames = len(track.pose.keypoints)
    if chosen.ndim != 1 or not chosen.size or chosen.min() < 0 or chosen.max() >= frames:
        raise InvalidRequest(
            f"indices must be a non-empty list of frame numbers from 0 to {frames - 1}.",
            field="indices",
        )
    pose, body = track.pose, track.body
    return Track(
        replace(
            pose,
            keypoints=pose.keypoints[chosen],
            scores=pose.scores[chosen],
            bboxes=pose.bboxes[chosen],
        ),
        replace(body, joints=body.joints[chosen], uncertainties=body.uncertainties[chosen]),
        track.fps if fps is None else fps,
    )


def drop_unusable(track: Track) -> Track:
    """Returns the track with impossible values marked as missing.

    A joint that is not finite or not in front of the camera becomes zero, so its limbs are not
    drawn; a keypoint that is not finite gets score 0.
    """
    joints, points, scores = track.body.joints, track.pose.keypoints, track.pose.scores
    usable = np.isfinite(joints).all(axis=2) & (joints[..., 2] > 0)
    finite = np.isfinite(points).all(axis=2) & np.isfinite(scores)
    pose = replace(
        track.pose,
        keypoints=np.where(finite[..., None], points, np.float32(0)),
        scores=np.where(finite, scores, np.float32(0)),
    )
    body = replace(track.body, joints=np.where(usable[..., None], joints, np.float32(0)))
    return Track(pose, body, track.fps)


def fill_gaps(track: Track, max_gap_s: float = MAX_GAP_S) -> Track:
    """Returns the track with short gaps closed on a straight line between their neighbours.

    A joint is missing where it is zero, a keypoint where its score is below 0.3. Gaps at either
    end, and longer ones, stay. Each point is treated alone; hand and face points run on a straight
    line as seen from the wrist or nose, so that they stay at the arm while it swings.

    Args:
        track: F frames.
        max_gap_s: the longest gap to close, seconds; 0 closes none.
    """
    # The tiny term lets 0.5 s at 24 fps be 12 frames whatever the rounding.
    longest = int(max_gap_s * float(track.fps) + 1e-6)
    pose, body = track.pose, track.body
    hidden = np.less(pose.scores, KP_SCORE_THR)
    absent = np.logical_not(body.joints.any(axis=2))
    carrier = np.zeros_like(pose.keypoints)
    for part, _, anchor in _PARTS:
        carrier[:, part] = _whole_path(pose.keypoints[:, anchor], hidden[:, anchor])[:, None]
    keypoints = _bridge(pose.keypoints, hidden, longest, carrier)
    scores = _bridge(pose.scores[..., None], hidden, longest)[..., 0]
    joints = _bridge(body.joints, absent, longest)
    uncertainties = _bridge(body.uncertainties[..., None], absent, longest)[..., 0]
    return Track(
        replace(pose, keypoints=keypoints, scores=scores),
        replace(body, joints=joints, uncertainties=uncertainties),
        track.fps,
    )


def hide_unreliable(track: Track, kp_score_thr: float = KP_SCORE_THR) -> Track:
    """Returns the track with score 0 for hands and faces that are guesses.

    A hand or face is a guess where its mean score is below `kp_score_thr` (a back view has no
    face), and where its wrist or head projects outside the frame by more than a tenth of it.
    """
    height, width = track.pose.size
    spots = project(track.body.joints, track.body.intrinsics) / [width, height]
    # Not a number (behind the camera, or absent) compares as outside.
    inside = np.logical_and.reduce(np.abs(spots - 0.5) <= 0.5 + _OUTSIDE_SHARE, axis=2)
    scores = track.pose.scores.copy()
    for part, joint, _ in _PARTS:
        trusted = inside[:, joint] & (scores[:, part].mean(axis=1) >= kp_score_thr)
        scores[~trusted, part] = 0
    return replace(track, pose=replace(track.pose, scores=scores))


def _bridge(
    values: Float32Array, missing: BoolArray, longest: int, carrier: Float32Array | None = None
) -> Float32Array:
    """Returns values [F, K, C] with short runs of `missing` [F, K] interpolated over frames.

    Lines are straight as seen from `carrier` [F, K, C], from the origin if None. Values that are
    not interpolated come back bit for bit.
    """
    frames = len(values)
    number = np.arange(frames)[:, None]
    before = np.maximum.accumulate(np.where(missing, -1, number), axis=0)
    after = np.minimum.accumulate(np.where(missing, frames, number)[::-1], axis=0)[::-1]
    known_both = (before >= 0) & (after < frames)
    close = missing & known_both & (after - before - 1 <= longest)
    share = ((number - before) / np.maximum(after - before, 1))[..., None]
    column = np.arange(values.shape[1])
    carrier = np.zeros_like(values) if carrier is None else carrier
    relative = values - carrier
    left = relative[np.clip(before, 0, None), column]
    right = relative[np.clip(after, None, frames - 1), column]
    line = (left * (1 - share) + right * share + carrier).astype(values.dtype)
    return np.where(close[..., None], line, values)


def _whole_path(points: Float32Array, hidden: BoolArray) -> Float32Array:
    """Returns a path [F, 2] through the seen points: lines between, constant outside them."""
    seen = np.flatnonzero(~hidden)
    if not seen.size:
        return np.zeros_like(points)
    frame = np.arange(len(points))
    path = [np.interp(frame, seen, points[seen, axis]) for axis in range(2)]
    return np.stack(path, axis=1).astype(points.dtype)


def _numbers(arrays: dict[str, Array], name: str, path: Path) -> Float32Array:
    """Returns a non-empty array as float32, every value finite and of a sane size."""
    values = arrays[name]
    if not values.size:
        raise _wrong_shape(path, name, values, "at least one frame and one person")
    # Written this way round, the comparison is false for values that are no numbers.
    broken = int((~(np.abs(values.astype(np.float64)) <= MAX_VALUE)).sum())
    if broken:
        raise refusal(
            path, name, f"holds {broken} values that are not finite or beyond {MAX_VALUE:g}"
        )
    return values.astype(np.float32)


def _per_person(
    arrays: dict[str, Array], name: str, shape: tuple[int, ...], path: Path
) -> Float32Array:
    """Returns an array [F, P, ...]; the person axis may be left out for one person."""
    values = _numbers(arrays, name, path)
    if shape[1] == 1 and values.shape == (shape[0], *shape[2:]):
        values = values[:, None]
    if values.shape != shape:
        raise _wrong_shape(path, name, values, str(list(shape)))
    return values


def _camera(arrays: dict[str, Array], path: Path) -> Float32Array:
    camera = _numbers(arrays, "intrinsics", path)
    if camera.shape != (3, 3):
        raise _wrong_shape(path, "intrinsics", camera, "[3, 3]")
    rest = camera[[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]]
    if camera[0, 0] <= 0 or camera[1, 1] <= 0 or not np.array_equal(rest, [0, 0, 0, 0, 1]):
        raise refusal(
            path, "intrinsics", "is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0"
        )
    return camera


def _size(arrays: dict[str, Array], path: Path) -> tuple[int, int]:
    size = _numbers(arrays, "size", path)
    if size.shape != (2,):
        raise _wrong_shape(path, "size", size, "[2]")
    height, width = (int(side) for side in size)
    if (height, width) != tuple(size) or not (0 < height <= MAX_SIDE_PX >= width > 0):
        allowed = f"two whole numbers from 1 to {MAX_SIDE_PX} are needed"
        raise refusal(path, "size", f"is {size.tolist()}; {allowed}")
    return height, width


def _fps(arrays: dict[str, Array], path: Path) -> Fraction:
    _numbers(arrays, "fps", path)
    values = arrays["fps"]
    if values.size != 1 or not 0.1 <= float(values.flat[0]) <= 1000:
        raise refusal(path, "fps", f"is {values.tolist()}; one number from 0.1 to 1000 is needed")
    # Enough to find 30000/1001 again from its decimal form.
    return Fraction(float(values.flat[0])).limit_denominator(10_000)


def _wrong_shape(path: Path, name: str, values: Array, expected: str) -> MediaError:
    return refusal(path, name, f"has the shape {list(values.shape)}; {expected} is needed")
