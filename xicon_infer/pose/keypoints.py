"""COCO-WholeBody-133 points turned into the figure that is drawn: body, hands and face.

Two layouts exist. The original graph's node gives 18 body joints with the right hand first, and
hides nothing but body joints. The model authors' tool gives 24 body joints (feet included) with
the left hand first, and hides weak hand and face points too. Hidden points are at (-1, -1).

Differs from the node: hand and face points with a weak score are hidden by default, as the
authors do, and a body outside the frame stays there instead of repeating the previous one. With
`kp_score_thr=0` and `carry_over=True` the result is the node's.

Source: rookiestar28/ComfyUI-SCAIL-Pose2: vitpose_utils/utils.py; zai-org/SCAIL-Pose:
DWPoseProcess/dwpose/__init__.py, DWPoseProcess/dwpose/wholebody.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.skeleton import (
    BODY_PAIRS,
    FACE,
    FEET,
    LEFT_HAND,
    LEFT_SHOULDER,
    OPENPOSE_JOINTS,
    RIGHT_HAND,
    RIGHT_SHOULDER,
)

Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]

KP_SCORE_THR = 0.3
"""A point with a lower score is not trusted; both references use this number."""


@dataclass(frozen=True)
class Figure:
    """One person's 2-D points, in the order that is drawn; a frame is one index of axis 0.

    body: float64 [F, 18, 2] (node) or [F, 24, 2] (official); never hidden by position.
    body_visible: bool [F, 18 | 24].
    hands: float64 [F, 2, 21, 2]; the right hand first (node) or the left one (official).
    face: float64 [F, 68, 2].
    body_scores, hand_scores, face_scores: float64, the same shapes without the last axis.

    Coordinates are in units of the size given at conversion: (1, 1) keeps pixels.
    """

    body: Float64Array
    body_visible: npt.NDArray[np.bool_]
    hands: Float64Array
    face: Float64Array
    body_scores: Float64Array
    hand_scores: Float64Array
    face_scores: Float64Array


def to_node_figure(
    keypoints: FloatArray,
    scores: FloatArray,
    *,
    size: tuple[float, float] = (1.0, 1.0),
    kp_score_thr: float = KP_SCORE_THR,
    carry_over: bool = False,
) -> Figure:
    """Returns the figure in the layout of the original graph's node.

    Args:
        keypoints: [F, 133, 2], pixels.
        scores: [F, 133].
        size: (H, W) to divide the coordinates by.
        kp_score_thr: hand and face points below it are hidden; 0 hides none. Body joints are
            always held to 0.3.
        carry_over: repeat the previous frame's body where every joint has a negative x or y.

    Source: rookiestar28/ComfyUI-SCAIL-Pose2: vitpose_utils/utils.py
    (load_pose_metas_from_kp2ds_seq, aaposemeta_to_dwpose_scail).
    """
    points = _scaled(keypoints, size)
    values = np.asarray(scores, np.float64)
    first, second = np.array(BODY_PAIRS).T
    body = (points[:, first] + points[:, second]) / 2
    body_scores = (values[:, first] + values[:, second]) / 2
    if carry_over:
        source = _last_inside(body)
        body, body_scores = body[source], body_scores[source]
    hand_scores = np.stack([values[:, RIGHT_HAND], values[:, LEFT_HAND]], axis=1)
    hands = np.stack([points[:, RIGHT_HAND], points[:, LEFT_HAND]], axis=1)
    drawn_scores = body_scores[:, :OPENPOSE_JOINTS]
    return Figure(
        body=body[:, :OPENPOSE_JOINTS],
        body_visible=drawn_scores > KP_SCORE_THR,
        hands=_hide(hands, hand_scores, kp_score_thr),
        face=_hide(points[:, FACE], values[:, FACE], kp_score_thr),
        body_scores=drawn_scores,
        hand_scores=hand_scores,
        face_scores=values[:, FACE],
    )


def to_official_figure(
    keypoints: FloatArray,
    scores: FloatArray,
    *,
    size: tuple[float, float] = (1.0, 1.0),
    kp_score_thr: float = KP_SCORE_THR,
) -> Figure:
    """Returns the figure in the layout of the model authors' tool.

    The neck has score 1 if both shoulders are above 0.3, else 0. Arguments as `to_node_figure`.

    Source: zai-org/SCAIL-Pose: DWPoseProcess/dwpose/wholebody.py, DWPoseProcess/dwpose/__init__.py
    """
    points = _scaled(keypoints, size)
    values = np.asarray(scores, np.float64)
    first, second = np.array(BODY_PAIRS[:OPENPOSE_JOINTS]).T
    body = np.concatenate([(points[:, first] + points[:, second]) / 2, points[:, FEET]], axis=1)
    body_scores = np.concatenate([values[:, first], values[:, FEET]], axis=1)
    shoulders = values[:, [LEFT_SHOULDER, RIGHT_SHOULDER]]
    body_scores[:, 1] = (shoulders > KP_SCORE_THR).all(axis=1)
    hand_scores = np.stack([values[:, LEFT_HAND], values[:, RIGHT_HAND]], axis=1)
    hands = np.stack([points[:, LEFT_HAND], points[:, RIGHT_HAND]], axis=1)
    return Figure(
        body=body,
        body_visible=body_scores > KP_SCORE_THR,
        hands=_hide(hands, hand_scores, kp_score_thr),
        face=_hide(points[:, FACE], values[:, FACE], kp_score_thr),
        body_scores=body_scores,
        hand_scores=hand_scores,
        face_scores=values[:, FACE],
    )


def _scaled(keypoints: FloatArray, size: tuple[float, float]) -> Float64Array:
    height, width = size
    return np.asarray(keypoints, np.float64) / np.array([width, height], np.float64)


def _hide(points: Float64Array, scores: Float64Array, kp_score_thr: float) -> Float64Array:
    """Returns the points with those below the threshold at (-1, -1)."""
    if kp_score_thr <= 0:
        return points
    return np.where((scores < kp_score_thr)[..., None], -1.0, points)


def _last_inside(body: Float64Array) -> npt.NDArray[np.int64]:
    """Returns, for every frame, the last frame so far whose body is not entirely negative."""
    outside = body.min(axis=2).max(axis=1) < 0
    # The first frame has nothing to repeat, so it counts as inside.
    outside[0] = False
    own = np.where(outside, 0, np.arange(len(body)))
    return np.maximum.accumulate(own)
