"""Requests: the cases of the contract, forms, defaults, precedence and the order of checks."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from tests.serving.__main__ import main, read_cases
from tests.serving.replay import replay
from tests.serving.requests import (
    FLAT,
    IMAGE,
    LEAST,
    NESTED,
    VIDEO,
    codes,
    parse,
    refused,
    said,
    scail,
)
from xicon_infer.job_profiles import DEFAULT_NEGATIVE_PROMPT
from xicon_infer.request import Media
from xicon_infer.request_fields import REQUEST_FIELDS
from xicon_infer.settings_table import MODES

CASES = Path(__file__).parent / "golden" / "serving" / "cases.json"
FOUND = read_cases(CASES)


@pytest.mark.parametrize("case", FOUND, ids=[case["id"] for case in FOUND])
def test_case_of_the_contract(case):
    assert replay(case) == ""


def test_a_case_can_fail_in_every_way(tmp_path, capsys):
    good = next(case for case in FOUND if case["id"] == "nested-full")
    bad = next(case for case in FOUND if case["id"] == "nested-steps-0")
    changes = [
        (good, {"form": "native"}),
        (good, {"resolved": {"width": 448}}),
        (good, {"resolved": {"nothing": 1}}),
        (good, {"resolved": {"freenoise": 1}}),
        (good, {"warnings": ["COERCED_INT"]}),
        (good, {"outcome": "reject", "error": "no"}),
        (bad, {"error": "no [OUT_OF_RANGE]"}),
        (bad, {"error_code": "INVALID_NUMBER"}),
        (bad, {"field": "cfg"}),
        (bad, {"outcome": "accept"}),
    ]
    cases = [{**case, "expect": {**case["expect"], **change}} for case, change in changes]
    assert all(replay(case) for case in cases)
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"cases": [*cases[:2], good, {"id": "broken"}]}))
    assert main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[2:]] == [
        "nested-full ok",
        "broken FAIL KeyError",
        "1 ok  3 FAIL",
    ]
    assert main([]) == 2
    assert main([str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"action": "health", "mode": "scail"}, "action"),
        ({**NESTED, "mode": "scail"}, "native"),
        ({**NESTED, "api_version": 1}, "native"),
        ({"image": IMAGE, "video_url": VIDEO}, "native"),
        ({"image_url": IMAGE, "pose_video": VIDEO}, "native"),
        ({**NESTED, "image": None, "mode": None, "image_url": None}, "legacy_nested"),
        ({"image_base64": "AAAA", **FLAT}, "legacy_flat"),
        ({**NESTED, "video_path": ""}, "legacy_flat"),
        (NESTED, "legacy_nested"),
    ],
)
def test_form(fields, form):
    assert parse(fields).form == form


def test_forms_with_the_same_fields_are_the_same_request():
    same = {"fps": 16, "max_frames": 0, "width": 512, "height": 896, "prompt": "p"}
    requests = [parse({**fields, **same}) for fields in (NESTED, FLAT, LEAST["scail"])]
    assert requests[0].resolved == requests[1].resolved == requests[2].resolved
    assert requests[0].media == {"image": Media("url", IMAGE), "video": Media("url", VIDEO)}


@pytest.mark.parametrize(
    ("mode", "width", "height", "frames", "steps", "pose_end"),
    [
        ("scail", 512, 896, None, 6, 0.5),
        ("steady_dancer", 480, 832, None, 4, 1.0),
        ("wan_i2v", 832, 480, 81, 4, 1.0),
        ("wan_t2v", 832, 480, 81, 4, 1.0),
        ("pose_only", 512, 896, None, 4, 1.0),
    ],
)
def test_defaults_by_mode(mode, width, height, frames, steps, pose_end):
    found = parse(LEAST[mode]).resolved
    assert (found["width"], found["height"], found["num_frames"]) == (width, height, frames)
    assert (found["steps"], found["cfg"], found["pose_end"]) == (steps, 1.0, pose_end)
    quality = parse({**LEAST[mode], "profile": "quality"}).resolved
    assert (quality["steps"], quality["cfg"]) == (50 if mode == "wan_t2v" else 40, 5.0)
    common = {
        "fps": 16.0,
        "max_frames": 0,
        "shift": 5.0,
        "scheduler": "dpm++_sde",
        "seed": None,
        "negative_prompt": DEFAULT_NEGATIVE_PROMPT,
        "condition_guide_scale": 1.0,
        "context_overlap": 16,
        "loras": [],
        "timeout_s": 3300,
    }
    assert {name: found[name] for name in common} == common


def test_every_field_of_the_table_is_resolved():
    names = {field.name for field in REQUEST_FIELDS} - {"api_version", "size"}
    assert set(parse(LEAST["scail"]).resolved) == names


@pytest.mark.parametrize(
    ("spelling", "mode"),
    [
        ("SCAIL", "scail"),
        ("SteadyDancer", "steady_dancer"),
        ("steady-dancer", "steady_dancer"),
        ("I2V", "wan_i2v"),
        ("wan-t2v", "wan_t2v"),
        ("T2V", "wan_t2v"),
        ("Pose-Only", "pose_only"),
    ],
)
def test_spellings_of_modes(spelling, mode):
    assert parse({"image": IMAGE, "video": VIDEO, "prompt": "p", "mode": spelling}).mode == mode


@pytest.mark.parametrize(
    ("other", "name", "value"),
    [
        ("frame_num", "num_frames", 33),
        ("length", "num_frames", 33),
        ("frame_load_cap", "max_frames", 33),
        ("base_seed", "seed", 33),
        ("num_inference_steps", "steps", 33),
        ("sample_steps", "steps", 33),
        ("guidance_scale", "cfg", 3.5),
        ("sample_guide_scale", "cfg", 3.5),
        ("sample_shift", "shift", 3.5),
        ("sample_solver", "scheduler", "unipc"),
        ("frame_rate", "fps", 30.0),
        ("positive_prompt", "prompt", "q"),
    ],
)
@pytest.mark.parametrize("form", [LEAST["scail"], FLAT, NESTED], ids=["native", "flat", "nested"])
def test_other_spellings_mean_the_same_everywhere(form, other, name, value):
    fields = {key: content for key, content in form.items() if key != name}
    request = parse({**fields, other: value})
    assert (request.resolved[name], codes(request)) == (value, [])
    both = parse({**fields, other: value, name: LEAST_OTHER.get(name, 5)})
    assert both.resolved[name] == LEAST_OTHER.get(name, 5)
    assert parse({**fields, other: value, name: None}).resolved[name] == value


LEAST_OTHER = {"scheduler": "euler", "prompt": "main"}


def test_legacy_prompts():
    assert parse(FLAT).resolved["prompt"] == "the human starts to dance"
    assert parse({**FLAT, "prompt": ""}).resolved["prompt"] == ""
    assert parse({**FLAT, "negative_prompt": ""}).resolved["negative_prompt"] == ""
    assert parse({**NESTED, "negative_prompt": ""}).resolved["negative_prompt"].startswith("色")
    lenient = {"XICON_LEGACY_LENIENT": "true"}
    empty = parse({**NESTED, "prompt": ""}, lenient)
    assert empty.resolved["prompt"] == "the human starts to dance"
    assert parse({**LEAST["wan_i2v"]}).resolved["prompt"] == ""
    assert parse(scail(prompt="a\0b")).resolved["prompt"] == "ab"


def test_size():
    assert parse(scail(size="640X352")).resolved["width"] == 640
    request = parse(scail(size="broken", width=640))
    assert (request.resolved["width"], request.resolved["height"]) == (640, 896)
    assert codes(request) == ["PARAM_PRECEDENCE"]
    assert refused(scail(size="64x640")).field == "width"


def test_numbers_are_lowered():
    request = parse(scail(width=639.9, height="353", num_frames=84, fps=23.976))
    found = request.resolved
    assert (found["width"], found["height"], found["num_frames"]) == (608, 352, 81)
    assert found["fps"] == 23.976
    rounded = ["DIMENSION_ROUNDED", "DIMENSION_ROUNDED", "FRAMES_ROUNDED"]
    assert codes(request) == ["COERCED_INT", "COERCED_STRING", *rounded]
    assert parse({**LEAST["wan_t2v"]}, {"XICON_MAX_FRAMES": "50"}).resolved["num_frames"] == 49


def test_the_worker_sets_defaults_and_limits():
    steady = {
        "STEADYDANCER_GUIDE_SCALE": "4",
        "STEADYDANCER_CONDITION_GUIDE": "2",
        "STEADYDANCER_END_CFG": "0.7",
        "STEADYDANCER_SEED": "106060",
    }
    quality = {**LEAST["steady_dancer"], "profile": "quality"}
    found = parse(quality, steady).resolved
    names = ("cfg", "condition_guide_scale", "end_cond_cfg", "seed")
    assert [found[name] for name in names] == [4.0, 2.0, 0.7, 106060]
    for fields in (LEAST["steady_dancer"], scail(profile="quality")):
        assert parse(fields, steady).resolved == parse(fields).resolved
    assert parse(quality, {"STEADYDANCER_SEED": "-1"}).resolved["seed"] is None
    assert (
        parse(scail(), {"XICON_RESPONSE_FORMAT": "legacy_video"}).response_format == "legacy_video"
    )
    assert parse(scail(), {"XICON_ATTENTION": "sdpa"}).resolved["attention_mode"] == "sdpa"
    assert parse(scail(), {"XICON_JOB_TIMEOUT_S": "60"}).timeout_s == 60
    assert parse(scail(), {"BUCKET_URL_EXPIRES_S": "61"}).output["url_expires_s"] == 61
    assert parse(scail(), {"XICON_MEMORY": "low"}).memory == "low"
    assert parse(scail(), {"XICON_PRESET": "tiny"}).preset == "tiny"
    assert parse(LEAST["steady_dancer"]).preset == "fp8"


def test_other_ways_of_the_envelope():
    assert parse(None, event={"input": json.dumps(scail())}).mode == "scail"
    assert len({parse(scail(), event={"id": None}).id for _ in range(3)}) == 3
    assert parse(scail(), event={"id": "a\ud800" * 300}).id.startswith("a\\ud800a")
    assert len(parse(scail(), event={"id": "a" * 300}).id) == 256


def test_a_bucket_of_the_request_needs_permission():
    bucket = {
        "accessId": "key",
        "accessSecret": "hidden",
        "bucketName": "b",
        "endpointUrl": "https://s3.example.com",
    }
    assert parse(scail(), event={"s3Config": bucket}).s3 is None
    allowed = {"XICON_ALLOW_REQUEST_S3": "1"}
    request = parse(scail(), allowed, event={"s3Config": bucket})
    assert request.s3 == bucket
    assert "hidden" not in repr(request)
    private = {**bucket, "endpointUrl": "https://10.0.0.1"}
    assert said(scail(), allowed, event={"s3Config": private}).endswith("[URL_BLOCKED]")
    assert said(scail(), allowed, event={"s3Config": {}}).endswith("[MISSING_FIELD]")
    assert said(scail(), allowed, event={"s3Config": 1}).endswith("[INVALID_TYPE]")


# Each fault alone is refused; of two, the one that comes first here is named.
ORDER = [
    {"api_version": 2},
    {"mode": "x"},
    {"image": "x"},
    {"video": "ftp://x"},
    {"prompt": 1},
    {"negative_prompt": 1},
    {"size": "x"},
    {"width": 1},
    {"height": 1},
    {"num_frames": 0},
    {"fps": 0},
    {"profile": "x"},
    {"steps": 0},
    {"cfg": -1},
    {"seed": -2},
    {"shift": -1},
    {"max_frames": -1},
    {"skip_frames": -1},
    {"select_every_nth": 0},
    {"context_frames": 1},
    {"context_overlap": -1},
    {"scheduler": "x"},
    {"pose_strength": -1},
    {"pose_start": 2},
    {"pose_end": 2},
    {"ref_strength": -1},
    {"draw_face": 1},
    {"draw_hands": 1},
    {"condition_guide_scale": -1},
    {"st_cond_cfg": 2},
    {"end_cond_cfg": 2},
    {"context_stride": 0},
    {"context_schedule": "x"},
    {"freenoise": 1},
    {"fuse_method": "x"},
    {"image_resize": "x"},
    {"video_resize": "x"},
    {"attention_mode": "x"},
    {"blocks_to_swap": -1},
    {"vae_tiling": 1},
    {"output": 1},
    {"dry_run": 1},
    {"strict": 1},
    {"timeout_s": 0},
    {"metadata": 1},
    {"response_format": "x"},
    {"loras": 1},
]


def test_order_of_checks():
    assert len(ORDER) == len({name for fault in ORDER for name in fault})
    for first, second in itertools.pairwise(ORDER):
        (name,) = first
        if name == "size":  # counts only where neither width nor height is given
            assert refused({**LEAST["scail"], **first, "steps": 0}).field == name
            continue
        error = refused({**LEAST["scail"], **second, **first})
        assert error.field == name
        if name != "api_version":
            assert [other.field for other in error.errors] == list(second), second


def test_all_faults_are_found_at_once():
    fields = {name: value for fault in ORDER[4:] for name, value in fault.items()}
    del fields["size"]
    error = refused({**LEAST["scail"], **fields, "nonsense": 1}, {"XICON_STRICT_INPUT": "1"})
    assert [error.field, *(other.field for other in error.errors)] == [*fields, "nonsense"]


def test_order_of_what_belongs_together():
    large = scail(width=1920, height=1920, context_overlap=100, scheduler="x")
    error = refused(large)
    fields = [error.field, *(other.field for other in error.errors)]
    assert fields == ["width", "context_overlap", "scheduler"]
    nested = refused({"images": 1})
    assert [other.field for other in nested.errors] == ["videos", "prompt"]
    unavailable = refused(LEAST["wan_t2v"], {"XICON_MODES": "scail"})
    assert unavailable.code == "MODE_UNAVAILABLE"
    assert refused(scail(), modes=()).code == "MODE_UNAVAILABLE"


def test_it_is_fast():
    picture = "data:image/png;base64," + "A" * 10_000_000
    fields = scail(image=picture, **{f"x{number}": number for number in range(100_000)})
    start = time.perf_counter()
    request = parse(fields)
    assert time.perf_counter() - start < 1.0  # 0.1 s on an idle machine
    assert codes(request) == ["UNKNOWN_FIELD"] * 100
    start = time.perf_counter()
    for mode in MODES:
        parse(LEAST[mode])
    assert time.perf_counter() - start < 0.5
