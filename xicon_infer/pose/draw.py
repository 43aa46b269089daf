"""The flat figure over the capsules: head sticks, hands and face dots, drawn by OpenCV.

Points are pixels of the canvas, truncated to whole pixels as the references do. Circles and
sticks have sizes in pixels whatever the resolution, so a figure drawn at half size looks twice as
thick as one drawn at full size and halved.

Source: zai-org/SCAIL-Pose: pose_draw/draw_utils.py, pose_draw/draw_pose_utils.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from xicon_infer.pose.keypoints import Figure
from xicon_infer.pose.skeleton import (
    FACE_DRAWN,
    FACE_POINT_COLOR,
    HAND_EDGE_COLORS,
    HAND_EDGES,
    HAND_POINT_COLOR,
    HEAD_JOINTS,
    HEAD_STICKS,
    OPENPOSE_JOINTS,
    STICK_COLORS,
    STICKS,
    Rgb,
)
from xicon_infer.types import UInt8Array

Points = npt.NDArray[np.floating[Any]]

_STICK_WIDTH_PX = 4
_JOINT_RADIUS_PX = 4
# Sticks are dimmed so that the joints stand out.
_STICK_BRIGHTNESS = 0.6
# OpenCV rasterises in 16.16 fixed point; points this far away leave the picture anyway.
_FARTHEST_PX = 16_384.0


def draw_overlay(
    figures: Sequence[Figure],
    frame: int,
    *,
    height: int,
    width: int,
    draw_face: bool = True,
    draw_hands: bool = True,
) -> UInt8Array:
    """Returns what is laid over the capsules: head always, hands and face if asked for.

    Persons are added as uint8 and wrap round where they overlap, as in the references.

    Args:
        figures: one per person, coordinates in pixels of the canvas.
        frame: which frame of the figures.
        height: H, pixels.
        width: W, pixels.
        draw_face: draw brows, eyes and mouth.
        draw_hands: draw both hands.

    Returns:
        uint8 [H, W, 3] RGB on black.
    """
    overlay = np.zeros((height, width, 3), np.uint8)
    for figure in figures:
        canvas = np.zeros_like(overlay)
        paint_head(canvas, figure.body[frame], figure.body_visible[frame])
        if draw_hands:
            paint_hands(canvas, figure.hands[frame])
        if draw_face:
            paint_face(canvas, figure.face[frame])
        overlay += canvas
    return overlay


def paint_head(canvas: UInt8Array, body: Points, visible: npt.NDArray[np.bool_]) -> None:
    """Paints nose, eyes and ears with the sticks between them.

    Args:
        canvas: uint8 [H, W, 3], changed in place.
        body: [18, 2], pixels.
        visible: bool [18].
    """
    _paint_sticks(canvas, body, visible, HEAD_STICKS)
    _paint_joints(canvas, body, visible, HEAD_JOINTS)


def paint_body(canvas: UInt8Array, body: Points, visible: npt.NDArray[np.bool_]) -> None:
    """Paints the whole flat 18-joint skeleton; arguments as `paint_head`."""
    _paint_sticks(canvas, body, visible, range(len(STICKS)))
    _paint_joints(canvas, body, visible, range(OPENPOSE_JOINTS))


def paint_hands(canvas: UInt8Array, hands: Points) -> None:
    """Paints hands [hands, 21, 2], pixels; points at or left of column 0 or row 0 are skipped."""
    thickness = _thin(canvas)
    for hand in hands:
        pixels = [_pixel(point) for point in hand]
        for (first, last), color in zip(HAND_EDGES, HAND_EDGE_COLORS, strict=True):
            ends = pixels[first], pixels[last]
            if min(*ends[0], *ends[1]) > 0:
                cv2.line(canvas, *ends, color, thickness=thickness)
        for pixel in pixels:
            if min(pixel) > 0:
                cv2.circle(canvas, pixel, thickness, HAND_POINT_COLOR, thickness=-1)


def paint_face(canvas: UInt8Array, face: Points) -> None:
    """Paints brows, eyes and mouth of a face [68, 2], pixels, as white dots."""
    radius = _thin(canvas)
    for index in FACE_DRAWN:
        pixel = _pixel(face[index])
        if min(pixel) > 0:
            cv2.circle(canvas, pixel, radius, FACE_POINT_COLOR, thickness=-1)


def composite(frames: UInt8Array, overlay: UInt8Array) -> None:
    """Lays `overlay` over `frames` in place, both uint8 [..., 3].

    Channel by channel: only where the overlay's own channel is not black. Pure red over a green
    limb therefore becomes yellow, which is what the models were trained on.
    """
    np.copyto(frames, overlay, where=overlay != 0)


def _paint_sticks(
    canvas: UInt8Array, body: Points, visible: npt.NDArray[np.bool_], sticks: Sequence[int]
) -> None:
    """Paints sticks as thin ellipses, by number in `STICKS`."""
    for number in sticks:
        first, last = STICKS[number]
        if not (visible[first] and visible[last]):
            continue
        ends = np.clip(body[[first, last]], -_FARTHEST_PX, _FARTHEST_PX)
        middle, (dx, dy) = ends.mean(axis=0), ends[0] - ends[1]
        half_length = int((dx**2 + dy**2) ** 0.5 / 2)
        outline = cv2.ellipse2Poly(
            (int(middle[0]), int(middle[1])),
            (half_length, _STICK_WIDTH_PX),
            int(math.degrees(math.atan2(dy, dx))),
            0,
            360,
            1,
        )
        cv2.fillConvexPoly(canvas, np.asarray(outline), _dimmed(STICK_COLORS[number]))


def _paint_joints(
    canvas: UInt8Array, body: Points, visible: npt.NDArray[np.bool_], joints: Sequence[int]
) -> None:
    for joint in joints:
        if visible[joint]:
            pixel = _pixel(body[joint])
            cv2.circle(canvas, pixel, _JOINT_RADIUS_PX, STICK_COLORS[joint], thickness=-1)


def _pixel(point: Points) -> tuple[int, int]:
    x, y = np.clip(point, -_FARTHEST_PX, _FARTHEST_PX)
    return int(x), int(y)


def _dimmed(color: Rgb) -> Rgb:
    red, green, blue = (int(channel * _STICK_BRIGHTNESS) for channel in color)
    return red, green, blue


def _thin(canvas: UInt8Array) -> int:
    """Returns the width of hand lines and dots: 1 pixel, 2 from 600 pixels on."""
    return min(max(min(canvas.shape[:2]) // 300, 1), 2)
