"""The figure that SteadyDancer was shown: flat sticks on black, red and blue exchanged.

Sticks are 4 pixels to either side, dots have a radius of 4 and hand lines a width of 2 whatever
the size, so the authors draw on a canvas twice as large as the result and shrink it. Sticks are
dimmed to 0.6; joints and hands are not. The model never saw face points.

Source: MCG-NJU/SteadyDancer: preprocess/pose/script/util.py, preprocess/pose/script/dwpose.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from xicon_infer.pose.draw import paint_body
from xicon_infer.pose.keypoints import Figure
from xicon_infer.pose.skeleton import FACE_POINT_COLOR, HAND_EDGES, HAND_POINT_COLOR, Rgb
from xicon_infer.types import UInt8Array

Points = npt.NDArray[np.floating[Any]]

CANVAS_SCALE = 2
"""The authors draw at twice the size of the result."""

_HAND_WIDTH_PX = 2
_HAND_RADIUS_PX = 4
_FACE_RADIUS_PX = 3
# OpenCV rasterises in 16.16 fixed point; points this far away leave the picture anyway.
_FARTHEST_PX = 16_384.0
# Twenty even steps round the hue circle in float64, rounded by OpenCV; `skeleton.HAND_EDGE_COLORS`
# are the same truncated.
HAND_COLORS: tuple[Rgb, ...] = (
    (255, 0, 0),
    (255, 77, 0),
    (255, 153, 0),
    (255, 229, 0),
    (204, 255, 0),
    (128, 255, 0),
    (51, 255, 0),
    (0, 255, 25),
    (0, 255, 102),
    (0, 255, 179),
    (0, 255, 255),
    (0, 178, 255),
    (0, 102, 255),
    (0, 25, 255),
    (51, 0, 255),
    (128, 0, 255),
    (204, 0, 255),
    (255, 0, 230),
    (255, 0, 153),
    (255, 0, 77),
)


def draw_dancer(
    figures: Sequence[Figure],
    frame: int,
    *,
    size: tuple[int, int],
    draw_face: bool = False,
) -> UInt8Array:
    """Returns one pose picture as the model sees it, uint8 [H, W, 3] RGB.

    Args:
        figures: one per person, normalised by the canvas; the authors draw one.
        frame: which frame of the figures.
        size: (H, W) of the canvas; twice the result's for the model.
        draw_face: dot the 68 face points too, which the model was not trained with.
    """
    height, width = size
    canvas = np.zeros((height, width, 3), np.uint8)
    scale = np.array([width, height], np.float64)
    for figure in figures:
        paint_body(canvas, figure.body[frame] * scale, figure.body_visible[frame])
    for figure in figures:
        _paint_hands(canvas, figure.hands[frame] * scale)
        if draw_face:
            _paint_dots(canvas, figure.face[frame] * scale, _FACE_RADIUS_PX, FACE_POINT_COLOR)
    return np.ascontiguousarray(canvas[..., ::-1])


def _paint_hands(canvas: UInt8Array, hands: Points) -> None:
    """Paints hands [2, 21, 2], pixels; points at or left of column 0 or row 0 are skipped."""
    for hand in hands:
        pixels = _whole_pixels(hand)
        for (first, last), color in zip(HAND_EDGES, HAND_COLORS, strict=True):
            ends = pixels[first], pixels[last]
            if min(*ends[0], *ends[1]) > 0:
                cv2.line(canvas, *ends, color, thickness=_HAND_WIDTH_PX)
        _paint_dots(canvas, hand, _HAND_RADIUS_PX, HAND_POINT_COLOR)


def _paint_dots(canvas: UInt8Array, points: Points, radius: int, color: Rgb) -> None:
    for pixel in _whole_pixels(points):
        if min(pixel) > 0:
            cv2.circle(canvas, pixel, radius, color, thickness=-1)


def _whole_pixels(points: Points) -> list[tuple[int, int]]:
    near = np.clip(points, -_FARTHEST_PX, _FARTHEST_PX)
    return [(int(x), int(y)) for x, y in near]
