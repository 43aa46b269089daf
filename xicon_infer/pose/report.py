"""What the pose stage found and decided, for the user and for programs.

Nothing is measured twice: gaps and hidden parts are what `fill_gaps`, `hide_unreliable` and
`hide_loose_parts` do to the very track that is drawn.

Shape letters: F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.pose.follow import FollowedPerson
from xicon_infer.pose.keypoints import KP_SCORE_THR
from xicon_infer.pose.subject import explain
from xicon_infer.pose.track import MAX_GAP_S, drop_unusable, fill_gaps, hide_unreliable
from xicon_infer.pose.trust import PARTS, hide_loose_parts
from xicon_infer.types import Track

# A subject in fewer frames than this share deserves a warning.
_FEW_SHARE = 0.5
# So does a hand or face that is hidden in more than this share of the frames drawn.
_HIDDEN_SHARE = 0.5


@dataclass(frozen=True)
class Gap:
    """Frames `start` to `start + length - 1` without the subject's body.

    filled: True where the neighbours were interpolated, False where nothing is drawn.
    """

    start: int
    length: int
    filled: bool


@dataclass(frozen=True)
class PersonFacts:
    """One person found: number, share of frames where seen (0 to 1), size and certainty."""

    index: int
    share: float
    first_frame: int
    last_frame: int
    mean_area: float
    mean_score: float


@dataclass(frozen=True)
class SubjectFacts:
    """One person drawn.

    index: the person's number. frames: frames where the body was seen. gaps: the others, in runs.
    hidden_faces, hidden_left_hands, hidden_right_hands: drawn frames where that part is left out
        because it would be a guess.
    """

    index: int
    frames: int
    gaps: tuple[Gap, ...]
    hidden_faces: int
    hidden_left_hands: int
    hidden_right_hands: int


@dataclass(frozen=True)
class PoseReport:
    """What the pose stage found and decided.

    frames: F. people: everybody found. subjects: those drawn, in drawing order. reason: why those,
    one sentence. alignment: how the driver was fitted to the reference, JSON values; empty if it
    was not. warnings: sentences for the user.
    """

    frames: int
    people: tuple[PersonFacts, ...]
    subjects: tuple[SubjectFacts, ...]
    reason: str
    alignment: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report as a dictionary of JSON values."""
        return {
            "frames": self.frames,
            "people": [asdict(person) for person in self.people],
            "subjects": [
                {**asdict(subject), "gaps": [asdict(gap) for gap in subject.gaps]}
                for subject in self.subjects
            ],
            "reason": self.reason,
            "alignment": dict(self.alignment),
            "warnings": list(self.warnings),
        }


def make_report(
    people: Sequence[FollowedPerson],
    chosen: Sequence[int],
    *,
    subject: str | int = "auto",
    max_gap_s: float = MAX_GAP_S,
    kp_score_thr: float = KP_SCORE_THR,
    alignment: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> PoseReport:
    """Returns the report on a choice of persons.

    Args:
        people: everybody found, at least one.
        chosen: the numbers of those drawn.
        subject: the option that chose them.
        max_gap_s: longest gap that is closed, seconds, as the renderer uses it.
        kp_score_thr: the renderer's threshold for hands and faces.
        alignment: JSON values about the fit to the reference.
        warnings: sentences of earlier steps; those found here follow them.
    """
    facts = tuple(_person_facts(index, person) for index, person in enumerate(people))
    subjects = tuple(
        _subject_facts(index, people[index].track, max_gap_s, kp_score_thr) for index in chosen
    )
    frames = len(people[0].present)
    own = [line for s in subjects for line in _warn(s, people, frames)]
    return PoseReport(
        frames=frames,
        people=facts,
        subjects=subjects,
        reason=explain(people, chosen, subject),
        alignment=dict(alignment or {}),
        warnings=(*warnings, *own),
    )


def _person_facts(index: int, person: FollowedPerson) -> PersonFacts:
    return PersonFacts(
        index=index,
        share=float(person.present.mean()),
        first_frame=person.first_frame,
        last_frame=person.last_frame,
        mean_area=person.mean_area,
        mean_score=person.mean_score,
    )


def _subject_facts(index: int, track: Track, max_gap_s: float, kp_score_thr: float) -> SubjectFacts:
    track = drop_unusable(track)
    filled = fill_gaps(track, max_gap_s)
    # A motion without bodies is drawn by its points alone.
    by_points = not track.body.joints.any()
    seen, drawn = (
        np.logical_or.reduce(t.pose.scores >= KP_SCORE_THR, 1)
        if by_points
        else np.logical_or.reduce(t.body.joints != 0, (1, 2))
        for t in (track, filled)
    )
    hidden = filled
    if kp_score_thr > 0:
        hidden = hide_loose_parts(hide_unreliable(filled, kp_score_thr), kp_score_thr)
    counts = {
        name: int((drawn & ~hidden.pose.scores[:, part].any(axis=1)).sum())
        for name, (part, _) in PARTS.items()
    }
    return SubjectFacts(
        index=index,
        frames=int(seen.sum()),
        gaps=tuple(_gaps(seen, drawn)),
        hidden_faces=counts["face"],
        hidden_left_hands=counts["left_hand"],
        hidden_right_hands=counts["right_hand"],
    )


def _gaps(seen: npt.NDArray[np.bool_], drawn: npt.NDArray[np.bool_]) -> list[Gap]:
    """Returns the runs of frames where not seen; each is drawn entirely or not at all."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], seen, [True]]).astype(np.int8)))
    return [
        Gap(int(start), int(end - start), bool(drawn[start:end].all()))
        for start, end in edges.reshape(-1, 2)
    ]


def _warn(subject: SubjectFacts, people: Sequence[FollowedPerson], frames: int) -> list[str]:
    """Returns sentences on what the user may not expect."""
    name = f"Person {subject.index}"
    lines = []
    if subject.frames < _FEW_SHARE * frames:
        lines.append(f"{name} was seen in only {subject.frames} of {frames} frames.")
    empty = [gap for gap in subject.gaps if not gap.filled]
    if empty:
        count = sum(gap.length for gap in empty)
        lines.append(f"{name} is not drawn in {count} of {frames} frames: {_ranges(empty)}.")
        others = _others_there(subject.index, people, empty)
        if others:
            lines.append(
                f"While {name.lower()} is away there are others: {others}. If one of them is the "
                "same person after a cut, cut the video there or choose by number."
            )
    drawn = frames - sum(gap.length for gap in empty)
    parts = {
        "face": subject.hidden_faces,
        "left hand": subject.hidden_left_hands,
        "right hand": subject.hidden_right_hands,
    }
    lines += [
        f"The {part} of {name.lower()} is left out in {count} of {drawn} drawn frames, where it "
        "is not seen well enough."
        for part, count in parts.items()
        if count > _HIDDEN_SHARE * drawn
    ]
    return lines


def _ranges(gaps: Sequence[Gap]) -> str:
    return ", ".join(
        str(gap.start) if gap.length == 1 else f"{gap.start} to {gap.start + gap.length - 1}"
        for gap in gaps
    )


def _others_there(index: int, people: Sequence[FollowedPerson], gaps: Sequence[Gap]) -> str:
    """Returns the numbers of the persons seen during the gaps and never beside the subject."""
    own = people[index].present
    away = np.zeros(len(own), bool)
    for gap in gaps:
        away[gap.start : gap.start + gap.length] = True
    alone = [
        str(number)
        for number, person in enumerate(people)
        if number != index and (person.present & away).any() and not (person.present & own).any()
    ]
    return ", ".join(f"person {number}" for number in alone)
