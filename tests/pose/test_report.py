"""The report says what the renderer does, and hands without a wrist are hidden."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.pose.people import make_track, with_scores
from tests.pose.scenes import SIZE, absent, dancer, observe, run, walker
from xicon_infer.pose.render import RenderOptions, render_track
from xicon_infer.pose.report import Gap, make_report
from xicon_infer.pose.skeleton import FACE, LEFT_HAND, LEFT_WRIST, NOSE, RIGHT_HAND, RIGHT_WRIST
from xicon_infer.pose.subject import choose
from xicon_infer.pose.track import fill_gaps
from xicon_infer.pose.trust import hide_loose_parts

EVERY = slice(0, 72)


def followed(*gaps: tuple[int, int]):
    """Returns one person of 72 frames at 24 per second, away in the gaps."""
    track = walker(lambda t: 100 * t)
    return run(observe([track], [absent(72, *gaps)]), track, reidentify_s=9.0)


def test_gaps_are_filled_up_to_half_a_second():
    people = followed((0, 2), (10, 22), (30, 43), (71, 72))
    report = make_report(people, [0])
    (subject,) = report.subjects
    assert subject.gaps == (
        Gap(0, 2, False),
        Gap(10, 12, True),
        Gap(30, 13, False),
        Gap(71, 1, False),
    )
    assert (report.frames, subject.frames) == (72, 44)
    assert "is not drawn in 16 of 72 frames: 0 to 1, 30 to 42, 71." in report.warnings[0]


@pytest.mark.parametrize("max_gap_s", [0.0, 0.2, 0.5, 1.0])
def test_the_report_agrees_with_the_renderer(max_gap_s):
    people = followed((10, 12), (30, 42), (50, 66))
    report = make_report(people, [0], max_gap_s=max_gap_s)
    options = RenderOptions(max_gap_s=max_gap_s, mode="half")
    video = render_track([people[0].track], width=64, height=64, options=options)
    empty = {
        frame
        for gap in report.subjects[0].gaps
        if not gap.filled
        for frame in range(gap.start, gap.start + gap.length)
    }
    assert set(np.flatnonzero(~video.any(axis=(1, 2, 3)))) == empty


def test_everybody_found_is_listed():
    left, right = walker(lambda t: -800), walker(lambda t: 800, depth=5000)
    people = run(observe([left, right], [absent(72, (0, 36)), absent(72)]), left)
    chosen = choose(people, size=SIZE)
    report = make_report(people, chosen)
    assert [(p.index, p.share, p.first_frame) for p in report.people] == [(0, 1.0, 0), (1, 0.5, 36)]
    assert report.people[1].mean_area == people[1].mean_area > report.people[0].mean_area
    assert report.people[0].mean_score == pytest.approx(0.8)
    assert [s.index for s in report.subjects] == chosen
    assert report.reason.startswith(f"person {chosen[0]} has the largest sum")
    both = make_report(people, [1, 0], subject="all")
    assert [s.frames for s in both.subjects] == [36, 72]


def test_a_short_presence_and_a_possible_cut_are_warned_of():
    here, there = walker(lambda t: -700), walker(lambda t: 700)
    people = run(observe([here, there], [absent(72, (30, 72)), absent(72, (0, 30))]), here)
    report = make_report(people, [0], warnings=["Earlier."])
    assert report.warnings[:2] == ("Earlier.", "Person 0 was seen in only 30 of 72 frames.")
    assert report.warnings[2] == "Person 0 is not drawn in 42 of 72 frames: 30 to 71."
    assert "While person 0 is away there are others: person 1." in report.warnings[3]
    # Somebody beside the subject is not the subject after a cut.
    beside = run(observe([here, there], [absent(72, (30, 72)), absent(72)]), here)
    assert not any("others" in line for line in make_report(beside, [0]).warnings)


@pytest.mark.parametrize(
    ("part", "name"),
    [(FACE, "face"), (LEFT_HAND, "left hand"), (RIGHT_HAND, "right hand")],
)
def test_hidden_parts_are_counted(part, name):
    (person,) = followed()
    hidden = replace(person, track=with_scores(person.track, part, slice(20, 60), 0.1))
    report = make_report([hidden], [0])
    counts = {
        "face": report.subjects[0].hidden_faces,
        "left hand": report.subjects[0].hidden_left_hands,
        "right hand": report.subjects[0].hidden_right_hands,
    }
    assert counts == {key: 40 if key == name else 0 for key in counts}
    assert any(line.startswith(f"The {name} of person 0") for line in report.warnings)
    # A threshold of 0 draws every guess.
    whole = make_report([hidden], [0], kp_score_thr=0.0)
    assert whole.subjects[0].hidden_faces == 0
    assert not whole.warnings


def test_the_report_is_json():
    people = followed((10, 14))
    report = make_report(people, [0], alignment={"mode": "central", "m": 0.98})
    text = json.dumps(report.to_json(), allow_nan=False)
    back = json.loads(text)
    assert back["subjects"][0]["gaps"] == [{"start": 10, "length": 4, "filled": True}]
    assert back["alignment"] == {"mode": "central", "m": 0.98}
    assert back["warnings"] == []
    assert sorted(back) == sorted(report.__dataclass_fields__)
    assert make_report(people, [0]).to_json()["alignment"] == {}


def test_the_real_dance_is_reported():
    dance = dancer()
    people = run(observe([dance]), dance)
    (subject,) = make_report(people, [0]).subjects
    assert (subject.frames, subject.gaps) == (212, ())
    # Each hand is away now and then, never for half a second.
    (open_gaps,) = make_report(people, [0], max_gap_s=0.0).subjects
    hands = [dance.pose.scores[:, part].any(axis=1) for part in (LEFT_HAND, RIGHT_HAND)]
    assert open_gaps.hidden_left_hands == (~hands[0]).sum() > 0
    assert open_gaps.hidden_right_hands == (~hands[1]).sum() > 0
    assert (subject.hidden_left_hands, subject.hidden_right_hands) == (0, 0)


@pytest.mark.parametrize(
    ("part", "anchor"), [(FACE, NOSE), (LEFT_HAND, LEFT_WRIST), (RIGHT_HAND, RIGHT_WRIST)]
)
def test_parts_hang_on_their_point(part, anchor):
    track = with_scores(make_track(4), slice(anchor, anchor + 1), [1], 0.29)
    scores = hide_loose_parts(track).pose.scores
    assert not scores[1, part].any()
    others = np.ones(scores.shape, bool)
    others[1, part] = False
    assert np.array_equal(scores[others], track.pose.scores[others])
    assert np.array_equal(hide_loose_parts(track).body.joints, track.body.joints)
    for threshold in (0.0, 0.2):
        assert np.array_equal(hide_loose_parts(track, threshold).pose.scores, track.pose.scores)
    assert not hide_loose_parts(track, 0.95).pose.scores[:, part].any()


def test_a_wrist_lost_for_a_moment_keeps_its_hand():
    track = with_scores(make_track(5), slice(LEFT_WRIST, LEFT_WRIST + 1), [2], 0.1)
    assert hide_loose_parts(fill_gaps(track)).pose.scores[2, LEFT_HAND].all()
