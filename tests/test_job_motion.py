"""Options of the pose stage: where the motion comes from, and how a person is followed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, make_job
from xicon_infer.job_fields import FIELDS, Field
from xicon_infer.job_fields_motion import MOTION, MOTION_OUTPUT

DANCE: dict[str, Any] = {"image": "ref.png", "video": "dance.mp4"}
ALONE: dict[str, Any] = {"pipeline": "pose", "video": "dance.mp4"}

# Another value than the default for every option of the stage; tracker needs its own detector.
CHANGES: dict[str, dict[str, Any]] = {
    "body": {"body": "rtmw3d"},
    "detector": {"detector": "dir/mine.pt"},
    "tracker": {"tracker": "bytetrack", "detector": "mine.engine"},
    "keypoint_model": {"keypoint_model": "vitpose-l"},
    "keypoint_decode": {"keypoint_decode": "udp"},
    "subject": {"subject": "central"},
    "persons": {"persons": 2},
    "smooth": {"smooth": 0.5},
    "align": {"align": "wide"},
    "pose_align": {"pose_align": "official"},
    "pose_style": {"pose_style": "comfyui"},
    "pose_cache": {"pose_cache": False},
    "overlay": {"overlay": True},
    "save_track": {"save_track": True},
}
TABLE = {field.name: field for field in FIELDS}
STAGE = [field.name for field in (*MOTION, *MOTION_OUTPUT)]
DANCER = {**DANCE, "pipeline": "steady_dancer"}


def reader(name: str) -> dict[str, Any]:
    """Returns a job with a driving video that reads the option."""
    return DANCE if TABLE[name].used_by("scail") else DANCER


READ_BY_POSE = {
    *("pipeline", "image", "video", "track", "pose_fit", "draw_face", "draw_hands"),
    *(name for name in STAGE if name not in ("save_track", "pose_align", "pose_style")),
    *("output", "overwrite", "audio", "crf", "sheet", "models_dir", "device"),
    *("width", "height", "num_frames", "max_frames", "skip_frames", "select_every_nth", "fps"),
}


def refused(values: dict[str, Any], **changed: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        make_job({**values, **changed})
    return caught.value


def test_an_image_and_a_dance_are_enough() -> None:
    job = make_job(DANCE)
    assert (job.finds_poses, job.aligns, job.warnings) == (True, True, ())
    assert (job.body, job.detector, job.detector_path, job.tracker) == (
        "nlf",
        "yolov10m",
        None,
        "none",
    )
    assert (job.keypoint_model, job.keypoint_decode) == ("vitpose-h", "dark")
    assert (job.subject, job.persons, job.smooth, job.align) == ("auto", 1, 0.0, "auto")
    assert (job.pose_cache, job.overlay, job.save_track) == (True, False, False)


def test_a_dance_alone_is_enough_for_a_pose_video() -> None:
    job = make_job(ALONE)
    assert (job.image, job.finds_poses, job.aligns, job.align) == (None, True, False, "off")
    assert (job.loras, job.warnings) == ((), ())
    assert make_job({**ALONE, "image": "ref.png"}).aligns
    assert not make_job({**ALONE, "image": "ref.png", "align": "off"}).aligns


@pytest.mark.parametrize("given", ["pose_video", "track"])
def test_a_given_motion_leaves_sound_and_rate_to_the_video(given: str) -> None:
    job = make_job({**DANCE, given: "motion"})
    assert (job.finds_poses, job.aligns, job.align, job.warnings) == (False, False, "off", ())


@pytest.mark.parametrize(
    ("values", "field", "code", "part"),
    [
        ({"video": None}, "video", "DRIVING_VIDEO_REQUIRED", "give --video (a dance), --pose"),
        ({"image": None}, "image", "MISSING_FIELD", "Missing 'image'"),
        ({"pose_video": "a", "track": "b"}, "track", "INVALID_MEDIA", "not both"),
        ({"pose_fit": "stretch"}, "pose_fit", "INVALID_CHOICE", "crop, pad for a track or a"),
        ({"tracker": "botsort"}, "tracker", "INVALID_CHOICE", "none with --detector yolov10m"),
        ({"overlay": True, "track": "t"}, "overlay", "MISSING_FIELD", "without --track"),
        ({"overlay": True, "video": None, "track": "t"}, "overlay", "MISSING_FIELD", "--video"),
    ],
)
def test_what_does_not_go_together(
    values: dict[str, Any], field: str, code: str, part: str
) -> None:
    error = refused(DANCE, **values)
    assert (error.field, error.code) == (field, code)
    assert part in error.message


@pytest.mark.parametrize(
    ("values", "field", "code", "part"),
    [
        ({"video": None}, "video", "DRIVING_VIDEO_REQUIRED", "(a dance) or --track (a saved"),
        ({"track": "t.npz"}, "track", "INVALID_MEDIA", "'video' or 'track' to pipeline pose"),
        ({"pose_video": "p.mp4"}, "pose_video", "UNUSED_FIELD", "only by scail"),
        ({"align": "auto"}, "align", "MISSING_FIELD", "'align' auto needs --image"),
        ({"align": "wide"}, "align", "MISSING_FIELD", "'align' wide needs --image"),
        ({"pose_fit": "stretch"}, "pose_fit", "INVALID_CHOICE", "crop, pad"),
        ({"overlay": True, "video": None, "track": "t"}, "overlay", "MISSING_FIELD", "--video"),
    ],
)
def test_what_pipeline_pose_refuses(
    values: dict[str, Any], field: str, code: str, part: str
) -> None:
    error = refused(ALONE, **values)
    assert (error.field, error.code) == (field, code)
    assert part in error.message


def test_pipeline_pose_redraws_a_track() -> None:
    job = make_job({"pipeline": "pose", "track": "edited.npz", "draw_face": False})
    assert (job.finds_poses, job.track is not None, job.warnings) == (False, True, ())
    assert make_job({**ALONE, "align": "off"}).align == "off"


def test_what_pipeline_pose_reads() -> None:
    assert {field.name for field in FIELDS if field.used_by("pose")} == READ_BY_POSE
    assert set(make_job(ALONE).settings()) == READ_BY_POSE


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if not field.used_by("pose")], ids=lambda f: f.name
)
def test_pipeline_pose_refuses_what_it_does_not_read(field: Field) -> None:
    values = {"path": "x", "text": "x", "switch": True, "loras": ["a"], "choice": "x"}
    error = refused(ALONE, **{field.name: values.get(field.kind, 1)})
    assert (error.field, error.code) == (field.name, "UNUSED_FIELD")
    assert error.message == (
        f"'{field.name}' is not used by pipeline pose, only by {', '.join(field.pipelines)}; "
        "leave it out"
    )


def test_every_option_of_the_stage_has_a_case() -> None:
    assert set(CHANGES) == set(STAGE)


@pytest.mark.parametrize("name", STAGE)
@pytest.mark.parametrize(
    "base", [DANCE, DANCER, {**ALONE, "image": "a.png"}], ids=["scail", "steady_dancer", "pose"]
)
def test_every_option_of_the_stage_changes_the_settings(name: str, base: dict[str, Any]) -> None:
    if not TABLE[name].used_by(base.get("pipeline", "scail")):
        assert refused(base, **CHANGES[name]).code == "UNUSED_FIELD"
        return
    job = make_job({**base, **CHANGES[name]})
    assert job.warnings == ()
    assert job.settings()[name] == CHANGES[name][name]
    assert job.settings()[name] != make_job(base).settings()[name]


@pytest.mark.parametrize("name", [name for name in STAGE if name != "overlay"])
@pytest.mark.parametrize("given", ["pose_video", "track"])
def test_an_option_without_effect_on_a_given_motion_is_told(name: str, given: str) -> None:
    told = make_job({**reader(name), given: "motion", **CHANGES[name]}).warnings
    kind = "a pose video" if given == "pose_video" else "a track"
    if name in ("pose_style", "pose_align"):
        assert bool(told) == (given == "pose_video")
        return
    assert f"'{name}' has no effect with {kind}: no pose is found" in told
    assert len(told) == len(CHANGES[name])


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({**ALONE, "image": "a.png", "align": "off"}, "image"),
        ({"pipeline": "pose", "track": "t", "image": "a.png"}, "image"),
        ({"pipeline": "pose", "track": "t", "audio": "none"}, "audio"),
        ({"image": "a.png", "track": "t", "audio": "none"}, "audio"),
    ],
)
def test_other_options_without_effect(values: dict[str, Any], name: str) -> None:
    (warning,) = make_job(values).warnings
    assert warning.startswith(f"'{name}' has no effect ")


def test_a_silent_driving_video_still_drives() -> None:
    assert make_job({**DANCE, "audio": "none", "fps": 16}).warnings == ()
    sheet = {**DANCE, "track": "t", "audio": "none", "fps": 16, "sheet": True}
    assert make_job(sheet).warnings == ()


@pytest.mark.parametrize("value", ["auto", "largest", "central", "confident", "0", "7", "99"])
def test_subjects(value: str) -> None:
    assert make_job({**DANCE, "subject": value}).subject == value


@pytest.mark.parametrize(
    "value", ["", "Auto", "all", "100", "-1", "+1", "01", "1.0", " 1", "1 ", "auto\n", "٣", "0x1"]
)
def test_wrong_subjects(value: str) -> None:
    error = refused(DANCE, subject=value)
    assert (error.field, error.code) == ("subject", "INVALID_VALUE")
    assert "auto, largest, central, confident, or a number from 0 to 99, got " in error.message


@pytest.mark.parametrize("value", ["yolov10m", "yolox", "a.pt", "dir/b.ONNX", "名.pt"])
def test_detectors(value: str) -> None:
    job = make_job({**DANCE, "detector": value})
    assert job.detector == value
    assert (job.detector_path is None) == (value in ("yolov10m", "yolox"))


@pytest.mark.parametrize("value", ["", "yolov10", "YOLOv10m", ".pt", "a.pth", "a.pt ", "a.onnx\n"])
def test_wrong_detectors(value: str) -> None:
    error = refused(DANCE, detector=value)
    assert (error.field, error.code) == ("detector", "INVALID_VALUE")
    assert "yolov10m, yolox, or a path that ends in .pt, .onnx or .engine, got " in error.message


@pytest.mark.parametrize("name", STAGE)
@pytest.mark.parametrize(
    "value", [3.5, [], {}, object(), "garbage"], ids=lambda v: type(v).__name__
)
def test_wrong_values(name: str, value: Any) -> None:
    error = refused(reader(name), **{name: value})
    assert error.field == name


@pytest.mark.parametrize("base", [DANCE, ALONE, {**DANCE, "track": "t"}, {**ALONE, "image": "a"}])
@pytest.mark.parametrize("change", [{}, {"subject": "3"}, {"smooth": 1}, CHANGES["tracker"]])
def test_settings_rebuild_the_job(base: dict[str, Any], change: dict[str, Any]) -> None:
    job: Job = make_job({**base, **change})
    again = make_job(json.loads(json.dumps(job.settings())))
    assert (again, again.warnings) == (job, job.warnings)
