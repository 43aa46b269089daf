"""The figure as the ComfyUI graphs of SteadyDancer draw it (node PoseDetectionOneToAllAnimation).

Colours are plain RGB: the right shoulder is red, where the authors' own pictures have it blue.
Colours fade with the score. The picture is drawn with a shorter side of 2160 pixels and shrunk
without smoothing, so stick widths follow the size of the result.

Only the drawing is here. The node's own fitting to the reference is another one than the
authors'; a figure that was fitted comes from `dancer_align`.

Shape letters: F frames, K = 133 keypoints.

Source: kijai/ComfyUI-WanAnimatePreprocess: onetoall/utils.py, nodes.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from xicon_infer.pose.keypoints import KP_SCORE_THR, Figure, FloatArray, to_node_figure
from xicon_infer.pose.skeleton import (
    FACE_DRAWN,
    HAND_EDGES,
    HEAD_JOINTS,
    OPENPOSE_JOINTS,
    STICK_COLORS,
    STICKS,
)
from xicon_infer.types import UInt8Array

Strength = Literal["full", "weak", "none"]
STRENGTHS: tuple[Strength, ...] = ("full", "weak", "none")

Points = npt.NDArray[np.floating[Any]]
Color = tuple[int, int, int]

_SHORT_SIDE_PX = 2160
_WEAK = 0.35
_BRIGHTNESS = 0.6
_BODY_WIDTH, _THIN_WIDTH = 3, 2
# Longer side below which -> factor of a width.
_WIDTHS = ((512, 1.0), (1080, 1.5), (2160, 2.0), (3240, 2.5), (4320, 3.5), (5400, 4.5))
_WIDEST = 4.0
# OpenCV rasterises in 16.16 fixed point; points this far away leave the picture anyway.
_FARTHEST_PX = 16_384.0


def to_comfy_figure(
    keypoints: FloatArray, scores: FloatArray, *, size: tuple[float, float]
) -> Figure:
    """Returns the points as the node has them, the left hand first; nothing is hidden.

    Args:
        keypoints: [F, 133, 2], pixels of `size`.
        scores: [F, 133].
        size: (H, W) of the frame.
    """
    figure = to_node_figure(keypoints, scores, size=size, kp_score_thr=0)
    return replace(figure, hands=figure.hands[:, ::-1], hand_scores=figure.hand_scores[:, ::-1])


def draw_comfy(
    figures: Sequence[Figure],
    frame: int,
    *,
    size: tuple[int, int],
    draw_face_points: Strength = "full",
    draw_head: Strength = "full",
) -> UInt8Array:
    """Returns one pose picture, uint8 [H, W, 3] RGB.

    Args:
        figures: one per person, normalised by the picture; the node draws one.
        frame: which frame of the figures.
        size: (H, W) of the picture.
        draw_face_points: brows, eyes and mouth: as bright as their scores, at 0.35 of that, or not.
        draw_head: nose, eyes and ears: as bright as their scores, sticks at 0.35 and joints black,
            or all black.
    """
    height, width = size
    grown = _SHORT_SIDE_PX / min(height, width)
    canvas = np.zeros((int(height * grown), int(width * grown), 3), np.uint8)
    scale = np.array([canvas.shape[1], canvas.shape[0]], np.float64)
    for figure in figures:
        scores = figure.body_scores[frame].copy()
        if draw_head != "full":
            # A joint without a sign of life is not drawn at all, whatever its strength.
            scores[list(HEAD_JOINTS)] = -2.0 if draw_head == "weak" else 0.0
        there = figure.body_scores[frame] > 0
        _paint_body(canvas, figure.body[frame] * scale, scores, there)
        for hand, hand_scores in zip(figure.hands[frame], figure.hand_scores[frame], strict=True):
            _paint_hand(canvas, hand * scale, hand_scores)
        if draw_face_points != "none":
            strength = 1.0 if draw_face_points == "full" else _WEAK
            _paint_face(canvas, figure.face[frame] * scale, figure.face_scores[frame], strength)
    return np.asarray(cv2.resize(canvas, (width, height)), np.uint8)


def stick_width(width: int, height: int, base: int) -> int:
    """Returns a width in pixels for a canvas: `base` times a factor of its longer side."""
    longer = max(width, height)
    factor = next((factor for limit, factor in _WIDTHS if longer < limit), _WIDEST)
    return int(base * factor)


def _paint_body(
    canvas: UInt8Array, body: Points, scores: Points, there: npt.NDArray[np.bool_]
) -> None:
    radius = stick_width(canvas.shape[1], canvas.shape[0], _BODY_WIDTH)
    body = np.clip(body, -_FARTHEST_PX, _FARTHEST_PX)
    for (first, last), color in zip(STICKS, STICK_COLORS, strict=False):
        if not (there[first] and there[last]):
            continue
        alpha = _stick_alpha(float(scores[first]), float(scores[last]))
        dimmed = _faded(_faded(color, alpha), _BRIGHTNESS)
        cv2.fillConvexPoly(canvas, _outline(body[first], body[last], radius), dimmed)
    for joint in range(OPENPOSE_JOINTS):
        if there[joint]:
            color = _faded(STICK_COLORS[joint], max(float(scores[joint]), 0.0))
            cv2.circle(canvas, _pixel(body[joint]), radius, color, thickness=-1)


def _stick_alpha(first: float, last: float) -> float:
    if first == 0 or last == 0:
        return 0.0
    return first * last if first > 0 and last > 0 else _WEAK


def _paint_hand(canvas: UInt8Array, hand: Points, scores: Points) -> None:
    width = stick_width(canvas.shape[1], canvas.shape[0], _THIN_WIDTH)
    for (first, last), color in zip(HAND_EDGES, _hand_colors(), strict=True):
        if min(scores[first], scores[last]) < KP_SCORE_THR:
            continue
        ends = _pixel(hand[first]), _pixel(hand[last])
        if min(*ends[0], *ends[1]) > 0:
            level = int(scores[first] * scores[last] * 255)
            faded = tuple(int(channel * level / 255) for channel in color)
            cv2.line(canvas, *ends, faded, thickness=width)
    for point, score in zip(hand, scores, strict=True):
        _paint_dot(canvas, point, float(score), (0, 0, int(score * 255)))


def _paint_face(canvas: UInt8Array, face: Points, scores: Points, strength: float) -> None:
    for index in FACE_DRAWN:
        level = int(scores[index] * 255)
        level = level if strength == 1.0 else int(level * strength)
        _paint_dot(canvas, face[index], float(scores[index]), (level, level, level))


def _paint_dot(canvas: UInt8Array, point: Points, score: float, color: Color) -> None:
    pixel = _pixel(point)
    if score >= KP_SCORE_THR and min(pixel) > 0:
        radius = stick_width(canvas.shape[1], canvas.shape[0], _THIN_WIDTH)
        cv2.circle(canvas, pixel, radius, color, thickness=-1)


def _outline(first: Points, last: Points, half_width: int) -> npt.NDArray[np.int32]:
    """Returns the polygon of a thin ellipse between two points."""
    middle, (dx, dy) = (first + last) / 2, first - last
    axes = (int((dx**2 + dy**2) ** 0.5 / 2), half_width)
    angle = int(math.degrees(math.atan2(dy, dx)))
    centre = (int(middle[0]), int(middle[1]))
    return np.asarray(cv2.ellipse2Poly(centre, axes, angle, 0, 360, 1), np.int32)


def _hand_colors() -> npt.NDArray[np.float32]:
    """Returns [20, 3]: twenty even steps round the hue circle, 0 to 255, as float32 gives them."""
    sixths = np.arange(len(HAND_EDGES), dtype=np.float64) / len(HAND_EDGES)
    hue = sixths.astype(np.float32) * 6.0
    sector = hue.astype(int)
    up = (hue - sector).astype(np.float32)
    down, one, zero = 1 - up, np.ones_like(up), np.zeros_like(up)
    rows = (
        (one, up, zero),
        (down, one, zero),
        (zero, one, up),
        (zero, down, one),
        (up, zero, one),
        (one, zero, down),
    )
    colors = [[channel[i] for channel in rows[sector[i]]] for i in range(len(hue))]
    return np.array(colors, np.float32) * np.float32(255)


def _faded(color: Color, strength: float) -> Color:
    red, green, blue = (int(channel * strength) for channel in color)
    return red, green, blue


def _pixel(point: Points) -> tuple[int, int]:
    x, y = np.clip(point, -_FARTHEST_PX, _FARTHEST_PX)
    return int(x), int(y)
