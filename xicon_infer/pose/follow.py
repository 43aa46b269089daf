"""Persons followed from frame to frame: observations in, one track per person out.

Each person is expected where a constant velocity carries them, and the persons of a frame are
paired with the expected ones at the smallest sum of costs (`matching`). Somebody who is lost may
be found again for `reidentify_s` seconds, near where they should be; later they count as a new
person. Without a gap nobody moves farther than a person can, so no track jumps from one person to
another. Nothing is interpolated here: where a person was not seen, the track holds zeros.

Shape letters: F frames, P persons in a frame, K = 133 keypoints, J = 24 joints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.camera import Float64Array, default_intrinsics, project
from xicon_infer.pose.matching import BODY, Look, find_duplicates, make_look, pair
from xicon_infer.pose.observations import Observation
from xicon_infer.pose.skeleton import KEYPOINTS, SMPL_JOINTS
from xicon_infer.pose.track import drop_unusable
from xicon_infer.types import BodyTrack, Float32Array, PoseTrack, Track

REIDENTIFY_S = 2.0
"""Longest absence, in seconds, after which somebody is still the same person."""

MIN_SEEN_S = 0.15
"""Somebody seen for a shorter time, in seconds, is a mistake of the detector."""

# A velocity is a mean over about this time: shorter follows noise, longer misses turns.
_RECENT_S = 0.2
# Nobody keeps walking straight for longer than this while unseen.
_COAST_S = 0.5


@dataclass(frozen=True)
class FollowedPerson:
    """One person of the video.

    track: the motion; points, scores, boxes and joints are zero in frames without the person.
    present: bool [F], whether the person was seen.
    mean_area: square pixels of the box inside the frame, mean of the frames where seen.
    mean_score: the detector's certainty, 0 to 1, mean of the frames where seen.
    first_frame, last_frame: the first and last frame where seen.
    """

    track: Track
    present: npt.NDArray[np.bool_]
    mean_area: float
    mean_score: float
    first_frame: int
    last_frame: int


@dataclass(frozen=True)
class _Seen:
    """Persons of one frame: float32 [P, ...] arrays as in `Observation`, all finite."""

    bboxes: Float32Array
    box_scores: Float32Array
    detector_ids: tuple[int, ...]
    keypoints: Float32Array
    scores: Float32Array
    joints: Float32Array
    uncertainties: Float32Array

    def rows(self, chosen: list[int]) -> _Seen:
        """Returns some of the persons, in the order given, as arrays of their own."""
        return _Seen(
            self.bboxes[chosen],
            self.box_scores[chosen],
            tuple(self.detector_ids[row] for row in chosen),
            self.keypoints[chosen],
            self.scores[chosen],
            self.joints[chosen],
            self.uncertainties[chosen],
        )


class _Person:
    """The frames where one person was seen, and how it moves."""

    def __init__(self, frame: int, seen: _Seen) -> None:
        self.frames = [frame]
        self.history = [seen]
        self.detector_id = seen.detector_ids[0]
        self._velocity = np.zeros(2)
        self._steps = 0

    def update(self, frame: int, seen: _Seen, *, fps: float, intrinsics: Float32Array) -> None:
        """Adds one more frame."""
        elapsed = (frame - self.frames[-1]) / fps
        self._steps += 1
        share = 1 - math.exp(-elapsed / _RECENT_S)
        moved = _moved(_look(self.history[-1]), _look(seen), intrinsics) / elapsed
        # A plain mean at first, so that the zero before the first step has no weight.
        self._velocity += max(share, 1 / self._steps) * (moved - self._velocity)
        self.frames.append(frame)
        self.history.append(seen)
        if seen.detector_ids[0] >= 0:
            self.detector_id = seen.detector_ids[0]

    def expect(self, frame: int, *, fps: float, intrinsics: Float32Array) -> Look:
        """Returns how the person should look at a later frame."""
        last = _look(self.history[-1])
        shift = self._velocity * min((frame - self.frames[-1]) / fps, _COAST_S)
        # Across the line of sight only: depths are too noisy for a speed.
        pelvis = last.pelvis.copy()
        pelvis[:, :2] += shift * pelvis[:, 2:] / intrinsics[[0, 1], [0, 1]]
        return Look(
            last.bboxes + np.tile(shift, 2),
            last.points + shift,
            pelvis,
            np.array([self.detector_id], np.int64),
        )


class Follower:
    """Follows persons through a video that is read frame by frame.

    Only what was seen of each person is kept: about 2 kB per person and frame.

    Args:
        fps: frames per second.
        size: (H, W) of the frames the pixels refer to.
        intrinsics: float32 [3, 3] pixels, the camera of the 3-D joints; 55 degrees over the longer
            side if None.
        reidentify_s: longest absence, seconds, after which somebody is still the same person.
        min_seen_s: persons seen for less are dropped, seconds, unless they are there in half of
            all frames.

    Raises:
        InvalidRequest: if `fps` is not above 0 or a time is negative.
    """

    def __init__(
        self,
        *,
        fps: Fraction,
        size: tuple[int, int],
        intrinsics: Float32Array | None = None,
        reidentify_s: float = REIDENTIFY_S,
        min_seen_s: float = MIN_SEEN_S,
    ) -> None:
        if fps <= 0:
            raise InvalidRequest(f"fps is {fps}; it must be above 0.", field="fps")
        for name, value in (("reidentify_s", reidentify_s), ("min_seen_s", min_seen_s)):
            if not 0 <= value < math.inf:
                raise InvalidRequest(f"{name} is {value}; allowed: 0 or more seconds.", field=name)
        camera = default_intrinsics(*size) if intrinsics is None else intrinsics
        self._fps, self._size = fps, size
        self._intrinsics = camera.astype(np.float32)
        self._reidentify_s, self._min_seen_s = reidentify_s, min_seen_s
        self._frames = 0
        self._persons: list[_Person] = []

    def add(self, observation: Observation) -> None:
        """Takes the next frame.

        Raises:
            InvalidRequest: if the arrays of the observation do not fit together.
        """
        seen = _clean(observation, self._frames)
        self._forget_brief()
        taken = self._match_ids(seen)
        taken |= self._match_looks(seen, taken)
        for row in range(len(seen.bboxes)):
            if row not in taken:
                self._persons.append(_Person(self._frames, seen.rows([row])))
        self._frames += 1

    def people(self) -> list[FollowedPerson]:
        """Returns everybody so far, by first frame, then from left to right."""
        needed = self._needed_frames()
        return [self._finish(p) for p in self._persons if len(p.frames) >= needed]

    def _needed_frames(self) -> int:
        enough = math.ceil(self._min_seen_s * float(self._fps) - 1e-6)
        return max(1, min(enough, math.ceil(self._frames / 2)))

    def _age_s(self, person: _Person) -> float:
        return (self._frames - person.frames[-1]) / float(self._fps)

    def _is_open(self, person: _Person) -> bool:
        # One frame's time is no absence; the tiny term is for rounding.
        absence = self._age_s(person) - 1 / float(self._fps)
        return absence <= self._reidentify_s + 1e-6

    def _forget_brief(self) -> None:
        """Drops the mistakes of the detector as soon as they cannot come back."""
        needed = self._needed_frames()
        self._persons = [p for p in self._persons if self._is_open(p) or len(p.frames) >= needed]

    def _match_ids(self, seen: _Seen) -> set[int]:
        """Pairs by the detector's own identities; returns the rows that found their person."""
        known = {p.detector_id: p for p in self._persons if p.detector_id >= 0}
        rows = {row for row, number in enumerate(seen.detector_ids) if number in known}
        for row in rows:
            person = known[seen.detector_ids[row]]
            self._update(person, seen, row)
        return rows

    def _match_looks(self, seen: _Seen, taken: set[int]) -> set[int]:
        """Pairs the others by their looks; returns the rows that found their person."""
        rows = [row for row in range(len(seen.bboxes)) if row not in taken]
        waiting = [p for p in self._persons if p.frames[-1] != self._frames and self._is_open(p)]
        if not rows or not waiting:
            return set()
        fps = float(self._fps)
        looks = [p.expect(self._frames, fps=fps, intrinsics=self._intrinsics) for p in waiting]
        expected = Look(*(np.concatenate(part) for part in zip(*looks, strict=True)))
        ages = np.array([self._age_s(p) for p in waiting])
        choices = pair(expected, _look(seen.rows(rows)), age_s=ages, frame_s=1 / fps)
        for person, choice in zip(waiting, choices, strict=True):
            if choice >= 0:
                self._update(person, seen, rows[choice])
        return {rows[choice] for choice in choices if choice >= 0}

    def _update(self, person: _Person, seen: _Seen, row: int) -> None:
        person.update(
            self._frames, seen.rows([row]), fps=float(self._fps), intrinsics=self._intrinsics
        )

    def _finish(self, person: _Person) -> FollowedPerson:
        frames = self._frames

        def spread(values: list[Float32Array]) -> Float32Array:
            whole = np.zeros((frames, *values[0].shape[1:]), np.float32)
            whole[person.frames] = np.concatenate(values)
            return whole

        history = person.history
        pose = PoseTrack(
            keypoints=spread([s.keypoints for s in history]),
            scores=spread([s.scores for s in history]),
            bboxes=spread([s.bboxes for s in history]),
            size=self._size,
        )
        body = BodyTrack(
            joints=spread([s.joints for s in history]),
            uncertainties=spread([s.uncertainties for s in history]),
            intrinsics=self._intrinsics,
        )
        present = np.zeros(frames, bool)
        present[person.frames] = True
        return FollowedPerson(
            track=drop_unusable(Track(pose, body, self._fps)),
            present=present,
            mean_area=float(visible_areas(pose)[present].mean()),
            mean_score=float(np.concatenate([s.box_scores for s in history]).mean()),
            first_frame=person.frames[0],
            last_frame=person.frames[-1],
        )


def follow(
    observations: Sequence[Observation],
    *,
    fps: Fraction,
    size: tuple[int, int],
    intrinsics: Float32Array | None = None,
    reidentify_s: float = REIDENTIFY_S,
    min_seen_s: float = MIN_SEEN_S,
) -> list[FollowedPerson]:
    """Returns the persons of a video, by first frame, then from left to right.

    The order of the persons inside a frame does not matter. Where the detector gives identities
    (0 or more) they are kept: equal ones are one person, different ones never are.

    Args:
        observations: one per frame.
        fps: frames per second.
        size: (H, W) of the frames the pixels refer to.
        intrinsics: float32 [3, 3] pixels, the camera of the 3-D joints; 55 degrees over the longer
            side if None.
        reidentify_s: longest absence, seconds, after which somebody is still the same person.
        min_seen_s: persons seen for less are dropped, seconds, unless they are there in half of
            all frames.

    Raises:
        InvalidRequest: if an option is not allowed or an observation's arrays do not fit together.
    """
    follower = Follower(
        fps=fps,
        size=size,
        intrinsics=intrinsics,
        reidentify_s=reidentify_s,
        min_seen_s=min_seen_s,
    )
    for observation in observations:
        follower.add(observation)
    return follower.people()


def visible_areas(pose: PoseTrack) -> Float64Array:
    """Returns the area of each frame's box that lies inside the picture, float64 [F], pixels."""
    height, width = pose.size
    boxes = np.clip(pose.bboxes.astype(np.float64), 0, [width, height, width, height])
    areas: Float64Array = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return areas


def _look(seen: _Seen) -> Look:
    return make_look(seen.bboxes, seen.keypoints, seen.scores, seen.joints, seen.detector_ids)


def _moved(before: Look, after: Look, intrinsics: Float32Array) -> Float64Array:
    """Returns by how much one person moved, float64 [2], pixels."""
    # The pelvis stays put where a box is cut by the border or by somebody in front.
    shift = project(after.pelvis, intrinsics) - project(before.pelvis, intrinsics)
    if np.isnan(shift).any():
        boxes = after.bboxes - before.bboxes
        shift = (boxes[:, :2] + boxes[:, 2:]) / 2
    return shift[0]


def _clean(observation: Observation, frame: int) -> _Seen:
    """Returns each person once, from left to right, with finite numbers.

    A person without a usable box is left out. Sorting makes the result the same for every order of
    the persons in the frame.
    """
    _check(observation, frame)
    boxes, bodies = observation.boxes, observation.bodies
    finite = np.logical_and.reduce(np.isfinite(observation.keypoints), axis=2)
    whole = np.logical_and.reduce(np.isfinite(bodies.joints), axis=2)
    scores = np.nan_to_num(observation.keypoint_scores, nan=0, posinf=0, neginf=0).clip(0, 1)
    seen = _Seen(
        boxes.bboxes.astype(np.float32),
        np.nan_to_num(boxes.scores, nan=0, posinf=0, neginf=0).clip(0, 1).astype(np.float32),
        boxes.ids,
        np.where(finite[..., None], observation.keypoints, 0).astype(np.float32),
        np.where(finite, scores, 0).astype(np.float32),
        np.where(whole[..., None], bodies.joints, 0).astype(np.float32),
        np.nan_to_num(bodies.uncertainties, nan=0, posinf=0, neginf=0).astype(np.float32),
    )
    sides = seen.bboxes[:, 2:] - seen.bboxes[:, :2]
    usable = np.flatnonzero(np.isfinite(seen.bboxes).all(axis=1) & (sides > 0).all(axis=1))
    best = seen.rows(sorted(usable.tolist(), key=lambda row: _rank(seen, row), reverse=True))
    duplicates = find_duplicates(_look(best))
    kept = [row for row in range(len(best.bboxes)) if row not in duplicates]
    return best.rows(sorted(kept, key=lambda row: tuple(best.bboxes[row].tolist())))


def _rank(seen: _Seen, row: int) -> tuple[float, ...]:
    """Returns what makes one of two detections of a person the better one, best evidence first."""
    box = seen.bboxes[row]
    return (
        float(seen.joints[row].any()),
        float(seen.scores[row, BODY].mean()),
        float(seen.box_scores[row]),
        *box.tolist(),
    )


def _check(observation: Observation, frame: int) -> None:
    persons = len(observation.boxes.bboxes)
    shapes = {
        "boxes.bboxes": (observation.boxes.bboxes.shape, (persons, 4)),
        "boxes.scores": (observation.boxes.scores.shape, (persons,)),
        "boxes.ids": ((len(observation.boxes.ids),), (persons,)),
        "keypoints": (observation.keypoints.shape, (persons, KEYPOINTS, 2)),
        "keypoint_scores": (observation.keypoint_scores.shape, (persons, KEYPOINTS)),
        "bodies.joints": (observation.bodies.joints.shape, (persons, SMPL_JOINTS, 3)),
        "bodies.uncertainties": (observation.bodies.uncertainties.shape, (persons, SMPL_JOINTS)),
    }
    for name, (shape, expected) in shapes.items():
        if shape != expected:
            raise InvalidRequest(
                f"{name} of frame {frame} has shape {list(shape)}; {list(expected)} is needed, "
                "one row per person.",
                field="observations",
            )
