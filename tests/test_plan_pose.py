"""The plan of finding poses, and of pipeline pose."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines import plan_pose
from pipelines.plan import Plan, driving_frames, make_plan
from pipelines.plan_text import format_plan
from tests.cli_media import write_image, write_video
from xicon_infer import formulas_pose
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.job import make_job

EXAMPLE = Path(__file__).parents[1] / "examples" / "dance_fullbody.npz"
GIGA = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan_pose")
    write_image(path / "ref.png", 60, 90)
    write_video(path / "dance.mp4", frames=20, fps=16)
    (path / "mine.pt").write_bytes(b"12345")
    return path


@pytest.fixture
def scail(folder: Path) -> dict[str, Any]:
    files = {"image": folder / "ref.png", "video": folder / "dance.mp4"}
    return {**files, "output": folder / "out.mp4", "width": 416, "height": 672, "preset": "tiny"}


@pytest.fixture
def alone(folder: Path) -> dict[str, Any]:
    files = {"video": folder / "dance.mp4", "output": folder / "out.mp4"}
    return {"pipeline": "pose", **files, "width": 416, "height": 672}


def planned(base: dict[str, Any], **values: Any) -> Plan:
    return make_plan(make_job({**base, **values}))


def work(plan: Plan) -> dict[str, int]:
    return {stage.name: stage.flops for stage in plan.stages}


def test_work_of_the_networks_as_published() -> None:
    # Performance specification, 1.5: 0.248 TF and a head of 4 GF; ViTPose-L has 59.8 GMAC.
    assert formulas_pose.vitpose_flops("vitpose-h") == pytest.approx(252 * GIGA, rel=2e-3)
    assert formulas_pose.vitpose_flops("vitpose-l") == pytest.approx(123.6 * GIGA, rel=1e-2)
    assert (formulas_pose.body_flops("nlf"), formulas_pose.body_flops("rtmw3d")) == (72 * GIGA, 0)
    assert formulas_pose.drawing_flops(10, 20, 3, 2) == 13 * 60 * 10 * 20 * 3 * 2


def test_finding_poses_is_the_first_stage_of_scail(scail: dict[str, Any]) -> None:
    plan = planned(scail)
    first = plan.stages[0]
    keypoints = formulas_pose.vitpose_flops("vitpose-h")
    # 20 driving frames and the reference, which needs no body.
    assert first.name == "find poses"
    assert first.flops == 21 * 59 * GIGA + 21 * keypoints + 20 * 72 * GIGA
    assert first.weight_bytes == 4 * (637_000_000 + 15_400_000 + 120_000_000)
    assert plan.total_flops == sum(work(plan).values())
    assert (plan.driving_frames, plan.num_frames, len(plan.steps)) == (20, 17, 6)


@pytest.mark.parametrize("given", ["pose_video", "track"])
def test_a_given_motion_needs_no_pose_network(
    scail: dict[str, Any], folder: Path, given: str
) -> None:
    path = folder / "dance.mp4" if given == "pose_video" else EXAMPLE
    plan = planned(scail, **{given: path})
    assert plan.stages[0].name == "encode reference and pose"
    assert (plan.files, plan.notes) == ((), ())


@pytest.mark.parametrize(
    "change",
    [
        {"body": "rtmw3d"},
        {"detector": "mine.pt"},
        {"keypoint_model": "vitpose-l"},
        {"persons": 2},
        {"align": "off"},
        {"max_frames": 9},
        {"num_frames": 9},
        {"fps": 8},
    ],
    ids=str,
)
def test_options_that_change_the_work(
    scail: dict[str, Any], folder: Path, change: dict[str, Any]
) -> None:
    if "detector" in change:
        change = {"detector": str(folder / "mine.pt")}
    assert work(planned(scail, **change))["find poses"] != work(planned(scail))["find poses"]


def test_no_more_frames_are_looked_at_than_are_drawn(scail: dict[str, Any]) -> None:
    assert driving_frames(make_job({**scail, "num_frames": 9}))[0] == 9
    assert driving_frames(make_job({**scail, "num_frames": 9, "max_frames": 5}))[0] == 5
    assert driving_frames(make_job({**scail, "fps": 8})) == (10, 8)


def test_plan_of_pipeline_pose(alone: dict[str, Any], folder: Path) -> None:
    plan = planned(alone, overlay=True)
    assert (plan.pipeline, plan.preset, plan.steps, plan.forwards) == ("pose", "", (), 0)
    assert (plan.width, plan.height, plan.num_frames, plan.output_frames) == (416, 672, 20, 20)
    assert list(work(plan)) == ["find poses", "draw pose"]
    assert work(plan)["draw pose"] == formulas_pose.drawing_flops(416, 672, 20)
    assert work(planned(alone, persons=2))["draw pose"] == 2 * work(plan)["draw pose"]
    assert plan.peak_memory_bytes == max(s.weight_bytes + s.work_bytes for s in plan.stages)
    assert set(plan.outputs) == {"video", "report", "track", "openpose", "overlay"}
    aligned = planned(alone, image=folder / "ref.png")
    assert work(aligned)["find poses"] > work(plan)["find poses"]
    assert json.loads(json.dumps(asdict(plan), default=str))["settings"]["subject"] == "auto"


def test_plan_of_a_redrawn_track(alone: dict[str, Any]) -> None:
    plan = planned(alone, video=None, track=EXAMPLE)
    assert (list(work(plan)), plan.files, plan.driving_frames) == (["draw pose"], (), 212)
    assert planned(alone, video=None, track=EXAMPLE, num_frames=30).num_frames == 30


def test_pose_files_present_and_missing(alone: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "yolov10m.onnx").write_bytes(b"123")
    plan = make_plan(make_job(alone), search_dirs=[tmp_path])
    found = {file.name: file for file in plan.files}
    assert found["yolov10m.onnx"].path == tmp_path / "yolov10m.onnx"
    assert [file.component for file in plan.files] == [
        "pose_detector",
        "pose_keypoints",
        "pose_keypoints",
        "pose_body",
    ]
    assert sum(file.path is None for file in plan.files) == 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, "vitpose_h"),
        ({}, "nlf"),
        ({"keypoint_model": "vitpose-l"}, "vitpose-l"),
        ({"body": "rtmw3d"}, "rtmw3d"),
        ({"body": "rtmw3d", "keypoint_model": "vitpose-l"}, "vitpose-l"),
    ],
)
def test_files_follow_the_options(alone: dict[str, Any], change: dict[str, Any], part: str) -> None:
    names = [file.name for file in planned(alone, **change).files]
    assert any(part in name for name in names)
    if change:
        assert names != [file.name for file in planned(alone).files]


def test_files_of_an_own_detector(alone: dict[str, Any], folder: Path) -> None:
    plan = planned(alone, detector=str(folder / "mine.pt"))
    own = plan.files[0]
    assert (own.component, own.path, own.size_bytes) == ("pose_detector", folder / "mine.pt", 5)
    assert not any("yolov10m" in file.name for file in plan.files)
    assert any("mine.pt" in note for note in plan.notes)


def test_scail_names_the_files_of_both(scail: dict[str, Any]) -> None:
    kinds = [file.component for file in planned(scail, preset="fp8").files]
    assert {"transformer", "pose_detector", "pose_keypoints", "pose_body", "lora"} <= set(kinds)


def test_text(alone: dict[str, Any], scail: dict[str, Any]) -> None:
    text = format_plan(planned(alone))
    for part in (
        "pipeline   pose\n",
        "416x672, 20 frames at 16 fps",
        "MISSING  nlf",
        "find poses",
        "draw pose",
        "note       find poses counts 1 person in a frame",
        "its own detector adds 260 GF a frame",
        "out.openpose.json",
    ):
        assert part in text
    assert "sampling" not in text
    assert "forward passes" not in text
    assert "latent" not in text
    both = format_plan(planned(scail, persons=2, body="rtmw3d"))
    assert "counts 2 persons in a frame" in both
    assert "RTMW3D are not known" in both
    assert "sampling   dpm++_sde" in both


def test_same_numbers_as_in_the_modules_with_torch() -> None:
    from pipelines import pose
    from xicon_infer.pose.render import RenderOptions

    ours = (plan_pose.BATCH, plan_pose.BUILT_IN_DETECTORS)
    assert ours == (pose.BATCH, pose.BUILT_IN_DETECTORS)
    assert RenderOptions().chunk == plan_pose.BATCH


def test_what_cannot_be_planned(alone: dict[str, Any], folder: Path) -> None:
    with pytest.raises(MediaError) as caught:
        planned(alone, video=folder / "ref.png")
    assert caught.value.field == "video"
    with pytest.raises(InvalidRequest, match="'skip_frames' leaves nothing of 20"):
        planned(alone, skip_frames=20)
