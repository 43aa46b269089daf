"""From a request to a `Job`: every field counts, and what is done otherwise is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.requests import FLAT, IMAGE, LEAST, LORAS, NESTED, VIDEO, parse, scail
from xicon_infer.job import Job, make_job
from xicon_infer.job_field import PIPELINES as JOB_PIPELINES
from xicon_infer.job_fields import FIELDS
from xicon_infer.job_profiles import DISTILL_LORAS, I2V_LORA, PRESETS
from xicon_infer.request import Request, to_job_values
from xicon_infer.request_field import PIPELINES
from xicon_infer.request_fields import OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.request_job import choose_kernel
from xicon_infer.settings_table import MODES, PRESET_NAMES

OUTPUT = Path("out.mp4")


def job_of(request: Request, **more: Any) -> Job:
    files = {role: Path(f"{role}.file") for role in request.media}
    return make_job(to_job_values(request, files, OUTPUT, **more), source="request")


def adapted(request: Request) -> list[tuple[str, str | None]]:
    return [(warning.code, warning.field) for warning in request.adaptations]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("profile", ["fast", "quality"])
def test_the_least_request_of_every_mode_is_a_job_without_warnings(mode, profile):
    request = parse({**LEAST[mode], "profile": profile})
    job = job_of(request)
    assert job.pipeline == PIPELINES[mode]
    assert job.warnings == ()
    told = [] if mode != "pose_only" or profile == "fast" else [("UNUSED_FIELD", "profile")]
    assert adapted(request) == told
    if mode != "pose_only":
        found = request.resolved
        steps = (job.num_inference_steps, job.guidance_scale, job.shift, job.scheduler)
        assert steps == (found["steps"], found["cfg"], 5.0, "dpm++_sde")
        assert job.negative_prompt == found["negative_prompt"]


# Field -> another value than the default, and what must come with it.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "image": ("https://cdn.example.com/other.png", {}),
    "video": ("https://cdn.example.com/other.mp4", {}),
    "pose_video": (VIDEO, {}),
    "prompt": ("q", {}),
    "negative_prompt": ("n", {}),
    "width": (256, {}),
    "height": (256, {}),
    "num_frames": (33, {}),
    "max_frames": (33, {}),
    "skip_frames": (3, {}),
    "select_every_nth": (3, {}),
    "fps": (24, {}),
    "profile": ("quality", {}),
    "steps": (9, {}),
    "cfg": (4.5, {}),
    "shift": (7, {}),
    "scheduler": ("unipc", {}),
    "seed": (5, {}),
    "pose_strength": (2, {}),
    "pose_start": (0.25, {}),
    "pose_end": (0.75, {}),
    "ref_strength": (2, {}),
    "draw_face": (False, {}),
    "draw_hands": (False, {}),
    "condition_guide_scale": (2, {}),
    "st_cond_cfg": (0.25, {}),
    "end_cond_cfg": (0.75, {}),
    "context_frames": (49, {}),
    "context_overlap": (24, {}),
    "context_stride": (2, {}),
    "context_schedule": ("static_standard", {}),
    "freenoise": (False, {}),
    "fuse_method": ("pyramid", {}),
    "image_resize": ("pad", {}),
    "video_resize": ("crop", {}),
    "loras": ([{"name": LORAS[0], "strength": 0.5}], {}),
    "blocks_to_swap": (12, {}),
    "vae_tiling": (True, {}),
}
WITH_A_SHELL = {"api_version", "mode", "size", "attention_mode", "output", "dry_run", "strict"} | {
    "timeout_s",
    "metadata",
    "response_format",
}


def test_every_field_of_a_job_is_tried():
    assert set(OTHERS) | WITH_A_SHELL == {field.name for field in REQUEST_FIELDS}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHERS)
def test_every_field_reaches_the_job_or_is_told(name, mode):
    value, companions = OTHERS[name]
    base = {**LEAST[mode], **companions}
    before, after = parse(base), parse({**base, name: value})
    used = next(field for field in REQUEST_FIELDS if field.name == name).used_by(mode)
    if name in ("image", "video"):
        assert (before.media != after.media) == used
        return
    if name == "pose_video":
        assert bool(after.media.get(name)) == used
        assert used or [warning.code for warning in after.warnings] == ["UNUSED_FIELD"]
        return
    assert before.resolved[name] != after.resolved[name]
    if used:
        changed = {
            o.name
            for o in FIELDS
            if getattr(job_of(before), o.name) != getattr(job_of(after), o.name)
        }
        assert changed, name
        assert adapted(after) == []
    else:
        assert job_of(before) == job_of(after)
        assert adapted(after) == [("UNUSED_FIELD", name)]


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("crf", 30, "crf"),
        ("audio", "none", "audio"),
        ("return_pose_video", True, "pose_preview"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_output_fields_reach_the_job_or_are_told(mode, name, value, option):
    before = parse(LEAST[mode])
    after = parse({**LEAST[mode], "output": {name: value}})
    used = next(field for field in OUTPUT_FIELDS if field.name == name).used_by(mode)
    assert (getattr(job_of(before), option) != getattr(job_of(after), option)) == used
    assert adapted(after) == ([] if used else [("UNUSED_FIELD", f"output.{name}")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_first_frame", True),
        ("return", "base64"),
        ("filename_prefix", "mine"),
        ("url_expires_s", 3600),
        ("upload_url", "https://example.com/put?sig=1"),
        ("oversize", "fail"),
    ],
)
def test_output_fields_for_the_delivery(name, value):
    assert parse(scail()).output[name] != value
    assert parse(scail(output={name: value})).output[name] == value


def test_fields_for_the_worker():
    request = parse(
        scail(dry_run=True, timeout_s=60, metadata={"a": [1]}, response_format="legacy_video")
    )
    assert request.dry_run
    assert (request.timeout_s, request.metadata) == (60, {"a": [1]})
    assert request.response_format == "legacy_video"


def test_values_that_cannot_be_computed_are_raised():
    request = parse(scail(shift=0, context_overlap=0, context_frames=17))
    assert (request.resolved["shift"], request.resolved["context_overlap"]) == (0, 0)
    job = job_of(request)
    assert (job.shift, job.context_overlap) == (0.01, 4)
    assert adapted(request) == [("VALUE_ADAPTED", "shift"), ("VALUE_ADAPTED", "context_overlap")]
    assert adapted(parse(scail(shift=0.01, context_overlap=4))) == []


def test_a_pose_video_needs_no_drawing_and_has_nothing_to_guide_away_from():
    fields = {"mode": "steady_dancer", "image": IMAGE, "pose_video": VIDEO}
    plain = parse(fields)
    assert job_of(plain).condition_guide_scale == 0
    off = ("VALUE_ADAPTED", "condition_guide_scale")
    assert (job_of(plain).warnings, adapted(plain)) == ((), [off])
    assert adapted(parse({**fields, "condition_guide_scale": 0})) == []
    asked = parse({**fields, "condition_guide_scale": 2, "draw_face": False})
    assert job_of(asked).condition_guide_scale == 0
    told = [("UNUSED_FIELD", "draw_face"), off]
    assert adapted(asked) == told


@pytest.mark.parametrize(
    ("value", "drawn", "rendered"),
    [
        ("crop", "crop", "crop"),
        ("resize", "pad", "pad"),
        ("pad", "pad", "pad"),
        ("stretch", "pad", "stretch"),
    ],
)
def test_video_resize(value, drawn, rendered):
    request = parse(scail(video_resize=value))
    assert job_of(request).pose_fit == drawn
    assert bool(adapted(request)) == (value == "stretch")
    assert job_of(parse(scail(video_resize=value, pose_video=VIDEO))).pose_fit == rendered


def test_loras():
    mine, other = ({"name": name, "strength": 0.5} for name in LORAS[:2])

    def names(**fields: Any) -> list[str]:
        env = fields.pop("env", {})
        return [
            lora.name for lora in job_of(parse(scail(**fields), env, loras=(*LORAS, *more))).loras
        ]

    more = [I2V_LORA, "my_Distill.safetensors"]
    assert names() == names(loras=[]) == [I2V_LORA]
    assert names(loras=[mine, other]) == [I2V_LORA, *LORAS[:2]]
    assert names(loras=[mine], profile="quality") == [LORAS[0]]
    assert names(profile="quality") == []
    assert names(loras=[{"name": I2V_LORA}, mine]) == [I2V_LORA, LORAS[0]]
    assert names(loras=[{"name": more[1]}]) == [more[1]]
    assert names(loras=[mine] * 4) == [LORAS[0]] * 4
    assert adapted(parse(scail(loras=[mine] * 4))) == [("VALUE_ADAPTED", "loras")]
    assert adapted(parse(scail(loras=[mine] * 4, profile="quality"))) == []
    assert names(loras=[mine], env={"XICON_PRESET": "tiny"}) == [LORAS[0]]
    assert names(env={"XICON_PRESET": "tiny"}) == []


def test_attention_is_a_wish():
    every = ("flash2", "cudnn", "flash", "math", "xformers")
    assert choose_kernel("auto", every) == ("auto", None)
    assert choose_kernel("flash", every) == ("flash2", None)
    assert choose_kernel("flash", ("flash",)) == ("flash", None)
    assert choose_kernel("xformers", every) == ("xformers", None)
    assert choose_kernel("sdpa", every) == ("cudnn", None)
    for policy in ("auto8", "ordered"):
        assert choose_kernel(policy, every) == (policy, None)
        assert job_of(parse(scail(attention_mode=policy))).attention == policy
    for eight_bit in ("sage", "int8"):
        assert choose_kernel("sage", (*every, eight_bit)) == ("auto8", None)
    for mode, kernels in (("sage", every), ("xformers", ("math",)), ("sdpa", None)):
        kernel, warning = choose_kernel(mode, kernels)
        assert kernel == "auto"
        assert warning is not None
        assert warning.code == "ATTENTION_FALLBACK"
    assert parse(scail(attention_mode="sageattn")).resolved["attention_mode"] == "sage"
    assert job_of(parse(scail(attention_mode="sdpa")), kernels=("math",)).attention == "math"
    assert job_of(parse(scail(attention_mode="sage")), kernels=every).attention == "auto"


@pytest.mark.parametrize(
    ("blocks", "memory", "plan"),
    [
        ("auto", "auto", ("auto", "auto")),
        ("auto", "full", ("resident", "auto")),
        ("auto", "balanced", ("offload", "auto")),
        ("auto", "low", ("stream", "auto")),
        (0, "auto", ("resident", "auto")),
        (0, "low", ("stream", "auto")),
        (9, "auto", ("stream", 9)),
        (9, "full", ("stream", 9)),
    ],
)
def test_memory(blocks, memory, plan):
    job = job_of(parse(scail(blocks_to_swap=blocks), {"XICON_MEMORY": memory}))
    assert (job.memory, job.blocks_to_swap) == plan


def test_most_frames():
    few = {"XICON_MAX_FRAMES": "49"}
    assert job_of(parse(scail())).max_frames == 0
    assert job_of(parse(scail(max_frames=1000))).max_frames == 1000
    assert job_of(parse(scail(), few)).max_frames == 49
    assert job_of(parse(scail(max_frames=30), few)).max_frames == 30
    request = parse(scail(max_frames=60), few)
    assert job_of(request).max_frames == 49
    assert adapted(request) == [("VALUE_ADAPTED", "max_frames")]
    assert job_of(parse(NESTED)).max_frames == 100
    assert job_of(parse(FLAT)).fps == 24.0


def test_presets_of_the_worker():
    for preset in PRESET_NAMES:
        for mode in MODES:
            request = parse(LEAST[mode], {"XICON_PRESET": preset})
            values = to_job_values(request, dict.fromkeys(request.media, OUTPUT), OUTPUT)
            known = preset in PRESETS.get(PIPELINES[mode], ())
            assert values.get("preset") == (preset if known else None)
    steady = parse(LEAST["steady_dancer"], {"XICON_STEADY_DANCER_VARIANT": "fp16"})
    assert job_of(steady).preset == "bf16"


def test_tables_fit_together():
    assert set(PIPELINES.values()) == set(JOB_PIPELINES)
    every = {name for names in PRESETS.values() for name in names}
    # A request has no last picture, which these need.
    assert set(PRESET_NAMES) == every - {"flf2v-fp8", "flf2v-bf16"}
    options = {option.name: option for option in FIELDS}
    for field in (*REQUEST_FIELDS, *OUTPUT_FIELDS):
        if not field.option or field.kind not in ("integer", "number", "choice"):
            continue
        option = options[field.option]
        used = {PIPELINES[mode] for mode in MODES if field.used_by(mode)}
        assert used <= set(option.pipelines or JOB_PIPELINES), field.name
        if field.kind in ("integer", "number") and field.name not in ("shift", "context_overlap"):
            assert (field.low, field.high) == (option.low, option.high), field.name
    assert set(DISTILL_LORAS) == {PIPELINES[mode] for mode in MODES} - {"pose"}


def test_a_worker_of_the_small_model_samples_as_it_was_trained() -> None:
    fields = {"mode": "wan_t2v", "prompt": "a fox"}
    env = {"XICON_PRESET": "1.3b", "XICON_MODES": "wan_t2v"}
    small = parse(fields, env)
    assert (small.resolved["profile"], small.resolved["steps"], small.resolved["cfg"]) == (
        "quality",
        50,
        5.0,
    )
    assert parse({**fields, "profile": "fast"}, env).resolved["profile"] == "fast"
    assert parse(fields).resolved["profile"] == "fast"
