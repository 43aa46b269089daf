"""COCO-WholeBody-133 points as SteadyDancer's authors use them: body, hands and face.

Eighteen body joints keep their raw places; a score decides only whether they are drawn. Hand and
face points with a weak score are hidden at (-1, -1). The left hand comes first. Coordinates are
shares of the frame: (1, 1) is its bottom right corner.

The authors take the first row of a frame's persons as the subject and the first two rows of [all
left hands, all right hands] as its hands. With two persons these are two left hands, and the
second is moved with the right wrist (`first_person`). A track is one person, so its own hands are
its own.

Shape letters: F frames, P persons, K = 133 keypoints.

Source: MCG-NJU/SteadyDancer: preprocess/pose/script/wholebody.py, preprocess/pose/script/dwpose.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.keypoints import Figure, Float64Array, FloatArray, to_official_figure
from xicon_infer.pose.skeleton import OPENPOSE_JOINTS
from xicon_infer.types import PoseTrack

BoolArray = npt.NDArray[np.bool_]

KEYPOINT_THR = 0.35
"""A body joint must score above this to be drawn, a hand or face point at least this."""

MIN_JOINTS = 4
"""With fewer visible body joints a person counts as not there."""

HIDDEN = -1.0
"""Both coordinates of a hidden point."""


def to_dancer_figure(
    keypoints: FloatArray, scores: FloatArray, *, size: tuple[float, float] = (1.0, 1.0)
) -> Figure:
    """Returns the points in the authors' layout, normalised by the frame.

    The neck is the middle of the shoulders; its score is 1 if both are above 0.3, else 0.

    Args:
        keypoints: [F, 133, 2], pixels of `size`. Rows may be the persons of one frame instead.
        scores: [F, 133].
        size: (H, W) of the frame; (1, 1) where the points are shares already.

    Returns:
        body and body_visible with 18 joints, hands [F, 2, 21, 2] left first, face [F, 68, 2].
    """
    figure = to_official_figure(keypoints, scores, size=size, kp_score_thr=KEYPOINT_THR)
    body_scores = figure.body_scores[:, :OPENPOSE_JOINTS]
    return replace(
        figure,
        body=figure.body[:, :OPENPOSE_JOINTS],
        body_scores=body_scores,
        body_visible=body_scores > KEYPOINT_THR,
    )


def first_person(persons: Figure) -> Figure:
    """Returns the one figure that the authors' tool draws of a frame with several persons.

    Args:
        persons: one row per person of the frame, best detection first, at least one.

    Returns:
        One row: body and face of the first person, and the first two of all left hands followed
        by all right hands.
    """
    return replace(
        rows(persons, [0]),
        hands=persons.hands.swapaxes(0, 1).reshape(1, -1, *persons.hands.shape[2:])[:, :2],
        hand_scores=persons.hand_scores.swapaxes(0, 1).reshape(1, -1, persons.hands.shape[2])[
            :, :2
        ],
    )


def track_figure(pose: PoseTrack) -> Figure:
    """Returns the figure of a track, normalised by its frames."""
    return to_dancer_figure(pose.keypoints, pose.scores, size=pose.size)


def rows(figure: Figure, chosen: list[int] | npt.NDArray[np.int64]) -> Figure:
    """Returns some frames of a figure, repeats allowed."""
    return Figure(
        body=figure.body[chosen],
        body_visible=figure.body_visible[chosen],
        hands=figure.hands[chosen],
        face=figure.face[chosen],
        body_scores=figure.body_scores[chosen],
        hand_scores=figure.hand_scores[chosen],
        face_scores=figure.face_scores[chosen],
    )


def join(figures: list[Figure]) -> Figure:
    """Returns the frames of several figures as one figure."""
    return Figure(
        body=np.concatenate([f.body for f in figures]),
        body_visible=np.concatenate([f.body_visible for f in figures]),
        hands=np.concatenate([f.hands for f in figures]),
        face=np.concatenate([f.face for f in figures]),
        body_scores=np.concatenate([f.body_scores for f in figures]),
        hand_scores=np.concatenate([f.hand_scores for f in figures]),
        face_scores=np.concatenate([f.face_scores for f in figures]),
    )


def person_present(figure: Figure) -> BoolArray:
    """Returns bool [F]: whether enough body joints are visible to call it a person."""
    seen: BoolArray = figure.body_visible.sum(axis=1) >= MIN_JOINTS
    return seen


def hidden_points(points: Float64Array) -> BoolArray:
    """Returns bool [...]: which points [..., 2] are hidden."""
    hidden: BoolArray = (points == HIDDEN).all(axis=-1)
    return hidden
