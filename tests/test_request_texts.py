"""Every text of a refusal, and how values are read, as the contract has them."""

from __future__ import annotations

import json
import math

import pytest

from tests.serving.requests import (
    FLAT,
    IMAGE,
    LEAST,
    LORAS,
    NESTED,
    VIDEO,
    codes,
    parse,
    refused,
    said,
    scail,
)
from xicon_infer.request_fields import REQUEST_FIELDS
from xicon_infer.request_values import value_text
from xicon_infer.response_codes import CODES, WARNINGS


def without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


def loras(count):
    return [{"name": LORAS[0]}] * count


TEXTS = [
    (None, "Please provide input [INPUT_REQUIRED]"),
    ("null", "Please provide input [INPUT_REQUIRED]"),
    ('{"a": ', "Invalid JSON format in input [INVALID_JSON]"),
    ("", "Invalid JSON format in input [INVALID_JSON]"),
    ("[" * 100_000, "Invalid JSON format in input [INVALID_JSON]"),
    ("[1]", "'input' must be a JSON object [INVALID_TYPE]"),
    ('"{}"', "'input' must be a JSON object [INVALID_TYPE]"),
    (7, "'input' must be a JSON object [INVALID_TYPE]"),
    ({"action": "check_nodes"}, 'Unsupported action "check_nodes" [UNSUPPORTED_ACTION]'),
    ({"action": ["health"]}, 'Unsupported action ["health"] [UNSUPPORTED_ACTION]'),
    ({"action": ""}, 'Unsupported action "" [UNSUPPORTED_ACTION]'),
    (scail(api_version=2), "Unsupported api_version 2 [UNSUPPORTED_VERSION]"),
    (scail(api_version=True), "Unsupported api_version true [UNSUPPORTED_VERSION]"),
    (scail(api_version="v1"), 'Unsupported api_version "v1" [UNSUPPORTED_VERSION]'),
    (
        scail(mode=["scail"]),
        "'mode' must be one of scail, steady_dancer, wan_i2v, wan_t2v, pose_only, "
        'got ["scail"] [INVALID_CHOICE]',
    ),
    (
        scail(image_resize="fit"),
        "'image_resize' must be one of crop, resize, pad, stretch, got \"fit\" [INVALID_CHOICE]",
    ),
    (
        scail(attention_mode="fast"),
        "'attention_mode' must be one of auto, flash, xformers, sdpa, sage, auto8, ordered, got "
        '"fast" [INVALID_CHOICE]',
    ),
    (scail(profile=1), "'profile' must be one of fast, quality, got 1 [INVALID_CHOICE]"),
    ({}, "Missing 'images' parameter [MISSING_FIELD]"),
    ({**NESTED, "images": {}}, "Missing 'reference_image' in images [MISSING_FIELD]"),
    (without(NESTED, "videos"), "Missing 'videos' parameter [MISSING_FIELD]"),
    (without(NESTED, "prompt"), "Missing 'prompt' parameter [MISSING_FIELD]"),
    (without(LEAST["scail"], "image"), "Missing 'image' parameter [MISSING_FIELD]"),
    ({"mode": "t2v", "prompt": " "}, "Missing 'prompt' parameter [MISSING_FIELD]"),
    (
        {"video_url": VIDEO},
        "Image input is required. Provide image_path, image_url, or image_base64 [MISSING_FIELD]",
    ),
    ({**NESTED, "images": "x"}, "'images' must be an object [INVALID_TYPE]"),
    ({**NESTED, "videos": [1]}, "'videos' must be an object [INVALID_TYPE]"),
    ({**NESTED, "prompt": 5}, "'prompt' must be a string [INVALID_TYPE]"),
    (scail(prompt="\ud800"), "'prompt' must be valid Unicode text [INVALID_TYPE]"),
    (scail(freenoise="true"), "'freenoise' must be a boolean [INVALID_TYPE]"),
    (scail(vae_tiling="on"), "'vae_tiling' must be auto or a boolean [INVALID_TYPE]"),
    (scail(output=[]), "'output' must be an object [INVALID_TYPE]"),
    (scail(loras={}), "'loras' must be a list [INVALID_TYPE]"),
    (
        scail(loras=["a"]),
        "'loras' must be a list of objects with 'name' and 'strength' [INVALID_TYPE]",
    ),
    (scail(metadata={"a": math.nan}), "'metadata' must be plain JSON [INVALID_TYPE]"),
    (
        scail(image={"url": IMAGE, "path": "/x"}),
        "'image' must have exactly one of url, base64, path [INVALID_MEDIA]",
    ),
    (scail(image={}), "'image' must have exactly one of url, base64, path [INVALID_MEDIA]"),
    (scail(image=5), "'image' must be a string or an object [INVALID_MEDIA]"),
    (scail(image={"url": 5}), "'image' must be a string or an object [INVALID_MEDIA]"),
    (
        scail(image="ref.png"),
        "'image' must be a URL, a data URI or an object [INVALID_MEDIA]",
    ),
    (
        {**NESTED, "videos": {"dance_video": "AAAA"}},
        "'video' must be a URL, a data URI or an object [INVALID_MEDIA]",
    ),
    (scail(image="https://a b"), "URL for 'image' is malformed [URL_INVALID]"),
    (scail(image="https://"), "URL for 'image' has no host [URL_INVALID]"),
    (scail(image="https://a@b"), "URL for 'image' must not contain credentials [URL_INVALID]"),
    (scail(pose_video="FTP://a"), "Unsupported URL scheme 'ftp' for 'pose_video' [URL_SCHEME]"),
    (scail(video="http://a.com:22"), "URL port 22 is not allowed for 'video' [URL_BLOCKED]"),
    (scail(video="http://10.0.0.1"), "URL host is not allowed for 'video' [URL_BLOCKED]"),
    (
        scail(image="/etc/passwd"),
        "Path for 'image' is not under an allowed input directory [PATH_NOT_ALLOWED]",
    ),
    (
        without(LEAST["scail"], "video"),
        "No driving video: provide one or configure XICON_DEFAULT_VIDEO [DRIVING_VIDEO_REQUIRED]",
    ),
    (scail(steps=101), "'steps' must be between 1 and 100, got 101 [OUT_OF_RANGE]"),
    (scail(steps="0"), "'steps' must be between 1 and 100, got \"0\" [OUT_OF_RANGE]"),
    (scail(pose_end=1.5), "'pose_end' must be between 0 and 1, got 1.5 [OUT_OF_RANGE]"),
    (
        scail(seed=2**64),
        "'seed' must be -1 or between 0 and 18446744073709551615, got 18446744073709551616 "
        "[OUT_OF_RANGE]",
    ),
    (
        scail(prompt="x" * 4001),
        "'prompt' must be at most 4000 characters, got 4001 [OUT_OF_RANGE]",
    ),
    (scail(loras=loras(5)), "'loras' must have at most 4 entries, got 5 [OUT_OF_RANGE]"),
    (
        scail(loras=[{"name": LORAS[0], "strength": 5}]),
        "'loras.strength' must be between -4 and 4, got 5 [OUT_OF_RANGE]",
    ),
    (
        scail(context_frames=20, context_overlap=20),
        "'context_overlap' must be smaller than 'context_frames' [OUT_OF_RANGE]",
    ),
    (scail(pose_start=0.6), "'pose_start' must not be larger than 'pose_end' [OUT_OF_RANGE]"),
    (
        scail(metadata={"a": "x" * 4096}),
        "'metadata' must be at most 4096 bytes, got 4105 [OUT_OF_RANGE]",
    ),
    (scail(timeout_s=3301), "'timeout_s' must be between 1 and 3300, got 3301 [OUT_OF_RANGE]"),
    (
        scail(output={"crf": 52}),
        "'output.crf' must be between 0 and 51, got 52 [OUT_OF_RANGE]",
    ),
    (
        scail(output={"filename_prefix": "../x"}),
        "'output.filename_prefix' must be a string of A-Z, a-z, 0-9, '.', '_' and '-' "
        "[INVALID_TYPE]",
    ),
    (
        scail(output={"upload_url": "http://a.com/x"}),
        "Unsupported URL scheme 'http' for 'output.upload_url' [URL_SCHEME]",
    ),
    (
        scail(output={"upload_url": "https://10.0.0.1/x"}),
        "URL host is not allowed for 'output.upload_url' [URL_BLOCKED]",
    ),
    (
        scail(output={"format": "avi"}),
        "'output.format' must be one of mp4, got \"avi\" [INVALID_CHOICE]",
    ),
    (
        scail(width=[512]),
        "Invalid numeric parameter: 'width' must be an integer, got [512] [INVALID_NUMBER]",
    ),
    (
        scail(blocks_to_swap="all"),
        "Invalid numeric parameter: 'blocks_to_swap' must be auto or an integer, got \"all\" "
        "[INVALID_NUMBER]",
    ),
    (
        scail(cfg=math.inf),
        "Invalid numeric parameter: 'cfg' must be a number, got Infinity [INVALID_NUMBER]",
    ),
    (
        scail(size="640"),
        "Invalid numeric parameter: 'size' must be WIDTHxHEIGHT, got \"640\" [INVALID_NUMBER]",
    ),
    (
        scail(width=1920, height=1088),
        "Resolution 1920x1088 exceeds the limit of 1048576 pixels [PIXELS_EXCEEDED]",
    ),
    (scail(loras=[{"name": "../a"}]), 'Unknown LoRA "../a" [LORA_NOT_FOUND]'),
    (scail(strict=True, widht=1), "Unknown field 'widht' [UNKNOWN_FIELD]"),
    (
        scail(image="data:text/html;base64,AAAA"),
        "Data URI for 'image' must be base64 of an image or a video [INVALID_BASE64]",
    ),
    (
        {**FLAT, "image_base64": "data:image/png,AAAA", "image_url": ""},
        "Data URI for 'image' must be base64 of an image or a video [INVALID_BASE64]",
    ),
]


@pytest.mark.parametrize(("fields", "text"), TEXTS, ids=lambda value: str(value)[:40])
def test_text(fields, text):
    assert said(fields) == text


def test_texts_of_the_worker_s_own_limits():
    assert said(scail(), {"XICON_MODES": "wan_t2v"}) == (
        "Mode 'scail' is not available on this worker [MODE_UNAVAILABLE]"
    )
    assert said(scail(num_frames=50), {"XICON_MAX_FRAMES": "49"}) == (
        "'num_frames' must be between 1 and 49, got 50 [OUT_OF_RANGE]"
    )
    assert said(scail(), {"XICON_MAX_PIXELS": "400000"}) == (
        "Resolution 512x896 exceeds the limit of 400000 pixels [PIXELS_EXCEEDED]"
    )
    assert said(scail(image=IMAGE.replace("s:", ":")), {"XICON_REQUIRE_HTTPS": "1"}) == (
        "Unsupported URL scheme 'http' for 'image' [URL_SCHEME]"
    )
    assert said(scail(image={"base64": "A" * 100}), {"XICON_MAX_IMAGE_BYTES": "70"}) == (
        "'image' is larger than the limit of 70 bytes [MEDIA_TOO_LARGE]"
    )
    assert said(scail(foo=1), {"XICON_STRICT_INPUT": "1"}) == "Unknown field 'foo' [UNKNOWN_FIELD]"


def test_every_code_is_in_the_table():
    found = {text[text.rindex("[") + 1 : -1] for _, text in TEXTS} | {"MODE_UNAVAILABLE"}
    workflow = {code for code in CODES if code.startswith("WORKFLOW")}
    assert {code for code, entry in CODES.items() if entry.validation} == (
        found - {"INVALID_BASE64", "MEDIA_TOO_LARGE"}
    ) | workflow


@pytest.mark.parametrize("name", ["width", "steps", "num_frames", "seed", "context_overlap"])
@pytest.mark.parametrize(
    ("given", "warnings"),
    [
        ("{}", []),
        ("{}.0", []),
        ("{}.75", ["COERCED_INT"]),
        ('"{}"', ["COERCED_STRING"]),
        ('" +{}\\t"', ["COERCED_STRING"]),
    ],
)
def test_whole_numbers_are_read_from(name, given, warnings):
    value = {"width": 320, "steps": 7, "num_frames": 33, "seed": 33, "context_overlap": 33}[name]
    request = parse(scail(**{name: json.loads(given.format(value))}))
    assert (request.resolved[name], codes(request)) == (value, warnings)


@pytest.mark.parametrize(
    "value",
    [True, "", " ", "7.0", "1_0", "٧", "0x7", "--7", [], {}, math.nan, math.inf, "9" * 5000],
)
def test_whole_numbers_are_not_read_from(value):
    assert refused(scail(steps=value)).code == "INVALID_NUMBER"


@pytest.mark.parametrize(
    ("value", "number", "warnings"),
    [
        (2, 2.0, []),
        (2.5, 2.5, []),
        ("2.5", 2.5, ["COERCED_STRING"]),
        (" 1e1 ", 10.0, ["COERCED_STRING"]),
    ],
)
def test_numbers_are_read_from(value, number, warnings):
    request = parse(scail(cfg=value))
    assert (request.resolved["cfg"], codes(request)) == (number, warnings)
    assert type(request.resolved["cfg"]) is float


@pytest.mark.parametrize("value", [False, "", "nan", "inf", "1e999", "1,5", "1_0", "२", [1], {}])
def test_numbers_are_not_read_from(value):
    assert refused(scail(cfg=value)).code == "INVALID_NUMBER"


def test_huge_numbers_are_out_of_range():
    assert refused(scail(cfg=10**400)).message.startswith(
        "'cfg' must be between 0 and 30, got 1000"
    )
    assert refused(scail(seed=10**5000)).code == "OUT_OF_RANGE"
    assert (
        refused(scail(seed=-0.5)).code if False else parse(scail(seed=-0.5)).resolved["seed"] == 0
    )


RANGED = [
    field for field in REQUEST_FIELDS if field.kind in ("integer", "number") and not field.limit
]


@pytest.mark.parametrize("field", RANGED[1:], ids=lambda field: field.name)
def test_both_ends_of_every_range(field):
    others = {"context_frames": {"context_overlap": 0}, "context_overlap": {"context_frames": 321}}
    more = {"width": {"height": 128}, "height": {"width": 128}, "pose_start": {"pose_end": 1}}
    more |= {"st_cond_cfg": {"end_cond_cfg": 1}, "end_cond_cfg": {"st_cond_cfg": 0}, **others}
    fields = {**LEAST["steady_dancer"], **more.get(field.name, {})}
    for value in (int(field.low), int(field.high)):
        assert parse({**fields, field.name: value}).resolved[field.name] == value
    below = int(field.low) - (2 if field.name == "seed" else 1)
    for value in (below, int(field.high) + 1):
        error = refused({**fields, field.name: value})
        assert (error.code, error.field) == ("OUT_OF_RANGE", field.name)


def test_unknown_fields_are_told_with_a_near_match():
    fields = scail(widht=1, output={"cfr": 1}, loras=[{"name": LORAS[0], "strenght": 1}], zzz=None)
    request = parse({**fields, "image": {"url": IMAGE, "note": 1}, "images": {"other": 1}})
    told = {warning.field: warning.message for warning in request.warnings}
    assert told["widht"] == "Unknown field 'widht' is ignored; did you mean 'width'?"
    assert set(told) == {"widht", "output.cfr", "loras.strenght", "image.note", "images.other"}
    assert codes(request) == ["UNKNOWN_FIELD"] * 5
    assert {"UNKNOWN_FIELD", "COERCED_INT"} < set(WARNINGS)


def test_values_in_messages():
    assert value_text("x" * 62) == '"' + "x" * 62 + '"'
    assert value_text("x" * 63) == '"' + "x" * 60 + "..."
    assert value_text({"a": [1, None, 2.5]}) == '{"a": [1, null, 2.5]}'
    assert value_text("\ud800") == '"\\ud800"'
    assert value_text(10**5000) == "..."
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert value_text(deep) == "[" * 61 + "..."
    assert (
        len(refused(scail(strict=True, **{"y" * 500: 1})).message) == len("Unknown field ''") + 64
    )


# Section 1.9: what the original nested validator did otherwise.
def test_differences_from_the_original():
    assert refused({**NESTED, "width": -5}).code == "OUT_OF_RANGE"
    assert refused({**NESTED, "width": True}).code == "INVALID_NUMBER"
    assert parse({**NESTED, "width": None}).resolved["width"] == 512
    assert parse({**NESTED, "seed": -1}).resolved["seed"] is None
    assert parse({**NESTED, "prompt": "a\n\t{{seed}}"}).resolved["prompt"] == "a\n\t{{seed}}"
    assert parse({**NESTED, "negative_prompt": "n"}).resolved["negative_prompt"] == "n"
    assert refused({**NESTED, "images": "x"}).code == "INVALID_TYPE"
