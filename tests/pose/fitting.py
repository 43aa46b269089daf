"""A driver whose points fit its joints, and references made of it, for the alignment tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.pose.people import make_track
from xicon_infer.pose.align import AlignOptions, align_tracks
from xicon_infer.types import PoseTrack

SIZE = (192, 128)


def driver(frames: int = 3, **kwargs):
    """Returns a track whose neck joint projects onto the middle of its shoulders."""
    track = make_track(frames, size=SIZE, **kwargs)
    joints, camera = track.body.joints.copy(), track.body.intrinsics
    shoulders = track.pose.keypoints[:, 5:7].mean(axis=1)
    centre, focal = camera[:2, 2], camera[0, 0]
    joints[:, 12, :2] = (shoulders - centre) / focal * joints[:, 12, 2:]
    return replace(track, body=replace(track.body, joints=joints))


def picture_of(track, *, m=1.0, s=1.0, p=0.0, q=0.0, frame=0) -> PoseTrack:
    """Returns a reference: one frame of the track, scaled about the centre and shifted."""
    centre = np.array([SIZE[1], SIZE[0]]) / 2
    points = (track.pose.keypoints[frame] - centre) * [m, m * s] + centre + [p, q]
    pose = track.pose
    return PoseTrack(
        points[None].astype(np.float32), pose.scores[frame : frame + 1], pose.bboxes[:1], pose.size
    )


def hidden(reference: PoseTrack, *parts, score=0.0, place=None) -> PoseTrack:
    scores, points = reference.scores.copy(), reference.keypoints.copy()
    for part in parts:
        scores[:, part] = score
        if place is not None:
            points[:, part] = place
    return replace(reference, scores=scores, keypoints=points)


def align(track, reference, **options):
    tracks = track if isinstance(track, list) else [track]
    return align_tracks(tracks, reference, size=SIZE, options=AlignOptions(**options))
