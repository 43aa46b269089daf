"""Figures for the tests of SteadyDancer's pose: a standing person in shares of a frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.pose.people import make_track
from xicon_infer.pose.dancer_points import to_dancer_figure
from xicon_infer.pose.keypoints import Figure
from xicon_infer.types import PoseTrack

Array = np.ndarray[Any, Any]
SIZE = (320, 240)


def figure(frames: int = 1, *, size: tuple[int, int] = SIZE, depth: float = 3000.0) -> Figure:
    """Returns a person with every point visible, normalised by frames of `size` (H, W)."""
    pose = make_track(frames, size=size, depth=depth).pose
    return to_dancer_figure(pose.keypoints, pose.scores, size=size)


def hide_joints(person: Figure, *joints: int) -> Figure:
    """Returns the figure with some body joints not visible; their places stay."""
    visible = person.body_visible.copy()
    visible[:, list(joints)] = False
    return replace(person, body_visible=visible)


def with_body(person: Figure, body: Array) -> Figure:
    return replace(person, body=np.asarray(body, np.float64))


def still(size: tuple[int, int] = SIZE, depth: float = 3000.0, x: float = 0.0) -> PoseTrack:
    """Returns a reference: one frame of a person."""
    return make_track(1, size=size, depth=depth, x=x).pose
