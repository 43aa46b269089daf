"""Frames in which the subject of SteadyDancer is not seen.

The model expects a figure in every frame. Short gaps are closed point by point before
(`track.fill_gaps`); over longer ones the last pose is held, so that the character stands still
instead of vanishing. Too many of them leave nothing to animate.

Shape letters: F frames.
"""

from __future__ import annotations

import numpy as np

from xicon_infer.errors import PoseError
from xicon_infer.pose.dancer_points import BoolArray, person_present, rows
from xicon_infer.pose.keypoints import Figure

MAX_LOST_SHARE = 0.3
"""A subject lost in more than this share of the frames is refused."""


def hold_lost(figure: Figure, *, anchor_frame: int | None) -> tuple[Figure, list[tuple[int, int]]]:
    """Returns the figure with the last pose held where nobody is seen, and where that is.

    Before the first frame that shows the person the first pose is held.

    Args:
        figure: F frames.
        anchor_frame: the frame that must show the person, or None for none in particular.

    Returns:
        The figure, and (first, last) of every run of held frames.

    Raises:
        PoseError: the person is lost in more than `MAX_LOST_SHARE` of the frames, or in the
            anchor frame.
    """
    present = person_present(figure)
    frames, lost = len(present), int((~present).sum())
    if lost > MAX_LOST_SHARE * frames:
        raise PoseError(
            f"the person is lost in {lost} of {frames} frames of the motion "
            f"({lost / frames:.0%}); at most {MAX_LOST_SHARE:.0%} can be bridged. Choose another "
            "person (subject), cut the video to where the person is seen, or use one that shows "
            "the person throughout.",
            code="PERSON_LOST",
        )
    if anchor_frame is not None and not present[anchor_frame]:
        raise PoseError(
            f"nobody is seen in frame {anchor_frame} of the motion, which is compared with the "
            f"reference; use anchor_frame={int(present.argmax())}, or skip the frames before it.",
            field="anchor_frame",
        )
    number = np.arange(frames)
    last_seen = np.maximum.accumulate(np.where(present, number, -1))
    shown = np.where(last_seen < 0, present.argmax(), last_seen)
    return rows(figure, shown), _runs(~present)


def _runs(flags: BoolArray) -> list[tuple[int, int]]:
    """Returns first and last of every run of True."""
    padded = np.concatenate([[0], flags.astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(padded)).reshape(-1, 2)
    return [(int(start), int(end) - 1) for start, end in edges]
