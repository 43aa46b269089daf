"""The plan of the other pipelines, and the memory of a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.plan import Plan, make_plan
from pipelines.plan_text import format_plan
from tests.cli_media import write_image, write_video
from xicon_infer import formulas, formulas_vae
from xicon_infer.errors import InvalidRequest, OutOfMemory
from xicon_infer.job import make_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    write_image(path / "ref.png", 60, 90)
    write_video(path / "pose.mp4", frames=20, fps=16)
    return path


@pytest.fixture
def base(folder: Path) -> dict[str, Any]:
    values = {"image": folder / "ref.png", "pose_video": folder / "pose.mp4"}
    return {**values, "output": folder / "out.mp4", "width": 416, "height": 672}


def planned(base: dict[str, Any], **values: Any) -> Plan:
    return make_plan(make_job({**base, **values}))


def test_steady_dancer_counts_its_branches(folder: Path, base: dict[str, Any]) -> None:
    dancer = base | {"pipeline": "steady_dancer", "negative_pose": folder / "pose.mp4"}
    plan = planned(dancer, profile="quality")
    assert plan.forwards == 91
    assert [step.forwards for step in plan.steps][4:7] == [2, 3, 3]
    assert plan.num_frames == 17
    rows = [line.split() for line in format_plan(plan).splitlines()]
    assert [row[3] for row in rows if row and row[0] in ("0-4", "5-15", "16-39")] == ["2", "3", "2"]
    hw = 416 * 672 // 256
    assert plan.tokens == (5 + 2) * hw
    work = {stage.name: stage.flops for stage in plan.stages}
    video = formulas_vae.encode_flops(416, 672, 17)
    assert work["encode reference and pose"] == 3 * video
    assert work["encode image"] == 2 * formulas.clip_flops()
    fast = planned(base | {"pipeline": "steady_dancer"})
    assert fast.forwards == 4
    late = planned(base | {"pipeline": "steady_dancer"}, pose_end=0.25, pose_clip=False)
    assert [step.tokens for step in late.steps] == [7 * hw, 7 * hw, 5 * hw, 5 * hw]
    assert "encode image" in {stage.name for stage in late.stages}
    assert late.total_flops < fast.total_flops


def test_wan_needs_no_driving_video(folder: Path) -> None:
    values = {"output": folder / "out.mp4", "width": 416, "height": 672, "num_frames": 83}
    text = make_plan(make_job(values | {"pipeline": "wan_t2v", "prompt": "a fox"}))
    assert (text.driving_frames, text.num_frames, text.tokens) == (0, 81, 21 * 1092)
    assert "encode image" not in {stage.name for stage in text.stages}
    assert any("83 frames lowered to 81" in warning for warning in text.warnings)
    assert "nothing drives it" in format_plan(text)
    image = values | {"pipeline": "wan_i2v", "image": folder / "ref.png"}
    start = make_plan(make_job(image))
    work = {stage.name: stage.flops for stage in start.stages}
    assert work["encode start image"] == formulas_vae.encode_flops(416, 672, 81)
    long = make_plan(make_job(image | {"num_frames": 161}))
    work = {stage.name: stage.flops for stage in long.stages}
    assert work["encode start image"] == formulas_vae.encode_flops(416, 672, 117)
    both = make_plan(make_job(image | {"preset": "flf2v-fp8", "end_image": folder / "ref.png"}))
    assert both.total_flops > start.total_flops
    sized = make_plan(make_job(image | {"sizing": "area"}))
    assert (sized.width, sized.height) != (416, 672)
    assert make_plan(make_job(image | {"preset": "bf16"})).peak_memory_bytes > (
        start.peak_memory_bytes
    )


def test_pictures_in_a_folder_drive(folder: Path, tmp_path: Path) -> None:
    for index in range(9):
        write_image(tmp_path / f"{index:04d}.png", 60, 90)
    values = {
        "pipeline": "steady_dancer",
        "image": folder / "ref.png",
        "pose_video": tmp_path,
        "output": folder / "out.mp4",
    }
    assert make_plan(make_job(values)).driving_frames == 9
    assert make_plan(make_job(values | {"skip_frames": 4})).num_frames == 5
    with pytest.raises(InvalidRequest, match="leaves nothing of 9 pictures"):
        make_plan(make_job(values | {"skip_frames": 9}))


def test_the_memory_of_a_card(base: dict[str, Any]) -> None:
    job = make_job(base | {"num_frames": 81})
    plan = make_plan(job, gpu="RTX 4090")
    assert "RTX 4090: offload" in plan.memory[0]
    assert "card       RTX 4090" in format_plan(plan)
    assert make_plan(job).memory == ()
    small = make_plan(job, gpu="16GB").memory
    assert "stream" in small[0]
    streamed = make_job(base | {"num_frames": 81, "memory": "stream", "blocks_to_swap": 30})
    assert any("30 of 40 blocks" in line for line in make_plan(streamed, gpu="RTX 4090").memory)
    merged = make_job(base | {"num_frames": 81, "storage": "merged-bf16"})
    assert "storage merged-bf16" in make_plan(merged, gpu="H200").memory[0]
    with pytest.raises(OutOfMemory, match="memory"):
        make_plan(make_job(base | {"num_frames": 81, "memory": "resident"}), gpu="16GB")
    with pytest.raises(InvalidRequest, match="RTX 4090"):
        make_plan(job, gpu="RTX 4091")
