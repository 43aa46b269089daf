"""The flat figure of a person follows the new camera: face, head and hands.

The face and head grow to the size of the reference's face and follow the projected head joint;
each hand follows its wrist. Only `align.py` decides the camera. Nothing is changed in place.

Shape letters: F frames, K keypoints; lengths in pixels of the canvas or millimetres.

Source: rookiestar28/ComfyUI-SCAIL-Pose2: nodes.py (RenderNLFPoses); specification 5.3
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.align_solver import CameraFit
from xicon_infer.pose.camera import Float64Array, project
from xicon_infer.pose.keypoints import KP_SCORE_THR
from xicon_infer.pose.skeleton import (
    FACE,
    FACE_POINTS,
    FEET,
    HAND_POINTS,
    LEFT_HAND,
    NOSE,
    RIGHT_HAND,
    SMPL_HEAD,
    SMPL_LEFT_WRIST,
    SMPL_RIGHT_WRIST,
)
from xicon_infer.types import Float32Array, PoseTrack, Track

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]

# The tip of the nose in the 68 points: the face grows about it.
_FACE_CENTRE = 30
_FACE_SCALE = (0.8, 1.5)
# Fewer points visible in both faces do not measure its size.
_MIN_FACE_POINTS = 10
_MIN_DEPTH_MM = 0.01
# Points, and the number among them of the one they grow about. Of the body only the head is drawn.
_PARTS = (
    (slice(NOSE, 5), 0),
    (FACE, _FACE_CENTRE),
    (LEFT_HAND, 0),
    (RIGHT_HAND, 0),
)


class Overlay(NamedTuple):
    """The flat figure of one person: body [F, K, 2], hands [F, 2, 21, 2], face [F, 68, 2].

    Body point 0 is the nose. right_hand_first: the order of the hands; True in the node's layout
    (`to_node_figure`), False in the authors' (`to_official_figure`) and among the 133 points.
    """

    body: Float64Array
    hands: Float64Array
    face: Float64Array
    right_hand_first: bool


def face_ratio(
    reference: FloatArray,
    driving: FloatArray,
    *,
    size: tuple[int, int],
    usable: BoolArray | None = None,
) -> float:
    """Returns how much larger the reference's face is, 0.8 to 1.5; 1 if it cannot be measured.

    Args:
        reference: [68, 2], pixels.
        driving: [68, 2], pixels of the same canvas.
        size: (H, W); distances are measured in shares of it.
        usable: [68], points to compare; all if None.
    """
    compared = np.ones(FACE_POINTS, bool) if usable is None else usable
    if not compared[_FACE_CENTRE] or compared.sum() < _MIN_FACE_POINTS:
        return 1.0
    # The centre itself adds the same nothing to both means.
    spans = [
        np.linalg.norm((face - face[_FACE_CENTRE])[compared] / [size[1], size[0]], axis=1).mean()
        for face in (np.asarray(reference, np.float64), np.asarray(driving, np.float64))
    ]
    return float(np.clip(spans[0] / spans[1], *_FACE_SCALE)) if spans[1] > 0 else 1.0


def face_growth(pose: PoseTrack, target: PoseTrack, *, frame: int, guard: bool) -> float:
    """Returns the face ratio of two tracks on one canvas.

    Args:
        pose: the driver.
        target: the reference, one frame.
        frame: the driving frame to measure.
        guard: compare only points that are visible in both; if off all points, and of frame 0, as
            the references do.
    """
    at = frame if guard else 0
    trusted = np.minimum(target.scores[0, FACE], pose.scores[at, FACE]) >= KP_SCORE_THR
    return face_ratio(
        target.keypoints[0, FACE],
        pose.keypoints[at, FACE],
        size=pose.size,
        usable=trusted if guard else None,
    )


def align_overlay(
    overlay: Overlay,
    joints: FloatArray,
    intrinsics: FloatArray,
    fit: CameraFit,
    *,
    face_scale: float,
    scale_hands: bool = True,
) -> Overlay:
    """Returns the flat figure moved to where the new camera sees its head and wrists.

    Face and body grow about the tip of the nose; each hand about its wrist, by m and m s.

    Args:
        overlay: the figure, pixels; it is not changed.
        joints: [F, 24, 3], the 3-D body of the same person. Where it is zeros (nobody, or nobody
            who belongs to this figure) nothing is shifted and the hands keep their size.
        intrinsics: [3, 3], the camera before.
        fit: the camera after.
        face_scale: how much the head grows.
        scale_hands: whether the hands change their size.

    Source: rookiestar28/ComfyUI-SCAIL-Pose2: nodes.py (RenderNLFPoses)
    """
    head = _shift(joints, SMPL_HEAD, intrinsics, fit)
    wrists = (SMPL_LEFT_WRIST, SMPL_RIGHT_WRIST)
    order = wrists[::-1] if overlay.right_hand_first else wrists
    there = np.abs(joints).sum(axis=(1, 2), keepdims=True) > 0
    stretch = np.array([fit.m, fit.m * fit.s] if scale_hands else [1.0, 1.0])
    hand_scale = np.where(there, stretch, 1.0)
    hands = [
        _grow(overlay.hands[:, row], 0, hand_scale) + _shift(joints, wrist, intrinsics, fit)
        for row, wrist in enumerate(order)
    ]
    return overlay._replace(
        body=_grow(overlay.body, 0, face_scale) + head,
        hands=np.stack(hands, axis=1),
        face=_grow(overlay.face, _FACE_CENTRE, face_scale) + head,
    )


def move_track(
    track: Track, fit: CameraFit, *, face_scale: float, scale_hands: bool, guard: bool
) -> Track:
    """Returns a track on the canvas as the new camera sees it.

    Args:
        track: one person; it is not changed.
        fit: the new camera.
        face_scale: how much the head grows.
        scale_hands: whether the hands change their size.
        guard: grow a part whose centre is missing about the mean of its visible points.
    """
    pose, before = track.pose, track.body.intrinsics
    points = _settle_centres(pose) if guard else pose.keypoints
    wide = np.asarray(points, np.float64)
    frames = len(wide)
    overlay = align_overlay(
        Overlay(
            body=wide[:, : FEET.stop],
            hands=wide[:, LEFT_HAND.start :].reshape(frames, 2, HAND_POINTS, 2),
            face=wide[:, FACE],
            right_hand_first=False,
        ),
        track.body.joints,
        before,
        fit,
        face_scale=face_scale,
        scale_hands=scale_hands,
    )
    moved = np.concatenate(
        [overlay.body, overlay.face, overlay.hands.reshape(frames, -1, 2)], axis=1
    )
    centre = before[:2, 2]
    corners = (pose.bboxes.reshape(-1, 2, 2) - centre) * [fit.m, fit.m * fit.s]
    boxes = (corners + centre + [fit.p, fit.q]).reshape(-1, 4)
    return replace(
        track,
        pose=replace(pose, keypoints=moved.astype(np.float32), bboxes=boxes.astype(np.float32)),
        body=replace(track.body, intrinsics=fit.intrinsics.astype(np.float32)),
    )


def _settle_centres(pose: PoseTrack) -> Float32Array:
    """Returns the keypoints with each missing centre of growth at the mean of its part.

    A point of score 0 has no place; growing about it would throw the visible ones away.
    """
    points = pose.keypoints.copy()
    for part, centre in _PARTS:
        seen = pose.scores[:, part] > 0
        lost = ~seen[:, centre] & seen.any(axis=1)
        total = (points[:, part] * seen[..., None]).sum(axis=1)
        mean = total / np.maximum(seen.sum(axis=1), 1)[:, None]
        points[lost, part.start + centre] = mean[lost]
    return points


def _shift(joints: FloatArray, joint: int, intrinsics: FloatArray, fit: CameraFit) -> Float64Array:
    """Returns [F, 1, 2], how far a joint moves on the picture; 0 where it is missing."""
    places = joints[:, joint]
    there = places[:, 2:] > _MIN_DEPTH_MM
    way = project(places, fit.intrinsics) - project(places, intrinsics)
    return np.where(there, way, 0.0)[:, None]


def _grow(points: Float64Array, centre: int, scale: Float64Array | float) -> Float64Array:
    """Returns points [F, K, 2] scaled about the point number `centre` of each frame."""
    middle = points[:, centre : centre + 1]
    return (points - middle) * scale + middle
