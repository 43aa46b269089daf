"""Tracks in the JSON form of OpenPose, which many tools read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xicon_infer.pose.keypoints import Figure, Float64Array, to_node_figure
from xicon_infer.types import Track

VERSION = 1.3


def to_openpose(tracks: Sequence[Track]) -> list[dict[str, Any]]:
    """Returns one dictionary per frame, with one entry per person that is there.

    Each list holds x, y and score of one point after the other, x and y in pixels: the 18 body
    joints, 68 face points and 21 points of each hand. A person is there where a score is above 0.

    Args:
        tracks: one per person, of one video.

    Source: CMU-Perceptual-Computing-Lab/openpose: doc/02_output.md.
    """
    height, width = tracks[0].pose.size
    figures = [to_node_figure(t.pose.keypoints, t.pose.scores, kp_score_thr=0) for t in tracks]
    present: list[list[bool]] = [(t.pose.scores.max(axis=1) > 0).tolist() for t in tracks]
    return [
        {
            "version": VERSION,
            "canvas_width": width,
            "canvas_height": height,
            "people": [
                _person(figure, frame)
                for figure, there in zip(figures, present, strict=True)
                if there[frame]
            ],
        }
        for frame in range(len(present[0]))
    ]


def _person(figure: Figure, frame: int) -> dict[str, list[float]]:
    hands, hand_scores = figure.hands[frame], figure.hand_scores[frame]
    return {
        "pose_keypoints_2d": _flat(figure.body[frame], figure.body_scores[frame]),
        "face_keypoints_2d": _flat(figure.face[frame], figure.face_scores[frame]),
        # The figure holds the right hand first.
        "hand_left_keypoints_2d": _flat(hands[1], hand_scores[1]),
        "hand_right_keypoints_2d": _flat(hands[0], hand_scores[0]),
    }


def _flat(points: Float64Array, scores: Float64Array) -> list[float]:
    rows = np.concatenate((points, scores[:, None]), axis=1)
    return [round(float(value), 3) for value in rows.ravel()]
