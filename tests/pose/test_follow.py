"""Persons keep their identity: crossings, absences, false detections, any order and rate."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from tests.pose.scenes import (
    SIZE,
    absent,
    crossing,
    dancer,
    identities,
    observe,
    run,
    walker,
    who,
)
from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.follow import Follower, follow
from xicon_infer.types import Track

EACH_ALONE = [[0], [1]]


def pair_with_dancer() -> list[Track]:
    """Returns the dancer, and somebody who walks behind across the whole picture."""
    dance = dancer()
    frames = len(dance.pose.keypoints)
    other = walker(lambda t: -900 + 220 * t, seconds=frames / 24, depth=3600)
    # The walker's picture is wide; its middle is laid on the middle of the dancer's.
    shift = np.array([-280, 280], np.float32)
    camera = dance.body.intrinsics
    pose = replace(
        other.pose,
        keypoints=other.pose.keypoints + shift,
        bboxes=other.pose.bboxes + np.tile(shift, 2),
        size=dance.pose.size,
    )
    return [dance, Track(pose, replace(other.body, intrinsics=camera), other.fps)]


def hidden_while_crossing(tracks: list[Track], seconds: float) -> list[np.ndarray]:
    """Returns who is seen: the second is not while in the first one's place."""
    away = np.abs(tracks[0].pose.bboxes[:, 0] - tracks[1].pose.bboxes[:, 0])
    frames, middle = len(away), int(away.argmin())
    half = round(seconds * float(tracks[0].fps) / 2)
    return [absent(frames), absent(frames, (middle - half, middle + half))]


@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize("fps", [12, 24, 120])
@pytest.mark.parametrize("hidden_s", [0.0, 0.3, 0.6])
def test_crossing_persons_keep_their_identity(body, fps, hidden_s):
    tracks = crossing(fps)
    seen = hidden_while_crossing(tracks, hidden_s)
    people = run(observe(tracks, seen, body=body), tracks[0])
    assert identities(people, tracks) == EACH_ALONE
    assert [p.present.tolist() for p in people] == [s.tolist() for s in seen]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("body", [True, False])
def test_noise_and_missed_frames_do_no_harm(body, seed):
    draw = np.random.default_rng(seed)
    noisy, seen = [], []
    for track in crossing(depths=(4000.0, 4300.0)):
        pose = replace(
            track.pose,
            keypoints=track.pose.keypoints + draw.normal(0, 3, (72, 133, 2)).astype(np.float32),
            bboxes=track.pose.bboxes + draw.normal(0, 6, (72, 4)).astype(np.float32),
        )
        # A depth is wrong by a few in a hundred; where it is seen is not.
        depth = 1 + draw.normal(0, 0.04, (72, 1, 1)).astype(np.float32)
        noisy.append(Track(pose, replace(track.body, joints=track.body.joints * depth), track.fps))
        seen.append(draw.random(72) > 0.1)
    people = run(observe(noisy, seen, body=body), noisy[0])
    assert sorted(identities(people, noisy)) == EACH_ALONE


@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize("first", [0, 27])
def test_both_unseen_while_they_cross_come_out_where_they_were_going(body, first):
    # Six metres per second towards one another; seen for a second, or for three frames alone.
    tracks = [
        walker(lambda t: -4625 + 3000 * t, seconds=2.5, depth=9000),
        walker(lambda t: 4625 - 3000 * t, seconds=2.5, depth=9000),
    ]
    seen = absent(60, (0, first), (30, 40))
    people = run(observe(tracks, [seen, seen], body=body), tracks[0])
    assert identities(people, tracks) == EACH_ALONE


def test_the_body_shows_the_speed_of_who_goes_behind_a_pillar():
    tracks = [
        walker(lambda t: -1500 + 1200 * t, depth=4000),
        walker(lambda t: 1500 - 1200 * t, depth=4000),
    ]
    left, right = 480, 800
    clipped, seen = [], []
    for track, side in zip(tracks, (2, 0), strict=True):
        boxes = track.pose.bboxes.copy()
        full = boxes[:, 2] - boxes[:, 0]
        going_in = np.arange(72) < 30
        edge = left if side == 2 else right
        cut = np.minimum if side == 2 else np.maximum
        boxes[going_in, side] = cut(boxes[going_in, side], edge)
        seen.append(~going_in | (boxes[:, 2] - boxes[:, 0] > 0.3 * full))
        seen[-1] &= np.abs(np.arange(72) - 30) > 6
        clipped.append(replace(track, pose=replace(track.pose, bboxes=boxes)))
    people = run(observe(clipped, seen), tracks[0])
    assert identities(people, tracks) == EACH_ALONE


def test_the_real_dance_keeps_its_identity():
    tracks = pair_with_dancer()
    seen = hidden_while_crossing(tracks, 0.4)
    people = run(observe(tracks, seen), tracks[0])
    assert sorted(identities(people, tracks)) == EACH_ALONE


@pytest.mark.parametrize("step", [1, 2, 4])
def test_the_dance_alone_is_one_person_at_any_rate(step):
    dance = dancer()
    people = follow(observe([dance])[::step], fps=dance.fps / Fraction(step), size=dance.pose.size)
    assert [p.present.all() for p in people] == [True]


def test_a_track_holds_what_was_seen_and_zeros_elsewhere():
    tracks = crossing()
    seen = [absent(72, (10, 15)), absent(72)]
    first, _ = run(observe(tracks, seen), tracks[0])
    pose, body = first.track.pose, first.track.body
    gone = ~first.present
    for mine, true in (
        (pose.keypoints, tracks[0].pose.keypoints),
        (pose.scores, tracks[0].pose.scores),
        (pose.bboxes, tracks[0].pose.bboxes),
        (body.joints, tracks[0].body.joints),
    ):
        assert np.array_equal(mine[first.present], true[first.present])
        assert not mine[gone].any()
        assert mine.dtype == np.float32
    assert gone.sum() == 5
    assert (pose.size, first.track.fps) == (SIZE, 24)
    assert np.array_equal(body.intrinsics, tracks[0].body.intrinsics)


def test_the_facts_of_a_person():
    track = walker(lambda t: 0.0)
    (person,) = run(observe([track], [absent(72, (0, 4), (70, 72))]), track)
    assert (person.first_frame, person.last_frame) == (4, 69)
    box = track.pose.bboxes[4:70].clip(0, [1280, 720, 1280, 720])
    areas = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert person.mean_area == pytest.approx(areas.mean(), rel=1e-5)
    assert person.mean_score == pytest.approx(0.8)


@pytest.mark.parametrize("body", [True, False])
@pytest.mark.parametrize(("away_s", "persons"), [(0.3, 1), (1.5, 1), (5.0, 2)])
def test_who_returns_in_time_is_the_same_person(away_s, persons, body):
    # Out through the left border, and in again where they left.
    track = walker(lambda t: -400 - 900 * min(t, 1), seconds=8)
    seen = absent(192, (24, 24 + round(24 * away_s)))
    people = run(observe([track], [seen], body=body), track)
    assert len(people) == persons
    assert sum(p.present.sum() for p in people) == seen.sum()


def test_nobody_keeps_walking_out_of_the_picture():
    # Fast to the border and back: straight on for 1.5 s would be metres away.
    track = walker(lambda t: 600 - 1800 * min(t, 1), seconds=5)
    people = run(observe([track], [absent(120, (24, 60))]), track)
    assert len(people) == 1


def test_the_time_to_return_follows_the_option():
    track = walker(lambda t: 0.0, seconds=8)
    film = observe([track], [absent(192, (24, 96))])
    assert len(run(film, track)) == 2
    assert len(run(film, track, reidentify_s=3.0)) == 1
    assert len(run(film, track, reidentify_s=2.9)) == 2


def test_a_cut_to_another_place_is_another_person():
    here, there = walker(lambda t: -600), walker(lambda t: 600)
    seen = [absent(72, (36, 72)), absent(72, (0, 36))]
    assert identities(run(observe([here, there], seen), here), [here, there]) == EACH_ALONE


@pytest.mark.parametrize("body", [True, False])
def test_nobody_jumps_to_a_neighbour_who_appears_that_moment(body):
    # Half a metre away: within reach in a second, not from one frame to the next.
    here, there = walker(lambda t: 0), walker(lambda t: 500)
    seen = [absent(72, (36, 72)), absent(72, (0, 36))]
    people = run(observe([here, there], seen, body=body), here)
    assert identities(people, [here, there]) == EACH_ALONE


def test_the_order_inside_a_frame_changes_nothing():
    tracks = [*crossing(), walker(lambda t: 100 * t, depth=6000)]
    draw = np.random.default_rng(0)
    plain = run(observe(tracks), tracks[0])
    flipped = run(observe(tracks, order=lambda f, n: range(n)[:: -1 if f % 2 else 1]), tracks[0])
    shuffled = run(observe(tracks, order=lambda f, n: draw.permutation(n).tolist()), tracks[0])
    for other in (flipped, shuffled):
        for one, two in zip(plain, other, strict=True):
            assert np.array_equal(one.track.pose.keypoints, two.track.pose.keypoints)
            assert np.array_equal(one.track.body.joints, two.track.body.joints)
            assert (one.mean_area, one.first_frame) == (two.mean_area, two.first_frame)


def test_backwards_gives_the_same_persons():
    tracks = pair_with_dancer()
    seen = hidden_while_crossing(tracks, 0.3)
    film = observe(tracks, seen)
    back = run(film[::-1], tracks[0])
    assert sorted(p.present[::-1].tolist() for p in back) == sorted(s.tolist() for s in seen)


def test_every_frame_rate_gives_the_same_persons():
    held = []
    for fps in (24, 120):
        tracks = crossing(fps)
        people = run(observe(tracks, hidden_while_crossing(tracks, 0.5)), tracks[0])
        held.append([who(p, tracks)[0] for p in people])
        assert identities(people, tracks) == EACH_ALONE
    assert held[0] == held[1]


def test_the_picture_size_does_not_matter():
    small = pair_with_dancer()
    large = [
        Track(
            replace(
                t.pose,
                keypoints=t.pose.keypoints * 3,
                bboxes=t.pose.bboxes * 3,
                size=(t.pose.size[0] * 3, t.pose.size[1] * 3),
            ),
            replace(t.body, intrinsics=t.body.intrinsics * np.array([[3], [3], [1]], np.float32)),
            t.fps,
        )
        for t in small
    ]
    seen = hidden_while_crossing(small, 0.3)
    for one, two in zip(
        run(observe(small, seen), small[0]), run(observe(large, seen), large[0]), strict=True
    ):
        assert np.array_equal(one.present, two.present)
        assert np.array_equal(one.track.body.joints, two.track.body.joints)


def test_brief_detections_are_dropped():
    track, ghost = walker(lambda t: 0.0), walker(lambda t: 700)
    ghosts = ~absent(72, (5, 6), (30, 33), (60, 61))
    people = run(observe([track, ghost], [absent(72, (30, 33)), ghosts]), track)
    # Once in a while at one place within two seconds adds up; the shortest time is an option.
    assert identities(people, [track, ghost]) == EACH_ALONE
    brief = ~absent(72, (30, 33))
    people = run(observe([track, ghost], [absent(72, (30, 33)), brief]), track)
    assert identities(people, [track, ghost]) == [[0]]
    assert len(run(observe([track, ghost], [absent(72), brief]), track, min_seen_s=0.1)) == 2


def test_one_frame_is_enough_for_a_film_of_one_frame():
    tracks = crossing()
    film = observe(tracks)[:1]
    people = run(film, tracks[0])
    assert [p.present.tolist() for p in people] == [[True], [True]]
    # From left to right, whatever the order of the detector.
    assert people[0].track.pose.bboxes[0, 0] < people[1].track.pose.bboxes[0, 0]


def test_half_of_a_short_film_is_enough():
    track = walker(lambda t: 0.0)
    for frames, persons in ((2, 1), (1, 0)):
        film = observe([track], [absent(72, (frames, 72))])[:4]
        assert len(run(film, track)) == persons


def test_nobody_at_all_gives_nobody():
    tracks = crossing()
    assert run(observe(tracks, [~absent(72)] * 2), tracks[0]) == []
    assert run([], tracks[0]) == []


def test_duplicates_are_merged_and_the_better_one_stays():
    track = walker(lambda t: 0.0, seconds=1)
    boxes = track.pose.bboxes.copy()
    boxes[:, 3] -= 0.3 * (boxes[:, 3] - boxes[:, 1])
    poor = replace(
        track, pose=replace(track.pose, bboxes=boxes, scores=track.pose.scores * np.float32(0.6))
    )
    for film in (observe([track, poor]), observe([poor, track])):
        (person,) = run(film, track)
        assert np.array_equal(person.track.pose.scores, track.pose.scores)


def test_identities_of_the_detector_are_kept():
    tracks = crossing()
    middle = absent(72, (8, 66))
    # Without them, 2.4 s is too long; with them the detector is believed.
    assert len(run(observe(tracks, [absent(72), middle]), tracks[0])) == 3
    people = run(observe(tracks, [absent(72), middle], ids=True), tracks[0])
    assert identities(people, tracks) == EACH_ALONE


def test_a_new_identity_of_the_detector_is_a_new_person():
    track = walker(lambda t: 0.0)
    film = observe([track])
    changed = [
        replace(o, boxes=replace(o.boxes, ids=(4 if n < 36 else 9,))) for n, o in enumerate(film)
    ]
    people = run(changed, track)
    assert [(p.first_frame, p.last_frame) for p in people] == [(0, 35), (36, 71)]


def test_frames_without_identity_are_matched_by_looks():
    track = walker(lambda t: 100 * t)
    film = [
        replace(o, boxes=replace(o.boxes, ids=(7 if n % 3 else -1,)))
        for n, o in enumerate(observe([track]))
    ]
    assert [p.present.all() for p in run(film, track)] == [True]


def test_frames_can_be_given_one_at_a_time():
    tracks = crossing()
    film = observe(tracks)
    follower = Follower(fps=tracks[0].fps, size=SIZE, intrinsics=tracks[0].body.intrinsics)
    for number, observation in enumerate(film):
        follower.add(observation)
        assert len(follower.people()) == 2
        assert len(follower.people()[0].present) == number + 1
    whole = run(film, tracks[0])
    for one, two in zip(follower.people(), whole, strict=True):
        assert np.array_equal(one.track.pose.keypoints, two.track.pose.keypoints)


def test_impossible_values_do_no_harm():
    tracks = crossing()
    film = observe(tracks)
    broken = film[20]
    for array in (broken.keypoints, broken.bodies.joints):
        array[0, 3:5] = np.nan
        array[1, 0] = np.inf
    broken.bodies.joints[0, 7, 2] = -10
    broken.keypoint_scores[0, :2] = [np.nan, 7]
    broken.bodies.uncertainties[0, 0] = np.nan
    film[21].boxes.bboxes[0] = np.nan
    film[22].boxes.bboxes[1, 2:] = film[22].boxes.bboxes[1, :2]
    people = run(film, tracks[0])
    assert identities(people, tracks) == EACH_ALONE
    assert sorted(np.flatnonzero(~p.present).tolist() for p in people) == [[21], [22]]
    for person in people:
        pose, body = person.track.pose, person.track.body
        for values in (pose.keypoints, pose.bboxes, body.joints, body.uncertainties):
            assert np.isfinite(values).all()
        assert 0 <= pose.scores.min() <= pose.scores.max() <= 1
    first = next(p for p in people if p.track.pose.scores[20, 1] == 1)
    assert not first.track.body.joints[20, [3, 4, 7]].any()
    assert first.track.body.joints[20, 5].any()


def test_the_camera_is_used_or_guessed():
    track = walker(lambda t: 0.0, seconds=1)
    camera = track.body.intrinsics * 2
    film = observe([track])
    (given,) = follow(film, fps=track.fps, size=SIZE, intrinsics=camera)
    assert np.array_equal(given.track.body.intrinsics, camera)
    (guessed,) = follow(film, fps=track.fps, size=SIZE)
    assert guessed.track.body.intrinsics == pytest.approx(track.body.intrinsics)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("fps", {"fps": Fraction(0)}),
        ("reidentify_s", {"reidentify_s": -1.0}),
        ("min_seen_s", {"min_seen_s": float("nan")}),
    ],
)
def test_options_are_checked(field, options):
    with pytest.raises(InvalidRequest, match=field) as error:
        follow([], **{"fps": Fraction(24), "size": SIZE, **options})
    assert error.value.field == field


def test_arrays_that_do_not_fit_together_are_refused():
    track = walker(lambda t: 0.0, seconds=1)
    film = observe([track])
    film[3] = replace(film[3], keypoints=film[3].keypoints[:0])
    with pytest.raises(InvalidRequest, match=r"keypoints of frame 3 has shape \[0, 133, 2\]"):
        run(film, track)
