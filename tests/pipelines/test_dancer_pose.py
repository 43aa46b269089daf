"""SteadyDancer's pose pictures from tracks: options, lengths, lost persons, and a whole film."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipelines.dancer_pose import DancerPoseOptions, draw_dancer_pose
from pipelines.pose import MotionOptions, PoseModels, find_reference, find_tracks, observe
from tests.pose.people import make_track, with_scores
from tests.pose_films import GOLDEN, dancer, shots
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.detector import YoloDetector
from xicon_infer.pose.observations import Bodies
from xicon_infer.pose.skeleton import KEYPOINTS, LEFT_HAND
from xicon_infer.pose.vitpose import VitPose
from xicon_infer.types import PoseTrack, SilentProgress, Track

SIZE = (96, 144)
"""(W, H) of results; the canvas is the same unless a test says otherwise."""
FRAME = (192, 128)
EVERYBODY = slice(0, KEYPOINTS)


def drive(tracks=None, reference=None, *, num_frames=3, size=SIZE, canvas=SIZE, **options):
    """Returns the pose of a job and what was warned of."""
    told = SilentProgress()
    pose = draw_dancer_pose(
        [make_track(4, size=FRAME)] if tracks is None else tracks,
        still() if reference is None else reference,
        DancerPoseOptions(**options),
        size=size,
        num_frames=num_frames,
        canvas=canvas,
        progress=told,
    )
    return pose, told.warnings


def still(**options) -> PoseTrack:
    """Returns a reference: a person seen from farther away, to the side."""
    return make_track(1, size=(180, 120), depth=3600.0, x=120.0, **options).pose


def jumping(frames: int = 12) -> Track:
    """Returns somebody whose every frame is another one."""
    track = make_track(frames, size=FRAME, fps=4)
    points = track.pose.keypoints + np.arange(frames, dtype=np.float32)[:, None, None]
    return replace(track, pose=replace(track.pose, keypoints=points))


def same(one, other) -> bool:
    return np.array_equal(one.positive.frames, other.positive.frames)


def test_pictures_have_the_results_size_rate_and_count():
    pose, warnings = drive()
    assert pose.positive.frames.shape == (3, SIZE[1], SIZE[0], 3)
    assert pose.positive.frames.dtype == np.uint8
    assert pose.positive.fps == Fraction(24)
    assert pose.negative is None
    assert warnings == []
    assert pose.report["held"] == []
    assert set(pose.report["alignment"]["scales"].values()) != {1.0}


@pytest.mark.parametrize("convention", ["official", "comfyui"])
def test_the_negative_is_made_when_asked_for_and_by_its_seed(convention):
    given = {"convention": convention}
    pose, _ = drive(negative=True, seed=3, **given)
    assert pose.negative.frames.shape == pose.positive.frames.shape
    assert pose.negative.fps == pose.positive.fps
    assert not np.array_equal(pose.negative.frames, pose.positive.frames)
    assert same(pose, drive(**given)[0])
    again, other = (drive(negative=True, seed=s, **given)[0] for s in (3, 4))
    assert np.array_equal(pose.negative.frames, again.negative.frames)
    assert not np.array_equal(pose.negative.frames, other.negative.frames)
    # The motion stands still at the end; the negative does not.
    longer, _ = drive(negative=True, seed=3, num_frames=6, **given)
    assert np.array_equal(longer.positive.frames[4], longer.positive.frames[5])
    assert not np.array_equal(longer.negative.frames[4], longer.negative.frames[5])
    assert np.array_equal(longer.negative.frames[:3], pose.negative.frames)


@pytest.mark.parametrize(
    "option",
    [
        {"convention": "comfyui"},
        {"align_to": "none"},
        {"align_to": "none", "fit": "pad"},
        {"align_to": "none", "fit": "stretch"},
        {"anchor_frame": 2},
        {"draw_face": True},
        {"mode": "official"},
        {"max_gap_s": 0.0},
        {"persons": 2},
    ],
    ids=str,
)
def test_every_option_counts(option):
    track = jumping(4)
    # One hidden shoulder in the anchor, one hidden foot for a moment.
    track = with_scores(track, slice(5, 6), slice(0, 1), 0.32)
    track = replace(with_scores(track, slice(15, 16), slice(1, 2), 0.0), fps=Fraction(24))
    tracks = [track, make_track(4, size=FRAME, x=400.0)]
    base = {k: v for k, v in option.items() if k == "align_to"} if "fit" in option else {}
    square = {"size": (144, 144), "canvas": (144, 144)}
    assert not same(drive(tracks, **square, **base)[0], drive(tracks, **square, **option)[0])


@pytest.mark.parametrize("name", ["draw_face_points", "draw_head"])
def test_every_option_of_the_comfyui_picture_counts(name):
    pictures = [drive(convention="comfyui", **{name: v})[0] for v in ("full", "weak", "none")]
    assert len({pose.positive.frames.tobytes() for pose in pictures}) == 3
    assert same(drive(**{name: "full"})[0], drive(**{name: "none"})[0])


def test_the_wrist_lies_where_the_bones_of_the_reference_put_it():
    """A driver like the reference, elsewhere: the picture is the reference's own."""
    track = make_track(3, size=FRAME, x=-150.0)
    reference = make_track(1, size=FRAME).pose
    pose, _ = drive([track], reference, size=(128, 192), canvas=(128, 192))
    itself, _ = drive([make_track(1, size=FRAME)], reference, size=(128, 192), canvas=(128, 192))
    difference = pose.positive.frames[0].astype(int) - itself.positive.frames[0]
    assert np.abs(difference).mean() < 1.0
    x, y = reference.keypoints[0, 10].round().astype(int)
    assert itself.positive.frames[0, y - 1 : y + 2, x - 1 : x + 2].max() > 100


def test_a_longer_motion_is_cut_a_shorter_one_stands_still():
    short, _ = drive(num_frames=2)
    long, _ = drive(num_frames=6)
    assert np.array_equal(long.positive.frames[:2], short.positive.frames)
    assert np.array_equal(long.positive.frames[5], long.positive.frames[3])
    assert not np.array_equal(long.positive.frames[2], long.positive.frames[3])
    assert len(drive(num_frames=1)[0].positive.frames) == 1
    assert len(drive([make_track(1, size=FRAME)], num_frames=3)[0].positive.frames) == 3


def test_the_canvas_is_the_authors_and_decides_how_thick_lines_are():
    default, _ = drive(num_frames=1, canvas=None)
    assert default.report["canvas"] == [624, 928]
    shares = [
        float(drive(num_frames=1, canvas=canvas)[0].positive.frames.any(axis=3).mean())
        for canvas in ((48, 72), (96, 144), (192, 288))
    ]
    assert shares[0] > shares[1] > shares[2]
    # Where the result differs from the authors' canvas by rounding alone, it is its own canvas.
    near, _ = drive(num_frames=1, canvas=None, size=(624, 928))
    assert near.report["canvas"] == [624, 928]
    near, _ = drive(num_frames=1, canvas=None, size=(608, 928))
    assert near.report["canvas"] == [608, 928]


def test_a_lost_person_stands_still_and_is_told_of():
    track = with_scores(jumping(), EVERYBODY, [5, 6, 7], 0.0)
    pose, warnings = drive([track], num_frames=12)
    frames = pose.positive.frames
    assert pose.report["held"] == [[5, 7]]
    assert "5 to 7" in warnings[0]
    for index in (5, 6, 7):
        assert np.array_equal(frames[index], frames[4])
    assert not np.array_equal(frames[8], frames[4])
    # A gap of half a second is walked through instead.
    pose, warnings = drive([with_scores(jumping(), EVERYBODY, [5, 6], 0.0)], num_frames=12)
    assert warnings == []
    assert len({frame.tobytes() for frame in pose.positive.frames[4:8]}) == 4


def test_too_much_lost_or_lost_at_the_anchor_is_refused():
    with pytest.raises(PoseError, match="at most 30%"):
        drive([with_scores(jumping(), EVERYBODY, [4, 5, 6, 7], 0.0)], num_frames=12)
    gone = with_scores(jumping(), EVERYBODY, [0, 1, 2], 0.0)
    with pytest.raises(PoseError, match="anchor_frame=3"):
        drive([gone], num_frames=12)
    pose, warnings = drive([gone], num_frames=12, anchor_frame=3)
    assert np.array_equal(pose.positive.frames[0], pose.positive.frames[3])
    assert warnings
    assert drive([gone], num_frames=12, align_to="none")[0].report["held"] == [[0, 2]]


@pytest.mark.parametrize("mode", ["robust", "official"])
def test_nobody_in_the_reference_is_an_error_unless_it_is_not_looked_at(mode):
    empty = replace(still(), scores=np.zeros((1, KEYPOINTS), np.float32))
    broken = replace(still(), keypoints=np.full((1, KEYPOINTS, 2), np.nan, np.float32))
    for reference in (empty, broken):
        with pytest.raises(PoseError, match="nobody was found in the reference image"):
            drive(reference=reference, mode=mode)
        assert same(
            drive(reference=reference, mode=mode, align_to="none")[0],
            drive(mode=mode, align_to="none")[0],
        )
    with pytest.raises(PoseError, match="nobody was found"):
        draw_dancer_pose(
            [make_track(2)],
            None,
            DancerPoseOptions(mode=mode),
            size=SIZE,
            num_frames=1,
            progress=SilentProgress(),
        )
    with pytest.raises(PoseError, match="one frame") as caught:
        drive(reference=make_track(2).pose, mode=mode)
    assert caught.value.code == "TRACK_INVALID"


def test_what_could_not_be_compared_is_told():
    legless = replace(still(), scores=still().scores.copy())
    legless.scores[:, 13:] = 0.1
    legless.scores[:, 5] = 0.2
    pose, warnings = drive(reference=legless)
    assert set(pose.report["alignment"]["replaced"]) >= {"leg_upper", "neck of the reference"}
    assert "leg_upper" in warnings[0]
    assert drive(reference=legless, mode="official")[1] == []


def test_a_hand_without_its_wrist_is_left_out_in_the_robust_mode():
    whole = make_track(2, size=FRAME)
    loose = with_scores(whole, slice(9, 10), slice(None), 0.1)
    no_hand = with_scores(loose, LEFT_HAND, slice(None), 0.0)
    assert same(drive([loose], num_frames=2)[0], drive([no_hand], num_frames=2)[0])
    assert not same(
        drive([loose], num_frames=2, mode="official")[0],
        drive([no_hand], num_frames=2, mode="official")[0],
    )


def test_two_persons_are_drawn_only_if_asked_for():
    pair = [make_track(3, size=FRAME), make_track(3, size=FRAME, x=500.0)]
    alone = drive(pair[:1])[0]
    assert same(drive(pair)[0], alone)
    both = drive(pair, persons=2)[0]
    assert both.positive.frames.any(axis=3).sum() > alone.positive.frames.any(axis=3).sum()
    # The second may leave; the subject decides about the video.
    gone = with_scores(pair[1], EVERYBODY, [1, 2], 0.0)
    left = drive([pair[0], gone], persons=2)[0]
    assert np.array_equal(left.positive.frames[0], both.positive.frames[0])
    assert np.array_equal(left.positive.frames[2], alone.positive.frames[2])


@pytest.mark.parametrize("mode", ["robust", "official"])
@pytest.mark.parametrize("convention", ["official", "comfyui"])
@pytest.mark.parametrize("align_to", ["ref", "none"])
def test_joints_anywhere_are_no_crash(mode, convention, align_to):
    track = make_track(3, size=FRAME)
    points = track.pose.keypoints.copy()
    points[1, 7], points[2, 8], points[1, 112] = np.nan, 1e8, -np.inf
    # Zero-length lower legs in the anchor: infinite ratios in the official mode.
    points[0, [15, 16]] = points[0, [13, 14]]
    broken = replace(track, pose=replace(track.pose, keypoints=points))
    pose, _ = drive([broken], mode=mode, convention=convention, align_to=align_to, negative=True)
    assert pose.positive.frames.any()
    text = json.dumps(pose.report, allow_nan=False)
    assert (mode == "official" and align_to == "ref") == ('"leg_lower": null' in text)


def test_the_report_says_which_rates_there_were():
    pose = draw_dancer_pose(
        [make_track(2, fps=16)],
        still(),
        DancerPoseOptions(),
        size=SIZE,
        num_frames=2,
        progress=SilentProgress(),
        canvas=SIZE,
        driving_fps=Fraction(30000, 1001),
    )
    assert (pose.report["fps"], pose.report["driving_fps"]) == ("16", "30000/1001")
    assert pose.report["options"]["mode"] == "robust"


def test_progress_counts_both_videos():
    class Steps(SilentProgress):
        def __init__(self):
            super().__init__()
            self.seen = []

        def step(self, done, total, unit="step"):
            self.seen.append((done, total, unit))

    steps = Steps()
    options = DancerPoseOptions(negative=True)
    given = {"size": SIZE, "num_frames": 2, "canvas": SIZE}
    draw_dancer_pose([make_track(2)], still(), options, progress=steps, **given)
    assert steps.seen == [(n, 4, "frame") for n in range(1, 5)]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"convention": "dwpose"}, "convention"),
        ({"mode": "strict"}, "mode"),
        ({"align_to": "pose"}, "align_to"),
        ({"align_to": "left"}, "align_to"),
        ({"fit": "resize"}, "fit"),
        ({"draw_face_points": "strong"}, "draw_face_points"),
        ({"draw_head": True}, "draw_head"),
        ({"anchor_frame": -1}, "anchor_frame"),
        ({"anchor_frame": 3}, "anchor_frame"),
        ({"persons": 0}, "persons"),
        ({"persons": 2}, "persons"),
        ({"max_gap_s": -1.0}, "max_gap_s"),
        ({"num_frames": 0}, "num_frames"),
        ({"tracks": []}, "tracks"),
    ],
)
def test_values_that_are_not_allowed_are_refused(options, field):
    with pytest.raises(InvalidRequest) as caught:
        drive(**options)
    assert caught.value.field == field


class NoBodies:
    """Stands for the 3-D network, which SteadyDancer does not need."""

    def estimate(self, frames, boxes, intrinsics):
        counts = [len(found.bboxes) for found in boxes]
        return [
            Bodies(np.zeros((n, 24, 3), np.float32), np.zeros((n, 24), np.float32)) for n in counts
        ]


def test_a_film_becomes_the_pose_of_who_dances_in_it():
    """The contract networks see a film; joints are drawn where alignment puts the truth."""
    cpu = torch.device("cpu")
    models = PoseModels(
        YoloDetector(GOLDEN / "yolov10_contract.onnx", cpu),
        VitPose(GOLDEN / "vitpose_contract.onnx", cpu),
        NoBodies(),
    )
    size, frames = (224, 128), 6
    truth = dancer(frames, size=size, tall=0.8)
    observations = observe(shots([truth], size=size), models, SilentProgress(), frames)
    tracks, _ = find_tracks(observations, fps=Fraction(16), size=size, options=MotionOptions())
    picture = shots([dancer(1, size=size, tall=0.6, centre=(0.55, 0.55))], size=size)[0]
    reference = find_reference(picture, models)
    assert reference is not None
    pose, _ = drive(tracks, reference, num_frames=frames, size=(128, 224), canvas=(128, 224))
    own = dancer(1, size=size, tall=0.6, centre=(0.55, 0.55))[0] * [128, 224]
    # The first frame of the driver is the reference's own pose, so its joints lie on the truth.
    for keypoint in (5, 6, 7, 8, 11, 12, 13, 14):
        x, y = own[keypoint].round().astype(int)
        assert pose.positive.frames[0, y - 3 : y + 4, x - 3 : x + 4].max() > 80
    assert pose.positive.frames.shape == (frames, 224, 128, 3)
    assert pose.report["fps"] == "16"
