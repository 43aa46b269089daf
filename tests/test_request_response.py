"""The answers of the worker: their shapes, and that nothing slips out."""

from __future__ import annotations

import json
import re

import pytest

from tests.serving.requests import LEAST, parse, refused, scail
from xicon_infer.errors import MediaError, OutOfMemory, XiconError
from xicon_infer.request import RequestWarning
from xicon_infer.response import (
    dry_run_answer,
    failure,
    health,
    json_bytes,
    media_entry,
    safe_message,
    success,
)
from xicon_infer.response_codes import CODES

FACTS = {"width": 512, "height": 896, "fps": 16.0, "frames": 81, "sha256": None}


def entry(role="result", kind="s3_url"):
    return media_entry(
        filename=f"{role}.mp4",
        kind=kind,
        data="https://bucket.example.com/x?sig=1",
        container="mp4",
        role=role,
        facts=FACTS,
    )


def test_success():
    request = parse(scail(metadata={"mine": 1}, shift=0, width=500))
    warning = RequestWarning("MEMORY_FALLBACK", "slower", None)
    answer = success(
        request,
        videos=[entry("pose"), entry()],
        metadata={"seed": 7, "timings": {"total": 1.5}},
        errors=["the pose video at /tmp/xicon/ab12/pose.mp4 could not be stored"],
        warnings=[warning],
    )
    assert list(answer) == ["status", "videos", "errors", "warnings", "metadata"]
    assert answer["status"] == "success"
    assert [video["role"] for video in answer["videos"]] == ["result", "pose"]
    assert answer["videos"][0] == {
        "filename": "result.mp4",
        "type": "s3_url",
        "data": "https://bucket.example.com/x?sig=1",
        "format": "video/h264-mp4",
        "role": "result",
        "width": 512,
        "height": 896,
        "fps": 16.0,
        "frames": 81,
    }
    codes = [told["code"] for told in answer["warnings"]]
    assert codes == ["DIMENSION_ROUNDED", "VALUE_ADAPTED", "MEMORY_FALLBACK"]
    assert answer["errors"] == ["the pose video at (hidden) could not be stored"]
    assert answer["metadata"] == {
        "request_id": "job-1",
        "mode": "scail",
        "form": "native",
        "seed": 7,
        "timings": {"total": 1.5},
        "client": {"mine": 1},
    }
    assert answer["metadata"]["client"] == request.metadata


def test_images_only_if_there_are_any():
    request = parse(scail())
    image = media_entry(
        filename="f.png", kind="base64", data="AAAA", container="png", role="result", facts={}
    )
    assert image["format"] == "image/png"
    assert success(request, videos=[entry()], metadata={}, images=[image])["images"] == [image]
    assert "images" not in success(request, videos=[entry()], metadata={})


def test_legacy_video():
    request = parse(scail(response_format="legacy_video"))
    answer = success(request, videos=[entry("pose"), entry()], metadata={"seed": 7})
    assert list(answer) == ["video", "video_type", "status", "warnings", "metadata"]
    assert (answer["video"], answer["video_type"]) == (entry()["data"], "s3_url")


def test_dry_run():
    picture = "data:image/png;base64," + "A" * 100_000
    request = parse(scail(image=picture, dry_run=True, prompt="a fox"))
    answer = dry_run_answer(request)
    assert answer["status"] == "valid"
    assert answer["request"]["prompt"] == "a fox"
    assert answer["request"]["image"] == {"kind": "base64", "value": f"{len(picture)} characters"}
    assert answer["request"]["video"] == LEAST_VIDEO
    assert answer["metadata"]["mode"] == "scail"
    assert json_bytes(answer) < 5000


LEAST_VIDEO = {"kind": "url", "value": LEAST["scail"]["video"]}


def test_health_shows_nothing_else():
    facts = {"gpu": "one", "modes": ["scail"], "env": {"A": "secret"}, "path": "/models"}
    answer = health(degraded=(), facts=facts, jobs_done=3, last_error=None)
    assert answer == {
        "status": "healthy",
        "gpu": "one",
        "modes": ["scail"],
        "jobs_done": 3,
        "last_error": None,
    }
    amiss = ("weights scail: missing: a.pth (searched: /models/secret)",)
    assert health(degraded=amiss, facts={}, jobs_done=0, last_error="GPU_OOM") == {
        "status": "degraded",
        "reasons": ["weights scail: missing: a.pth (searched: (hidden))"],
        "jobs_done": 0,
        "last_error": "GPU_OOM",
    }


def test_failure_of_a_request():
    error = refused(scail(width=1, steps=0, loras=[{"name": "../../etc/passwd"}]))
    answer = failure(error, request_id="job-1")
    assert answer == {
        "error": "'width' must be between 128 and 1920, got 1 [OUT_OF_RANGE]",
        "error_code": "OUT_OF_RANGE",
        "error_detail": {
            "code": "OUT_OF_RANGE",
            "message": "'width' must be between 128 and 1920, got 1",
            "field": "width",
            "stage": "validate",
            "retryable": False,
            "request_id": "job-1",
            "hint": None,
            "errors": [
                {
                    "code": "OUT_OF_RANGE",
                    "message": "'steps' must be between 1 and 100, got 0",
                    "field": "steps",
                },
                {
                    "code": "LORA_NOT_FOUND",
                    "message": 'Unknown LoRA "../../etc/passwd"',
                    "field": "loras",
                },
            ],
        },
    }
    found = re.search(r"\[([A-Z][A-Z0-9_]*)\]$", answer["error"])
    assert found is not None
    assert found[1] == answer["error_code"]


def test_failure_later():
    error = MediaError("'image': /tmp/xicon/ab12/image.png is damaged", field="image")
    answer = failure(error, request_id="j", stage="decode", refresh_worker=True)
    assert answer["error"] == "'image': (hidden) is damaged [MEDIA_CORRUPT]"
    assert answer["error_detail"]["stage"] == "decode"
    assert answer["refresh_worker"] is True
    memory = failure(OutOfMemory("too large"), request_id="j", stage="denoise")
    assert memory["error_detail"]["retryable"]
    assert memory["error_detail"]["hint"] == CODES["GPU_OOM"].hint
    asked = failure(OutOfMemory("too large"), request_id="j", hint="use 480x832")
    assert asked["error_detail"]["hint"] == "use 480x832"
    assert "refresh_worker" not in memory


@pytest.mark.parametrize("error", [ValueError("/root/secret"), KeyboardInterrupt("secret")])
def test_a_bug_says_nothing_of_itself(error):
    answer = failure(error, request_id="j", stage="pose")
    assert answer["error_code"] == "INTERNAL"
    assert answer["error_detail"]["retryable"]
    assert "secret" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file /runpod-volume/models/a.safetensors.", "no file (hidden)"),
        ("connect to 10.0.0.1 failed", "connect to (hidden) failed"),
        ("connect to fe80:1:2::3 failed", "connect to (hidden) failed"),
        ("https://a.com/x.png?sig=abc gave 403", "https://a.com/x.png(hidden) gave 403"),
        ("https://u:p@a.com/x gave 403", "https://(hidden)a.com/x gave 403"),
        (r"C:\models\a.pt is missing", "(hidden) is missing"),
        ("'width' must be between 128 and 1920", "'width' must be between 128 and 1920"),
        ("and/or: 1/2 of 81 frames at 16.5 fps", "and/or: 1/2 of 81 frames at 16.5 fps"),
        ("use POST /runsync, as v1.12.0 says", "use POST /runsync, as v1.12.0 says"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_messages_are_cleaned(text, shown):
    assert safe_message(text) == shown
    assert failure(XiconError(text), request_id="j")["error"] == f"{shown} [INTERNAL]"


def test_a_long_message_is_cut():
    assert len(safe_message("x" * 5000)) == 1000


def test_length_of_an_answer():
    assert json_bytes({"a": "ü", "b": [1, 2.5]}) == len('{"a": "ü", "b": [1, 2.5]}'.encode())
    assert json_bytes({"data": "A" * 30_000_000}) == 30_000_012
    for bad in ({"a": float("nan")}, {"a": "\ud800"}, {"a": object()}):
        with pytest.raises(ValueError, match=r".+"):
            json_bytes(bad)
