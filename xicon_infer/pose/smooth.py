"""Jitter taken out of a track by a One-Euro filter: strong on points at rest, weak on fast ones.

Off by default. The filter runs over the video forwards and backwards and the two are averaged:
the whole video is there, and a filter that runs forwards alone would let the motion lag behind the
music. Speeds are measured in body heights, so one setting serves joints in millimetres and points
in pixels of any resolution.

Shape letters: F frames, N points, C coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.camera import Float64Array
from xicon_infer.pose.keypoints import KP_SCORE_THR
from xicon_infer.types import Float32Array, Track

BoolArray = npt.NDArray[np.bool_]

_HEIGHT_MM = 1700.0
# The speed itself is smoothed at this frequency, as in the paper.
_SPEED_CUTOFF_HZ = 1.0


@dataclass(frozen=True)
class SmoothOptions:
    """How much jitter is taken out.

    strength: 0 leaves the track alone, 1 is the filter's result, between is a mixture.
    min_cutoff: hertz, above 0; motion of a resting point faster than this is taken for jitter.
    beta: hertz per (body height per second), 0 or more; how much the limit rises with speed.

    Raises:
        InvalidRequest: if a value is not allowed.
    """

    strength: float = 0.0
    min_cutoff: float = 1.5
    beta: float = 10.0

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        checks = {
            "strength": (0 <= self.strength <= 1, "0 to 1"),
            "min_cutoff": (0 < self.min_cutoff < math.inf, "above 0 hertz"),
            "beta": (0 <= self.beta < math.inf, "0 or more"),
        }
        for name, (allowed, expected) in checks.items():
            if not allowed:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)!r}; allowed: {expected}.", field=name
                )


def smooth_track(track: Track, options: SmoothOptions | None = None) -> Track:
    """Returns the track with less jitter in its joints and keypoints.

    A missing joint (zero) and a keypoint of a score below 0.3 stay as they are, and the filter
    starts anew after them: close short gaps first (`fill_gaps`). Scores, boxes and uncertainties
    stay.

    Args:
        track: F frames.
        options: how much; the default leaves the track alone.
    """
    options = options or SmoothOptions()
    pose, body = track.pose, track.body
    if options.strength == 0 or not len(pose.keypoints):
        return track
    seen = pose.scores >= KP_SCORE_THR
    keypoints = _mix(pose.keypoints, seen, _height_px(track), track.fps, options)
    there = np.logical_or.reduce(body.joints != 0, axis=2)
    joints = _mix(body.joints, there, _HEIGHT_MM, track.fps, options)
    return Track(replace(pose, keypoints=keypoints), replace(body, joints=joints), track.fps)


def one_euro(
    values: Float64Array,
    present: BoolArray,
    *,
    fps: float,
    min_cutoff: float,
    beta: float,
) -> Float64Array:
    """Returns values [F, N, C] after the filter, which looks back in time only.

    Args:
        values: float64 [F, N, C], in units of which `beta` is per unit and second.
        present: bool [F, N]; the others stay as they are and start the filter anew.
        fps: frames per second.
        min_cutoff: hertz, above 0.
        beta: hertz per unit and second.

    Source: Casiez, Roussel, Vogel, "1 Euro Filter", CHI 2012, equations 2 to 6. Differs from it: a
    point has one speed, not one per coordinate, so that turning the camera turns the result.
    """
    result = values.copy()
    velocity = np.zeros(values.shape[1:])
    speed_share = _share(np.float64(_SPEED_CUTOFF_HZ), fps)
    for frame in range(1, len(values)):
        running = (present[frame] & present[frame - 1])[:, None]
        moved = (values[frame] - values[frame - 1]) * fps
        velocity = np.where(running, velocity + speed_share * (moved - velocity), 0.0)
        speed = np.linalg.norm(velocity, axis=1, keepdims=True)
        share = _share(min_cutoff + beta * speed, fps)
        last = result[frame - 1]
        result[frame] = np.where(running, last + share * (values[frame] - last), values[frame])
    return result


def _mix(
    values: Float32Array, present: BoolArray, height: float, fps: Fraction, options: SmoothOptions
) -> Float32Array:
    """Returns float32 [F, N, C]: the values mixed with the mean of both directions' filters."""
    scaled = values.astype(np.float64) / height
    rate, cutoff, beta = float(fps), options.min_cutoff, options.beta
    forwards = one_euro(scaled, present, fps=rate, min_cutoff=cutoff, beta=beta)
    turned, turned_present = scaled[::-1], present[::-1]
    backwards = one_euro(turned, turned_present, fps=rate, min_cutoff=cutoff, beta=beta)[::-1]
    change = (forwards + backwards) / 2 - scaled
    mixed = (values + options.strength * height * change).astype(np.float32)
    return np.where(present[..., None], mixed, values)


def _share(cutoff: Float64Array | np.float64, fps: float) -> Float64Array:
    """Returns how much of a new value an exponential filter of this cutoff takes, 0 to 1."""
    turn = 2 * math.pi * np.asarray(cutoff) / fps
    return turn / (turn + 1)


def _height_px(track: Track) -> float:
    """Returns the median height of the boxes, pixels; the frame's height if there is none."""
    heights = track.pose.bboxes[:, 3] - track.pose.bboxes[:, 1]
    heights = heights[heights > 0]
    return float(np.median(heights)) if heights.size else float(track.pose.size[0])
