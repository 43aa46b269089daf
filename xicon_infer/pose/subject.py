"""Which of the followed persons drives the animation.

A choice is always made for the whole video: it names tracks, so the subject cannot change from one
frame to the next. Every rule sums over frames, so a short visit never beats a long presence.

Shape letters: F frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.camera import Float64Array
from xicon_infer.pose.follow import FollowedPerson, visible_areas
from xicon_infer.pose.matching import BODY

SUBJECTS: tuple[str, ...] = ("auto", "largest", "central", "confident", "all")
"""Words that choose a subject; a number chooses the person of that number."""

MAX_DRAWN = 2
"""Most persons that the renderer has colours for."""

_REASONS = {
    "auto": "the largest sum of box area x visibility",
    "largest": "the largest sum of box area",
    "central": "the largest sum of closeness to the middle of the picture",
    "confident": "the largest sum of detector scores",
}


def choose(
    people: Sequence[FollowedPerson],
    *,
    subject: str | int = "auto",
    persons: int = 1,
    size: tuple[int, int],
) -> list[int]:
    """Returns the numbers of the chosen persons, best first; equal ones in their given order.

    Args:
        people: everybody found.
        subject: "auto" ranks by box area x visibility (mean score of the body points), "largest"
            by box area, "central" by closeness to the middle, "confident" by the detector's
            score, each summed over frames; a number is taken first and the rest ranked as "auto";
            "all" returns everybody, ranked as "auto", whatever `persons` is.
        persons: how many to choose, 1 or 2.
        size: (H, W) of the frames.

    Raises:
        InvalidRequest: if `subject` or `persons` is not allowed.
        PoseError: if nobody was found, the number does not exist, or there are too few.
    """
    _check_options(subject, persons)
    if not people:
        raise PoseError(
            "no person was found in the driving video; use one that shows a person, large enough "
            "and well lit, for most of its length."
        )
    if isinstance(subject, int) and not 0 <= subject < len(people):
        raise PoseError(
            f"subject is {subject}, but the driving video holds {_listing(people)}. "
            "Choose one of these numbers, or 'auto'.",
            field="subject",
            code="NO_SUCH_PERSON",
        )
    rule = subject if isinstance(subject, str) and subject != "all" else "auto"
    values = [_value(person, rule, size) for person in people]
    # Sorting is stable: equal ones stay in order.
    ranked = sorted(range(len(people)), key=lambda index: -values[index])
    if isinstance(subject, int):
        ranked.remove(subject)
        ranked.insert(0, subject)
    if subject == "all":
        return ranked
    if len(people) < persons:
        raise PoseError(
            f"persons is {persons}, but the driving video holds {_listing(people)}. "
            f"Use persons={len(people)}.",
            field="persons",
            code="TOO_FEW_PERSONS",
        )
    return ranked[:persons]


def explain(people: Sequence[FollowedPerson], chosen: Sequence[int], subject: str | int) -> str:
    """Returns why these persons were chosen, as one sentence."""
    names = " and ".join(f"person {index}" for index in chosen)
    if len(people) == 1:
        return f"{names} is the only one found."
    if subject == "all":
        return f"all {len(people)} persons were asked for."
    if isinstance(subject, int):
        rest = f"; {_REASONS['auto']} decided on the other" if len(chosen) > 1 else ""
        return f"{names}: person {subject} was asked for by number{rest}."
    have = "has" if len(chosen) == 1 else "have"
    return f"{names} {have} {_REASONS[subject]}."


def _check_options(subject: str | int, persons: int) -> None:
    if isinstance(subject, bool) or (isinstance(subject, str) and subject not in SUBJECTS):
        raise InvalidRequest(
            f"subject is {subject!r}; allowed: {', '.join(SUBJECTS)}, or the number of a person.",
            field="subject",
        )
    if persons not in range(1, MAX_DRAWN + 1):
        raise InvalidRequest(f"persons is {persons!r}; allowed: 1 or 2.", field="persons")


def _listing(people: Sequence[FollowedPerson]) -> str:
    seen = [
        f"{index} (frames {person.first_frame} to {person.last_frame}, seen in "
        f"{int(person.present.sum())} of {len(person.present)})"
        for index, person in enumerate(people)
    ]
    return f"{len(people)} person{'s' if len(people) > 1 else ''}: {', '.join(seen)}"


def _value(person: FollowedPerson, rule: str, size: tuple[int, int]) -> float:
    """Returns the person's sum over frames of what the rule counts."""
    if rule == "confident":
        return person.mean_score * float(person.present.sum())
    if rule == "central":
        return float(_closeness(person, size).sum())
    areas = visible_areas(person.track.pose)
    if rule == "largest":
        return float(areas.sum())
    return float((areas * person.track.pose.scores[:, BODY].mean(axis=1)).sum())


def _closeness(person: FollowedPerson, size: tuple[int, int]) -> Float64Array:
    """Returns [F]: 1 in the middle of the picture, 0 in a corner, and 0 where not seen."""
    boxes = person.track.pose.bboxes.astype(np.float64)
    corner = np.array([size[1], size[0]]) / 2
    away = np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - corner, axis=1)
    return np.where(person.present, np.clip(1 - away / np.linalg.norm(corner), 0, 1), 0)
