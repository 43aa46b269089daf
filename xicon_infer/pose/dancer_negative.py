"""SteadyDancer's negative pose: the same dance with other proportions in every frame.

Each frame is stretched about its own neck by a random scale and aspect, so that bones change from
frame to frame while the neck keeps its way. The model is guided away from it.

The authors draw from Python's global generator without a seed; here the seed is an argument, and
with the same seed the same numbers come in the same order.

Source: MCG-NJU/SteadyDancer: preprocess/utils_aug.py
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from xicon_infer.pose.dancer_align import DancerMode
from xicon_infer.pose.dancer_points import HIDDEN, hidden_points
from xicon_infer.pose.keypoints import Figure, Float64Array

DRAWS = ("offset_x", "offset_y", "scale", "aspect")
"""What is drawn for a frame, in this order; the two offsets are drawn and never used."""

RANGES: tuple[tuple[float, float], ...] = ((-0.2, 0.2), (-0.2, 0.2), (0.7, 1.3), (0.6, 1.4))
"""Lowest and highest of each; heights and widths of the canvas, then factors."""

_SCALE, _ASPECT = 2, 3
_NECK = 1


def negative_draws(num_frames: int, seed: int) -> Float64Array:
    """Returns float64 [F, 4]: the numbers of every frame, columns as `DRAWS`.

    A frame's numbers do not depend on how many frames follow it.

    Args:
        num_frames: F.
        seed: of Python's generator.
    """
    generator = random.Random(seed)
    drawn = [[generator.uniform(*limits) for limits in RANGES] for _ in range(num_frames)]
    return np.array(drawn, np.float64).reshape(num_frames, len(RANGES))


def stretch_about_neck(
    figure: Figure, draws: Float64Array, *, mode: DancerMode = "robust"
) -> Figure:
    """Returns every frame stretched about its neck.

    Args:
        figure: F frames, normalised by the canvas.
        draws: [F, 4] from `negative_draws`.
        mode: "robust" stretches the whole figure and leaves hidden points hidden; "official"
            stretches them too, and shifts the face without stretching it.
    """
    aspect = np.stack([draws[:, _ASPECT], np.ones(len(draws))], axis=1)
    factor = (draws[:, _SCALE, None] * aspect)[:, None]
    neck = figure.body[:, _NECK, None]
    shift = neck - factor * neck
    hands = figure.hands * factor[:, None] + shift[:, None]
    face = figure.face + shift
    if mode == "robust":
        hands = np.where(hidden_points(figure.hands)[..., None], HIDDEN, hands)
        stretched = figure.face * factor + shift
        face = np.where(hidden_points(figure.face)[..., None], HIDDEN, stretched)
    return replace(figure, body=figure.body * factor + shift, hands=hands, face=face)
