"""Invented films of several persons: who walks where, and what a detector would say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from tests.pose.people import Array, make_track
from xicon_infer.pose.follow import FollowedPerson, follow
from xicon_infer.pose.observations import Bodies, Boxes, Observation
from xicon_infer.pose.track import load_tracks
from xicon_infer.types import BodyTrack, PoseTrack, Track

SIZE = (720, 1280)
DANCE = Path(__file__).parents[2] / "examples" / "dance_fullbody.npz"


def walker(
    x_mm: Callable[[float], float], *, seconds: float = 3.0, fps: int = 24, depth: float = 4000.0
) -> Track:
    """Returns a person at x_mm(t) whose right arm swings."""
    times = np.arange(round(seconds * fps)) / fps
    # One raised arm of twelve steps gives the swing; everything else is a shift of the body.
    still = make_track(13, size=SIZE, depth=depth)
    pose = np.round(6 + 6 * np.sin(6 * times)).astype(int)
    joints = still.body.joints[pose].copy()
    points = still.pose.keypoints[pose].copy()
    shift = np.array([x_mm(t) for t in times], np.float32)
    joints[..., 0] += shift[:, None]
    points[..., 0] += shift[:, None] * still.body.intrinsics[0, 0] / depth
    boxes = np.hstack([points.min(axis=1), points.max(axis=1)])
    scores = np.full(points.shape[:2], 0.9, np.float32)
    return Track(
        PoseTrack(points, scores, boxes, SIZE),
        BodyTrack(joints, np.zeros(joints.shape[:2], np.float32), still.body.intrinsics),
        Fraction(fps),
    )


def dancer() -> Track:
    """Returns the real dance of the examples: 212 frames at 24 per second, 1280 x 720 pixels."""
    return load_tracks(DANCE)[0]


def crossing(fps: int = 24, *, depths: tuple[float, float] = (3500.0, 4500.0)) -> list[Track]:
    """Returns two persons who walk through one another's place in three seconds."""
    return [
        walker(lambda t: -1200 + 800 * t, fps=fps, depth=depths[0]),
        walker(lambda t: 1300 - 850 * t, fps=fps, depth=depths[1]),
    ]


def observe(
    tracks: Sequence[Track],
    seen: Sequence[Array] | None = None,
    *,
    body: bool = True,
    ids: bool = False,
    order: Callable[[int, int], Sequence[int]] | None = None,
) -> list[Observation]:
    """Returns what is seen of the tracks.

    seen: bool [F] per track; all if None. body: are there 3-D joints? ids: does the detector follow
    persons itself? order: (frame, persons) -> the order of the rows.
    """
    frames = len(tracks[0].pose.keypoints)
    film = []
    for frame in range(frames):
        there = [n for n in range(len(tracks)) if seen is None or seen[n][frame]]
        if order is not None:
            there = [there[n] for n in order(frame, len(there))]
        film.append(_stack([tracks[n] for n in there], frame, body, there if ids else None))
    return film


def run(film: list[Observation], like: Track, **options) -> list[FollowedPerson]:
    """Returns the persons followed through a film of the size and rate of a track."""
    return follow(
        film, fps=like.fps, size=like.pose.size, intrinsics=like.body.intrinsics, **options
    )


def who(person: FollowedPerson, truth: Sequence[Track]) -> list[int]:
    """Returns which of the true persons is held at each frame where somebody is."""
    names = []
    for frame in np.flatnonzero(person.present):
        away = [
            np.median(np.abs(track.pose.keypoints[frame] - person.track.pose.keypoints[frame]))
            for track in truth
        ]
        assert min(away) < 1
        names.append(int(np.argmin(away)))
    return names


def identities(people: Sequence[FollowedPerson], truth: Sequence[Track]) -> list[list[int]]:
    """Returns the different true persons in each followed one; one each is perfect."""
    return [sorted(set(who(person, truth))) for person in people]


def absent(frames: int, *gaps: tuple[int, int]) -> Array:
    """Returns bool [F], False in the gaps (first frame, frame after the last)."""
    seen = np.ones(frames, bool)
    for first, last in gaps:
        seen[first:last] = False
    return seen


def _stack(tracks: list[Track], frame: int, body: bool, ids: list[int] | None) -> Observation:
    persons = len(tracks)
    joints = np.array([t.body.joints[frame] for t in tracks], np.float32).reshape(persons, 24, 3)
    return Observation(
        Boxes(
            np.array([t.pose.bboxes[frame] for t in tracks], np.float32).reshape(persons, 4),
            np.full(persons, 0.8, np.float32),
            tuple(ids) if ids is not None else (-1,) * persons,
        ),
        np.array([t.pose.keypoints[frame] for t in tracks], np.float32).reshape(persons, 133, 2),
        np.array([t.pose.scores[frame] for t in tracks], np.float32).reshape(persons, 133),
        Bodies(joints * body, np.zeros((persons, 24), np.float32)),
    )
