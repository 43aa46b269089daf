"""Hands and faces that hang on a point nobody saw.

`track.hide_unreliable` looks at the points of a hand or face and at where its joint projects. This
adds the third sign of a guess: the wrist or nose of the 2-D pose itself is below the threshold, as
where an arm is cut off by the border or hidden behind the body.
"""

from __future__ import annotations

from dataclasses import replace

from xicon_infer.pose.keypoints import KP_SCORE_THR
from xicon_infer.pose.skeleton import FACE, LEFT_HAND, LEFT_WRIST, NOSE, RIGHT_HAND, RIGHT_WRIST
from xicon_infer.types import Track

PARTS: dict[str, tuple[slice, int]] = {
    "face": (FACE, NOSE),
    "left_hand": (LEFT_HAND, LEFT_WRIST),
    "right_hand": (RIGHT_HAND, RIGHT_WRIST),
}
"""Name -> its points, and the point that it hangs on."""


def hide_loose_parts(track: Track, kp_score_thr: float = KP_SCORE_THR) -> Track:
    """Returns the track with score 0 for hands and faces whose wrist or nose is unsure.

    The 3-D joints stay: a limb outside the picture is what they are good for. Close short gaps
    first (`fill_gaps`), so that a wrist which is missing for a moment does not hide its hand.

    Args:
        track: F frames.
        kp_score_thr: a wrist or nose with a lower score is unsure, 0 to 1; 0 hides nothing.
    """
    scores = track.pose.scores.copy()
    for part, anchor in PARTS.values():
        scores[track.pose.scores[:, anchor] < kp_score_thr, part] = 0
    return replace(track, pose=replace(track.pose, scores=scores))
