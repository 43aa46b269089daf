"""The table of options and the rules between them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.job_examples import LEAST, companions, least_for
from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, Lora, make_job, resolve_frames
from xicon_infer.job_field import PIPELINES, Field
from xicon_infer.job_fields import DEFAULT_PROMPT, FIELDS, GROUPS
from xicon_infer.job_profiles import (
    DEFAULT_NEGATIVE_PROMPT,
    I2V_LORA,
    PRESET_QUALITY,
    PRESETS,
    PROFILES,
    T2V_LORA,
)

BASE: dict[str, Any] = {"image": "ref.png", "track": "dance.npz"}
TABLE = {field.name: field for field in FIELDS}
RANGED = [field for field in FIELDS if field.kind in ("integer", "number")]
CHOICES = [field for field in FIELDS if field.kind == "choice"]


def job_with(**values: Any) -> Job:
    return make_job({**BASE, **values})


def refused(**values: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        job_with(**values)
    return caught.value


def test_defaults_of_the_published_graph() -> None:
    job = job_with()
    assert (job.width, job.height, job.num_frames) == (512, 896, None)
    assert (job.scheduler, job.num_inference_steps, job.shift) == ("dpm++_sde", 6, 5.0)
    assert (job.guidance_scale, job.guided, job.seed) == (1.0, False, -1)
    assert (job.pose_start, job.pose_end, job.ref_start, job.ref_end) == (0.0, 0.5, 0.0, 1.0)
    context = (job.context_schedule, job.context_frames, job.context_stride, job.context_overlap)
    assert context == ("uniform_standard", 81, 4, 16)
    assert (job.prompt, job.negative_prompt) == (DEFAULT_PROMPT, DEFAULT_NEGATIVE_PROMPT)
    assert (job.fps, job.crf, job.audio) == ("source", 19, "source")
    assert job.loras == (Lora(I2V_LORA, 1.0),)
    assert job.warnings == ()


def test_negative_prompt_is_that_of_the_request_contract() -> None:
    # Of `standard_negative_prompt` in golden/serving/cases.json.
    digest = hashlib.sha256(DEFAULT_NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_quality_profile_follows_the_authors_and_yields_to_given_values() -> None:
    job = job_with(profile="quality")
    assert (job.scheduler, job.num_inference_steps) == ("euler/official", 50)
    assert (job.shift, job.guidance_scale, job.guided) == (5.0, 4.0, True)
    assert (job.loras, job.pose_end, job.negative_prompt) == ((), 1.0, "")
    assert job_with(profile="quality", num_inference_steps=7).num_inference_steps == 7


def test_distill_lora_is_a_default_of_real_weights_only() -> None:
    assert job_with(preset="tiny").loras == ()
    assert job_with(preset="bf16").loras == (Lora(I2V_LORA),)
    assert job_with(loras=["none"]).loras == ()
    assert job_with(loras=[]).loras == ()


def test_table_and_job_have_the_same_options() -> None:
    attributes = {field.name for field in dataclasses.fields(Job)} - {"warnings"}
    assert attributes == set(TABLE)
    assert len(TABLE) == len(FIELDS)
    assert {field.group for field in FIELDS} == set(GROUPS)
    changed = [values for profile in PROFILES.values() for values in profile.values()]
    for values in (*changed, *PRESET_QUALITY.values()):
        assert set(values) <= set(TABLE)
    flags = [flag for field in FIELDS for flag in field.flags]
    assert len(flags) == len(set(flags))
    assert all(field.help for field in FIELDS)


def test_attention_choices_are_the_kernels_there_are() -> None:
    from xicon_infer.ops.attention import BACKENDS, POLICIES

    assert TABLE["attention"].choices == (*POLICIES, *BACKENDS)


@pytest.mark.parametrize("field", RANGED, ids=lambda f: f.name)
def test_both_ends_of_a_range_are_allowed_and_nothing_beyond(field: Field) -> None:
    base = least_for(field)
    step = field.multiple_for(base["pipeline"])
    for value in (field.low, field.high):
        allowed = value if field.kind == "number" else int(value)
        job = make_job({**base, **companions(field.name, allowed), field.name: allowed})
        assert getattr(job, field.name) == allowed
    for value in (field.low - step, field.high + step):
        outside = value if field.kind == "number" else int(value)
        if outside in field.also:
            continue
        with pytest.raises(InvalidRequest) as caught:
            make_job({**base, **companions(field.name, outside), field.name: outside})
        assert (caught.value.code, caught.value.field) == ("OUT_OF_RANGE", field.name)


@pytest.mark.parametrize("field", CHOICES, ids=lambda f: f.name)
def test_every_choice_is_accepted_and_others_are_listed(field: Field) -> None:
    base = least_for(field)
    for choice in field.choices:
        values = {**base, **companions(field.name, choice), field.name: choice}
        if field.name == "pipeline":
            values = {"pipeline": choice, **LEAST[str(choice)]}
        if field.name == "preset":
            values = preset_job(str(choice))
        if field.name.endswith("align"):
            values |= {"track": None, "video": "dance.mp4"}
        assert getattr(make_job(values), field.name) == choice
    with pytest.raises(InvalidRequest) as caught:
        make_job({**base, field.name: "nothing"})
    assert all(str(choice) in caught.value.message for choice in field.choices)


def preset_job(preset: str) -> dict[str, Any]:
    name = next(name for name, names in PRESETS.items() if preset in names)
    both = {"end_image": "end.png"} if preset.startswith("flf2v") else {}
    return {"pipeline": name, **LEAST[name], **both, "preset": preset}


def test_a_preset_of_another_pipeline_is_refused() -> None:
    error = refused(preset="1.3b")
    assert (error.code, error.field) == ("INVALID_CHOICE", "preset")
    assert "with pipeline scail" in error.message


def test_first_and_last_picture_need_their_weights() -> None:
    i2v = {"pipeline": "wan_i2v", "image": "a.png"}
    with pytest.raises(InvalidRequest, match="Missing 'end_image'"):
        make_job({**i2v, "preset": "flf2v-bf16"})
    with pytest.raises(InvalidRequest, match="needs --preset flf2v-fp8 or flf2v-bf16"):
        make_job({**i2v, "end_image": "b.png"})
    both = make_job({**i2v, "end_image": "b.png", "preset": "flf2v-bf16", "profile": "quality"})
    assert (both.shift, both.guidance_scale, both.num_inference_steps) == (16.0, 5.5, 50)


def test_what_the_other_pipelines_default_to() -> None:
    dancer = make_job({"pipeline": "steady_dancer", **LEAST["steady_dancer"]})
    assert (dancer.width, dancer.height, dancer.fps) == (480, 832, 16.0)
    assert (dancer.num_inference_steps, dancer.scheduler) == (4, "dpm++_sde")
    assert (dancer.condition_guide_scale, dancer.pose_end, dancer.draw_face) == (0.0, 1.0, False)
    assert dancer.loras == (Lora(I2V_LORA),)
    image = make_job({"pipeline": "wan_i2v", **LEAST["wan_i2v"]})
    assert (image.width, image.height, image.num_frames, image.prompt) == (832, 480, 81, "")
    text = make_job({"pipeline": "wan_t2v", **LEAST["wan_t2v"]})
    assert text.loras == (Lora(T2V_LORA),)
    small = make_job({"pipeline": "wan_t2v", **LEAST["wan_t2v"], "preset": "1.3b"})
    assert small.loras == ()
    assert (small.profile, small.num_inference_steps, small.guidance_scale) == ("quality", 50, 6.0)
    fast = make_job({**small.settings(), "profile": "fast"})
    assert fast.profile == "fast"


@pytest.mark.parametrize(
    ("pipeline", "size", "shift"),
    [
        ("steady_dancer", (480, 832), 3.0),
        ("steady_dancer", (576, 1024), 5.0),
        ("wan_i2v", (832, 480), 3.0),
        ("wan_i2v", (1280, 720), 5.0),
        ("wan_t2v", (832, 480), 5.0),
    ],
)
def test_quality_shifts_by_size(pipeline: str, size: tuple[int, int], shift: float) -> None:
    values = {"pipeline": pipeline, **LEAST[pipeline], "width": size[0], "height": size[1]}
    assert make_job({**values, "profile": "quality"}).shift == shift
    assert make_job({**values, "profile": "quality", "shift": 7.0}).shift == 7.0
    assert make_job(values).shift == 5.0


def test_condition_guidance_needs_something_to_guide_away_from() -> None:
    given = {"pipeline": "steady_dancer", "image": "a.png", "pose_video": "p.mp4"}
    assert make_job({**given, "profile": "quality"}).condition_guide_scale == 0.0
    with pytest.raises(InvalidRequest, match="needs --negative-pose"):
        make_job({**given, "condition_guide_scale": 1.0})
    both = make_job({**given, "negative_pose": "n", "profile": "quality"})
    assert both.condition_guide_scale == 1.0
    with pytest.raises(InvalidRequest, match="needs --pose-video"):
        make_job({**given, "pose_video": None, "track": "t.npz", "negative_pose": "n"})


def test_a_text_video_needs_a_text_and_a_rate() -> None:
    with pytest.raises(InvalidRequest, match="Missing 'prompt'"):
        make_job({"pipeline": "wan_t2v"})
    with pytest.raises(InvalidRequest, match="nothing drives it"):
        make_job({"pipeline": "wan_t2v", "prompt": "a fox", "fps": "source"})


@pytest.mark.parametrize("name", ["steady-dancer", "wan", "Pose", "SCAIL"])
def test_a_pipeline_that_does_not_exist_is_refused_plainly(name: str) -> None:
    error = refused(pipeline=name)
    assert error.exit_code == 2
    assert error.message == (
        f"'pipeline' must be one of scail, steady_dancer, wan_i2v, wan_t2v, pose, got \"{name}\""
    )


def test_unknown_option_names_the_nearest() -> None:
    error = refused(widht=512)
    assert (error.code, error.field) == ("UNKNOWN_FIELD", "widht")
    assert error.message == "Unknown field 'widht'; did you mean 'width'?"
    assert refused(zzzzzz=1).message == "Unknown field 'zzzzzz'"


def test_an_option_of_another_pipeline_is_refused_not_ignored() -> None:
    fields = tuple(replace(f, pipelines=("other",)) if f.name == "draw_face" else f for f in FIELDS)
    assert make_job(BASE, fields=fields).draw_face is True
    with pytest.raises(InvalidRequest, match="'draw_face' is not used by pipeline scail") as caught:
        make_job({**BASE, "draw_face": True}, fields=fields)
    assert caught.value.code == "UNUSED_FIELD"


def test_defaults_may_differ_by_pipeline() -> None:
    field = Field("n", "integer", "size", "number", {"scail": 1, "other": 2}, 0, 9)
    assert (field.default_for("scail"), field.default_for("other")) == (1, 2)
    field = replace(field, pipelines=("scail", "pose"), default={"scail": 1, "pose": 2})
    assert field.default_text == "scail 1; pose 2"
    assert replace(field, default={"scail": 3, "pose": 3}).default_text == "3"
    assert TABLE["num_inference_steps"].default_text == (
        "scail 6; steady_dancer/wan_i2v/wan_t2v 4; quality: scail/wan_t2v 50; "
        "quality: steady_dancer/wan_i2v 40"
    )


def test_none_means_left_out() -> None:
    assert make_job({**BASE, "width": None, "seed": None, "nothing": None}) == make_job(BASE)


@pytest.mark.parametrize("name", ["width", "height"])
def test_a_size_between_multiples_of_32(name: str) -> None:
    assert refused(**{name: 500}).message == (
        f"'{name}' must be a multiple of 32, got 500: use 480 or 512"
    )
    job = make_job({**BASE, name: 500}, source="request")
    assert getattr(job, name) == 480
    assert job.warnings == (f"'{name}' 500 lowered to 480: a multiple is needed",)


def test_who_asks_decides_the_default_rate() -> None:
    assert make_job(BASE, source="request").fps == 16.0
    assert make_job({**BASE, "fps": "source"}, source="request").fps == "source"


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({"image": None}, "image", "Missing 'image'"),
        ({"track": None}, "video", "--pose-video (a rendered pose) or --track"),
        ({"pose_video": "p.mp4"}, "track", "not both"),
        ({"output": "a.avi"}, "output", "must end in .mp4"),
        ({"output": " "}, "output", "not empty"),
        ({"image": "a\0b"}, "image", "not empty"),
        ({"image": "\ud800.png"}, "image", "character 0 cannot be in one"),
        ({"width": 1920, "height": 1088}, "width", "Resolution 1920x1088 exceeds the limit"),
        ({"context_frames": 20, "context_overlap": 20}, "context_overlap", "must be smaller"),
        ({"pose_start": 0.6}, "pose_start", "got 0.6 and 0.5"),
        ({"ref_start": 0.5, "ref_end": 0.4}, "ref_start", "must not be larger"),
        ({"tile_height": 144}, "tile_stride_height", "smaller than 'tile_height' (144), got 144"),
        ({"tile_width": 100}, "tile_width", "multiple of 8, got 100: use 96 or 104"),
        ({"pose_fit": "stretch"}, "pose_fit", "crop, pad for a track"),
        ({"prompt": "x" * 4001}, "prompt", "at most 4000 characters, got 4001"),
        ({"prompt": "\udcff"}, "prompt", "valid UTF-8"),
        ({"loras": [f"l{i}" for i in range(5)]}, "loras", "at most 4 entries, got 5"),
        ({"loras": ["a:4.5"]}, "loras.strength", "between -4 and 4, got 4.5"),
        ({"loras": ["a:x"]}, "loras.strength", "must be a number"),
        ({"loras": ["none", "a"]}, "loras", "'none' stands alone"),
        ({"loras": [":1"]}, "loras", "must name a LoRA file"),
        ({"loras": [{"name": "a", "weight": 1}]}, "loras", "NAME[:strength] or {name, strength}"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], field: str, part: str) -> None:
    error = refused(**values)
    assert error.field == field
    assert part in error.message


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"tile_height": 512}, "tile_height"),
        ({"negative_prompt": "blurry"}, "negative_prompt"),
        ({"uncond_reference": "zero"}, "uncond_reference"),
        ({"track": None, "pose_video": "p.mp4", "draw_hands": False}, "draw_hands"),
        ({"track": None, "pose_video": "p.mp4", "pose_render": "half"}, "pose_render"),
        ({"loras": ["none"], "lora_mode": "merge"}, "lora_mode"),
        ({"video": "v.mp4", "audio": "none", "fps": 16}, "video"),
    ],
)
def test_an_option_without_effect_is_told(values: dict[str, Any], name: str) -> None:
    (warning,) = job_with(**values).warnings
    assert warning.startswith(f"'{name}' has no effect ")


def test_an_option_with_effect_gives_no_warning() -> None:
    assert job_with(tile=True, tile_height=512, draw_face=False, video="v.mp4").warnings == ()
    assert job_with(guidance_scale=2.0, negative_prompt="blurry").warnings == ()


def test_settings_are_json_and_rebuild_the_job() -> None:
    job = job_with(
        loras=["a:0.5"], guidance_scale=3.5, fps=23.976, seed=2**64 - 1, models_dir="/w", tile=True
    )
    stored = json.loads(json.dumps(job.settings()))
    assert set(stored) == {field.name for field in FIELDS if field.used_by("scail")}
    assert make_job(stored) == job
    assert make_job(stored).settings() == job.settings()


SIMPLE = st.fixed_dictionaries(
    {},
    optional={
        "width": st.integers(4, 30).map(lambda n: 32 * n),
        "seed": st.integers(-1, 2**64 - 1),
        "shift": st.floats(0.01, 100),
        "prompt": st.text(max_size=50),
        "profile": st.sampled_from(list(PROFILES)),
        "preset": st.sampled_from(["tiny", "fp8", "bf16"]),
        "fps": st.one_of(st.just("source"), st.floats(1, 60), st.integers(1, 60)),
        "loras": st.lists(st.sampled_from(["a", "b:0.5", "c/d.safetensors:-4"]), max_size=4),
        "freenoise": st.booleans(),
    },
)


@settings(max_examples=60, deadline=None)
@given(SIMPLE)
def test_any_accepted_job_round_trips(values: dict[str, Any]) -> None:
    job = job_with(**values)
    assert make_job(json.loads(json.dumps(job.settings()))) == job
    assert make_job(job.settings(), source="request") == job


def test_only_pipelines_that_exist_are_in_the_table() -> None:
    from pipelines import NAMES

    assert (*NAMES, "pose") == PIPELINES
    assert tuple(PRESETS) == NAMES


@pytest.mark.parametrize(
    ("available", "requested", "expected", "warnings"),
    [
        (97, None, 97, 0),
        (100, None, 97, 1),
        (100, 81, 81, 1),
        (100, 83, 81, 2),
        (50, 81, 81, 1),
        (1, None, 1, 0),
        (3, None, 1, 1),
        (600, None, 481, 1),
        (81, 81, 81, 0),
    ],
)
def test_frames(available: int, requested: int | None, expected: int, warnings: int) -> None:
    frames, told = resolve_frames(available, requested)
    assert (frames, len(told)) == (expected, warnings)


@given(st.integers(1, 2000), st.none() | st.integers(1, 481))
def test_frames_are_4n_plus_1_and_never_more_than_wanted(
    available: int, requested: int | None
) -> None:
    frames, warnings = resolve_frames(available, requested)
    wanted = available if requested is None else requested
    assert frames % 4 == 1
    assert wanted - 3 <= frames <= wanted or frames == 481 < wanted
    assert bool(warnings) == (frames != available or frames != wanted)


@pytest.mark.parametrize(("available", "requested"), [(0, None), (5, 0), (-1, 5)])
def test_no_frames_is_refused(available: int, requested: int | None) -> None:
    with pytest.raises(InvalidRequest, match="at least 1"):
        resolve_frames(available, requested)
