"""Who is chosen, and what is said when nobody can be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.pose.people import with_scores
from tests.pose.scenes import SIZE, absent, observe, run, walker
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.subject import SUBJECTS, choose, explain

SCORES = {0: 0.5, 1: 0.6, 2: 0.9}


def scene():
    """Returns three persons: near but hardly seen, far in the middle, and short but certain."""
    near = with_scores(walker(lambda t: -1000, depth=3000), slice(0, 133), slice(0, 72), 0.25)
    middle = walker(lambda t: 0, depth=5000)
    side = walker(lambda t: 1500, depth=4000)
    film = observe([near, middle, side], [absent(72), absent(72), absent(72, (40, 72))])
    order = [near.pose.bboxes[0, 0], middle.pose.bboxes[0, 0], side.pose.bboxes[0, 0]]
    assert order == sorted(order)
    film = [
        replace(
            o,
            boxes=replace(
                o.boxes, scores=np.array([SCORES[n] for n in range(len(o.boxes.ids))], np.float32)
            ),
        )
        for o in film
    ]
    return run(film, near)


PEOPLE = scene()


@pytest.mark.parametrize(
    ("subject", "expected"),
    [("auto", 1), ("largest", 0), ("central", 1), ("confident", 1), (0, 0), (2, 2)],
)
def test_each_rule_chooses_its_person(subject, expected):
    assert choose(PEOPLE, subject=subject, size=SIZE) == [expected]


def test_auto_is_area_times_visibility():
    values = []
    for person in PEOPLE:
        x1, y1, x2, y2 = person.track.pose.bboxes.clip(0, [1280, 720, 1280, 720]).T
        seen = person.track.pose.scores[:, :17].mean(axis=1)
        values.append(((x2 - x1) * (y2 - y1) * seen).sum())
    assert choose(PEOPLE, subject="all", size=SIZE) == np.argsort(values)[::-1].tolist()


def test_being_there_longer_counts():
    # The third is the most certain of all, for a shorter time; alone in time it wins.
    short = [replace(p, present=p.present & (n == 2)) for n, p in enumerate(PEOPLE)]
    assert choose(short, subject="confident", size=SIZE) == [2]
    assert choose(short, subject="central", size=SIZE) == [2]


def test_the_middle_follows_the_size():
    wide = (SIZE[0], SIZE[1] * 2)
    whole = [replace(p, present=np.ones(72, bool)) for p in PEOPLE[:2]]
    assert choose(whole, subject="central", size=SIZE) == [1]
    narrow = (SIZE[0], SIZE[1] // 4)
    assert choose(whole, subject="central", size=narrow) == [0]
    assert choose(whole, subject="central", size=wide) == [1]


def test_two_persons_are_the_best_two():
    assert choose(PEOPLE, persons=2, size=SIZE) == choose(PEOPLE, subject="all", size=SIZE)[:2]
    assert choose(PEOPLE, subject=2, persons=2, size=SIZE) == [2, 1]
    assert choose(PEOPLE, subject=0, persons=2, size=SIZE) == [0, 1]
    assert sorted(choose(PEOPLE, subject="all", size=SIZE)) == [0, 1, 2]


def test_equal_persons_go_by_number():
    same = [PEOPLE[1]] * 3
    for subject in SUBJECTS:
        ranked = choose(same, subject=subject, persons=2, size=SIZE)
        assert ranked[:2] == [0, 1]


def test_nobody_found_says_what_to_do():
    for subject in (*SUBJECTS, 0):
        with pytest.raises(PoseError, match="no person was found in the driving video; use") as e:
            choose([], subject=subject, size=SIZE)
        assert e.value.code == "NO_PERSON_DETECTED"


@pytest.mark.parametrize("subject", [3, -1])
def test_a_number_that_does_not_exist_names_those_that_do(subject):
    with pytest.raises(PoseError) as error:
        choose(PEOPLE, subject=subject, size=SIZE)
    assert f"subject is {subject}" in error.value.message
    assert "3 persons: 0 (frames 0 to 71, seen in 72 of 72), 1 " in error.value.message
    assert "2 (frames 0 to 39, seen in 40 of 72)" in error.value.message
    assert error.value.field == "subject"


def test_too_few_persons_are_refused():
    with pytest.raises(PoseError, match=r"holds 1 person: 0 .* Use persons=1") as error:
        choose(PEOPLE[:1], persons=2, size=SIZE)
    assert error.value.field == "persons"
    assert choose(PEOPLE[:1], subject="all", persons=2, size=SIZE) == [0]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("subject", {"subject": "best"}),
        ("subject", {"subject": True}),
        ("persons", {"persons": 0}),
        ("persons", {"persons": 3}),
    ],
)
def test_options_are_checked(field, options):
    with pytest.raises(InvalidRequest, match=f"{field} is .*; allowed") as error:
        choose(PEOPLE, size=SIZE, **options)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("chosen", "subject", "sentence"),
    [
        ([1], "auto", "person 1 has the largest sum of box area x visibility."),
        ([1, 0], "largest", "person 1 and person 0 have the largest sum of box area."),
        ([2], 2, "person 2: person 2 was asked for by number."),
        ([2, 1], 2, "person 2 and person 1: person 2 was asked for by number; the largest sum "
         "of box area x visibility decided on the other."),
        ([1, 0, 2], "all", "all 3 persons were asked for."),
    ],
)  # fmt: skip
def test_the_choice_is_explained(chosen, subject, sentence):
    assert explain(PEOPLE, chosen, subject) == sentence
    assert explain(PEOPLE[:1], [0], subject) == "person 0 is the only one found."
