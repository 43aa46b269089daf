"""The plan of a job: steps, windows, work, memory, files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines import plan as plan_module
from pipelines import plan_shapes, plan_stages
from pipelines.plan import Plan, driving_frames, make_plan, plan_steps
from pipelines.plan_text import format_plan
from tests.cli_media import write_image, write_video
from xicon_infer import formulas, formulas_vae
from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.formulas import SCAIL_14B
from xicon_infer.job import Job, make_job
from xicon_infer.job_fields import FIELDS
from xicon_infer.job_profiles import I2V_LORA
from xicon_infer.types import Clip, SilentProgress
from xicon_infer.weights.manifest import files_for

EXAMPLE = Path(__file__).parents[1] / "examples" / "dance_fullbody.npz"

# Windows per step at 81/4/16, six steps; performance spec, section 1.3. The last number is the
# sum of static windows, which is the same in every step.
WINDOWS = {
    81: ([1, 1, 1, 1, 1, 1], 6),
    97: ([2, 2, 2, 2, 3, 2], 12),
    121: ([2, 3, 3, 3, 3, 3], 12),
    161: ([3, 3, 4, 3, 3, 4], 18),
    193: ([3, 4, 3, 4, 4, 3], 18),
    241: ([4, 5, 5, 5, 4, 5], 24),
    301: ([5, 5, 6, 5, 6, 6], 30),
    361: ([6, 7, 6, 7, 7, 6], 36),
    481: ([7, 9, 9, 9, 8, 9], 42),
}


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


def steps_of(frames: int, **values: Any) -> tuple[plan_module.StepPlan, ...]:
    job = make_job({"image": "a", "track": "b", **values})
    return plan_steps(job, SCAIL_14B, 416, 672, frames)


@pytest.mark.parametrize("frames", WINDOWS)
def test_windows_as_published(frames: int) -> None:
    uniform, static = WINDOWS[frames]
    steps = steps_of(frames)
    assert [len(step.windows) for step in steps] == uniform
    assert {length for step in steps for length in step.windows} == {21}
    still = steps_of(frames, context_schedule="static_standard")
    assert sum(len(step.windows) for step in still) == static


def test_windows_of_four_steps_as_published() -> None:
    four = [len(s.windows) for s in steps_of(121, num_inference_steps=4)]
    assert four == [2, 3, 3, 3]
    assert [len(s.windows) for s in steps_of(241, num_inference_steps=4)] == [4, 5, 5, 5]


def test_pose_is_there_in_the_first_four_of_six_steps() -> None:
    steps = steps_of(81)
    assert [step.pose for step in steps] == [True] * 4 + [False] * 2
    assert [step.tokens for step in steps] == [29_757] * 4 + [24_024] * 2
    assert [round(step.timestep) for step in steps] == [999, 961, 909, 833, 714, 499]
    assert all(step.reference for step in steps)
    assert steps[0].flops == formulas.forward_flops(SCAIL_14B, 29_757)
    late = steps_of(81, pose_start=0.5, pose_end=1.0, ref_end=0.2)
    assert [step.pose for step in late] == [False] * 3 + [True] * 3
    assert [step.reference for step in late] == [True] * 2 + [False] * 4


def test_guidance_doubles_the_forwards_and_their_work() -> None:
    plain, guided = steps_of(81), steps_of(81, guidance_scale=4.0)
    assert [s.forwards for s in plain] == [1] * 6
    assert [s.forwards for s in guided] == [2] * 6
    assert sum(s.flops for s in guided) == 2 * sum(s.flops for s in plain)
    assert [s.tokens for s in guided] == [s.tokens for s in plain]


def test_a_short_video_is_one_window_of_its_own_length() -> None:
    assert steps_of(33)[0].windows == (9,)
    assert steps_of(161, context_frames=321)[0].windows == (41,)


@pytest.mark.parametrize(
    "change",
    [
        {"context_frames": 49},
        {"context_overlap": 32},
        {"context_stride": 8},
        {"context_schedule": "static_standard"},
    ],
)
def test_options_that_change_the_windows(change: dict[str, Any]) -> None:
    changed, base = steps_of(161, **change), steps_of(161)
    assert [step.windows for step in changed] != [step.windows for step in base]


def test_steps_that_the_sampler_cannot_make() -> None:
    with pytest.raises(InvalidRequest, match="flowmatch_distill"):
        steps_of(81, scheduler="flowmatch_distill")
    assert len(steps_of(81, scheduler="flowmatch_distill", num_inference_steps=4)) == 4


def test_work_of_the_stages(base: dict[str, Any]) -> None:
    plan = planned(base, num_frames=81)
    work = {stage.name: stage.flops for stage in plan.stages}
    sampling = 4 * formulas.forward_flops(SCAIL_14B, 29_757)
    sampling += 2 * formulas.forward_flops(SCAIL_14B, 24_024)
    assert work["sample"] == sampling + formulas.cross_kv_flops(SCAIL_14B)
    assert work["decode video"] == formulas_vae.decode_flops(416, 672, 81)
    reference = formulas_vae.encode_flops(416, 672, 1)
    pose = formulas_vae.encode_flops(208, 336, 81)
    assert work["encode reference and pose"] == reference + pose
    assert work["encode text"] == formulas.umt5_flops(512)
    assert plan.total_flops == sum(work.values())
    assert (plan.forwards, plan.tokens, plan.latent_frames) == (6, 29_757, 21)


def test_memory_of_the_presets(base: dict[str, Any]) -> None:
    fp8, bf16 = planned(base, num_frames=81), planned(base, num_frames=81, preset="bf16")
    names = [stage.name for stage in fp8.stages]
    sampling = fp8.stages[names.index("sample")]
    weights = formulas.weight_bytes(SCAIL_14B, 1) + formulas.lora_bytes(SCAIL_14B, 64)
    assert sampling.weight_bytes == weights
    assert sampling.work_bytes == formulas.sampling_bytes(SCAIL_14B, 29_757)
    assert fp8.peak_memory_bytes == sampling.weight_bytes + sampling.work_bytes
    assert 19e9 < fp8.peak_memory_bytes < 22e9
    grown = bf16.peak_memory_bytes - fp8.peak_memory_bytes
    assert grown == formulas.matrix_parameters(SCAIL_14B)
    assert fp8.resident_memory_bytes > fp8.peak_memory_bytes


def test_tiny_sizes_are_those_of_the_tiny_models() -> None:
    from pipelines import scail, steady_dancer_sampling, tiny, wan_video
    from xicon_infer.models.scail import ScailTransformer
    from xicon_infer.models.vae_config import VAEConfig

    config, dit = tiny.TINY_SCAIL, plan_shapes.TINY_DIT
    sizes = (config.dim, config.ffn_dim, config.num_layers, config.num_heads, config.in_dim)
    assert sizes == (dit.dim, dit.ffn_dim, dit.layers, dit.heads, dit.in_channels)
    counted = sum(p.numel() for p in ScailTransformer(config).parameters())
    assert formulas.parameters(dit) == counted
    grid = tiny.TINY_VISION.image_size // tiny.TINY_VISION.patch_size
    assert dit.image_tokens == grid * grid + 1
    vae = sum(t.numel() for t in tiny.tiny_vae_state().values())
    assert formulas_vae.parameters(plan_shapes.TINY_VAE) == vae
    recipes = (scail, steady_dancer_sampling, wan_video)
    assert {r.BATCHED_TOKENS for r in recipes} == {plan_stages.BATCHED_TOKENS}
    assert VAEConfig().look_back + 5 == formulas_vae.GREY_FRAMES


@pytest.mark.parametrize("name", ["steady_dancer", "wan_i2v", "wan_t2v"])
def test_tiny_sizes_of_the_other_pipelines(name: str) -> None:
    from pipelines.loading import load_tiny

    counted = sum(p.numel() for p in load_tiny(name).transformer.parameters())
    extra = 0
    if name == "steady_dancer":
        from xicon_infer.models.steady_dancer import SteadyDancerTransformer
        from xicon_infer.models.wan import WanTransformer

        model = load_tiny(name).transformer
        plain = sum(p.numel() for p in WanTransformer(model.config).parameters())
        assert isinstance(model, SteadyDancerTransformer)
        extra = counted - plain
    assert formulas.parameters(plan_shapes.TINY_DITS[name]) == counted - extra


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 21},
        {"width": 448},
        {"height": 704},
        {"num_inference_steps": 7},
        {"guidance_scale": 2.0},
        {"pose_end": 1.0},
        {"ref_end": 0.5},
        {"preset": "tiny"},
        {"tile": True},
        {"max_frames": 9},
        {"skip_frames": 8},
        {"select_every_nth": 2},
        {"fps": 8},
    ],
)
def test_options_that_change_the_work(base: dict[str, Any], change: dict[str, Any]) -> None:
    assert planned(base, **change).total_flops != planned(base).total_flops


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "fp32"},
        {"device": "cpu"},
        {"preset": "bf16"},
        {"loras": ["none"]},
        {"lora_mode": "merge"},
        {"guidance_scale": 2.0},
    ],
)
def test_options_that_change_the_memory(base: dict[str, Any], change: dict[str, Any]) -> None:
    assert planned(base, **change).peak_memory_bytes != planned(base).peak_memory_bytes


def test_batched_guidance_needs_more_memory_than_sequential(base: dict[str, Any]) -> None:
    def sampling(how: str, frames: int) -> int:
        plan = planned(base, guidance_scale=2.0, guidance_batching=how, num_frames=frames)
        return {stage.name: stage.work_bytes for stage in plan.stages}["sample"]

    assert sampling("batched", 81) > sampling("sequential", 81) == sampling("auto", 81)
    assert sampling("batched", 5) == sampling("auto", 5) > sampling("sequential", 5)


def test_tiles_need_less_memory_and_more_work(base: dict[str, Any]) -> None:
    whole, tiled = planned(base, num_frames=81), planned(base, num_frames=81, tile=True)
    assert tiled.stages[-1].work_bytes < whole.stages[-1].work_bytes
    assert tiled.stages[-1].flops > 2 * whole.stages[-1].flops


@pytest.mark.parametrize(
    ("values", "frames", "fps"),
    [
        ({}, 20, 16),
        ({"fps": 8}, 10, 8),
        ({"fps": 32}, 39, 32),  # the source ends before its last frame is taken twice
        ({"skip_frames": 5}, 15, 16),
        ({"select_every_nth": 3}, 7, 16 / 3),
        ({"max_frames": 12}, 12, 16),
    ],
)
def test_driving_frames(
    base: dict[str, Any], values: dict[str, Any], frames: int, fps: float
) -> None:
    count, rate = driving_frames(make_job({**base, **values}))
    assert (count, float(rate)) == (frames, pytest.approx(fps))


@pytest.mark.parametrize(
    "values",
    [{}, {"fps": 7.5}, {"fps": 23.976}, {"skip_frames": 3, "select_every_nth": 2, "max_frames": 6}],
)
@pytest.mark.parametrize("kind", ["pose_video", "track"])
def test_driving_frames_are_those_the_service_reads(
    base: dict[str, Any], folder: Path, kind: str, values: dict[str, Any]
) -> None:
    from xicon_infer.service_inputs import motion_selection, read_motion

    source = {"pose_video": base["pose_video"], "track": None}
    if kind == "track":
        source = {"pose_video": None, "track": EXAMPLE}
    for video in (None, folder / "pose.mp4"):
        job = make_job({**base, **source, **values, "video": video, "audio": "none"})
        pose, _ = read_motion(job, motion_selection(job), SilentProgress())
        if isinstance(pose, Clip):
            read = (len(pose.frames), pose.fps)
        else:
            read = (len(pose[0].pose.keypoints), pose[0].fps)
        assert driving_frames(job) == read


def test_driving_video_gives_the_rate(base: dict[str, Any], folder: Path) -> None:
    slow = write_video(folder / "slow.mp4", frames=8, fps=8)
    count, rate = driving_frames(make_job({**base, "video": slow}))
    assert (count, rate) == (10, 8)


def test_frames_of_a_track(folder: Path) -> None:
    job = make_job({"image": folder / "ref.png", "track": EXAMPLE})
    assert driving_frames(job) == (212, 24)


def test_nothing_left_to_drive(base: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="'skip_frames' leaves nothing of 20"):
        driving_frames(make_job({**base, "skip_frames": 20}))


def test_frames_are_repaired_with_a_warning(base: dict[str, Any]) -> None:
    plan = planned(base)
    assert (plan.driving_frames, plan.num_frames, plan.output_frames) == (20, 17, 17)
    assert plan.warnings == ("20 frames lowered to 17: the model makes 4n+1",)
    assert planned(base, num_frames=17, tile_height=512).warnings[0].startswith("'tile_height'")


def test_a_loop_has_three_frames_more(base: dict[str, Any]) -> None:
    loop = {"context_schedule": "uniform_looped"}
    assert planned(base, num_frames=97, **loop).output_frames == 100
    assert planned(base, num_frames=33, **loop).output_frames == 33


def test_keeping_the_aspect_changes_the_size(base: dict[str, Any]) -> None:
    # 60 x 90 inside 416 x 672 is 416 x 624, floored to multiples of 32.
    plan = planned(base, image_fit="resize")
    assert (plan.width, plan.height) == (416, 608)
    assert (planned(base).width, planned(base).height) == (416, 672)


def test_files_present_and_missing(base: dict[str, Any], tmp_path: Path) -> None:
    entries = [e for e in files_for("scail", "fp8") if e.component != "lora"]
    (tmp_path / entries[0].names[0]).write_bytes(b"12345")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "mine.safetensors").write_bytes(b"123")
    job = make_job({**base, "loras": [I2V_LORA, "mine.safetensors", "absent"]})
    files = make_plan(job, search_dirs=[tmp_path]).files
    assert [f.component for f in files] == [e.component for e in entries] + ["lora"] * 3
    assert (files[0].path, files[0].size_bytes) == (tmp_path / entries[0].names[0], 5)
    assert all(f.path is None for f in files[1:-2])
    assert (files[-2].path, files[-2].size_bytes) == (tmp_path / "loras" / "mine.safetensors", 3)
    assert (files[-1].name, files[-1].path) == ("absent", None)
    assert planned(base, preset="tiny").files == ()


def test_lora_by_path(base: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"1234")
    (file,) = planned(base, preset="tiny", loras=[str(path)]).files
    assert (file.path, file.size_bytes) == (path, 4)


def test_damaged_media_are_refused(base: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"no media")
    with pytest.raises(MediaError):
        planned(base, image=bad)
    with pytest.raises(MediaError):
        planned(base, pose_video=bad)
    with pytest.raises(MediaError):
        planned(base, pose_video=None, track=bad)


def test_text_and_json(base: dict[str, Any]) -> None:
    plan = planned(base, num_frames=97, sheet=True, seed=5)
    text = format_plan(plan)
    for part in (
        "pipeline   scail, preset fp8, profile fast",
        "416x672, 97 frames at 16 fps",
        "dpm++_sde, 6 steps, shift 5, guidance 1, seed 5",
        "13 forward passes of at most 29,757 tokens",
        "MISSING  Wan21-14B-SCAIL-preview_fp8_e4m3fn_scaled_KJ.safetensors",
        "out.png",
        "warning    the pose has 20 frames, 97 are asked for: its last frame repeated",
    ):
        assert part in text
    # Steps 0 to 3 have two windows and the pose; 4 has three windows, 5 two, both without.
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["0-3", "4", "5"]
    stored = json.loads(json.dumps(asdict(plan), default=str))
    assert stored["settings"]["seed"] == 5
    assert len(stored["steps"]) == 6


def test_tiny_text(base: dict[str, Any]) -> None:
    text = format_plan(planned(base, preset="tiny"))
    assert "files      none needed" in text
    assert "seed random" in text


def test_every_attribute_of_job_is_in_the_settings(base: dict[str, Any]) -> None:
    table = {field.name for field in FIELDS}
    assert {name for name in Job.__dataclass_fields__ if name != "warnings"} == table
    assert set(planned(base).settings) == {f.name for f in FIELDS if f.used_by("scail")}
