"""The JSON Schema takes exactly the well-formed requests; the pages equal the tables."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest

from tests.serving.__main__ import read_cases
from tests.serving.requests import FLAT, IMAGE, LEAST, NESTED, VIDEO, parse, refused, scail
from xicon_infer.request_fields import OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.request_schema import request_schema
from xicon_infer.response_codes import CODES

ROOT = Path(__file__).parents[1]
SCHEMA = request_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
CASES = read_cases(Path(__file__).parent / "golden" / "serving" / "cases.json")

BEYOND = {
    *("PATH_NOT_ALLOWED", "MODE_UNAVAILABLE", "PIXELS_EXCEEDED", "LORA_NOT_FOUND", "URL_BLOCKED"),
    *("URL_INVALID", "DRIVING_VIDEO_REQUIRED", "WORKFLOW_UNSUPPORTED", "WORKFLOW_FORMAT"),
    *("WORKFLOW_PLACEHOLDER", "MEDIA_NOT_FOUND"),
}
"""Refusals that depend on the worker, or on more than one value."""
REPAIRED = {"COERCED_STRING", "COERCED_INT", "UNKNOWN_FIELD"}


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_cases(case):
    fields, expected = case["job"].get("input"), case["expect"]
    if isinstance(fields, str):
        pytest.skip("the schema is of the object in the text")
    well_formed = expected["outcome"] == "accept" and not REPAIRED & set(expected["warnings"])
    if "LENIENT" in str(case["env"]) or expected.get("error_code") in BEYOND:
        return
    assert VALIDATOR.is_valid(fields) == well_formed


GOOD = [
    *LEAST.values(),
    FLAT,
    NESTED,
    {"action": "health"},
    {"workflow": {"1": {}}, "images": [{"name": "a", "image": "AAAA"}], "dry_run": True},
    {"workflow": "{}", "output": {"crf": 20}},
    {"mode": "Steady-Dancer", "image": {"path": "/runpod-volume/a.png"}, "video": VIDEO},
    {"mode": "T2V", "positive_prompt": "a fox"},
    {**NESTED, "seed": -1, "width": None, "output": {"return": "s3", "upload_url": None}},
    scail(seed=2**64 - 1, cfg=0, blocks_to_swap="auto", vae_tiling="auto"),
    scail(
        loras=[{"name": "a.safetensors"}], metadata={"any": ["thing"]}, attention_mode="sageattn"
    ),
]


@pytest.mark.parametrize("fields", GOOD, ids=lambda fields: json.dumps(fields)[:40])
def test_well_formed(fields):
    VALIDATOR.validate(fields)


BAD = [
    *({}, [], "text", {"action": "read_log"}, {"workflow": 1}, {"workflow": {}, "width": 512}),
    *({"image": IMAGE, "mode": "animate"}, {"mode": "wan_t2v"}, {"mode": "t2v", "prompt": ""}),
    *({"mode": "scail", "video": VIDEO}, {"video_url": VIDEO}, {**NESTED, "prompt": ""}),
    *({**NESTED, "images": {}}, {**NESTED, "videos": None}, {**NESTED, "images": {"a": IMAGE}}),
    *(scail(image="ref.png"), scail(image="ftp://a/b"), scail(image={"url": "a", "path": "b"})),
    *(scail(width=127), scail(width=1921), scail(width="512"), scail(width=True), scail(steps=6.5)),
    *(scail(widht=1), scail(seed=-2), scail(seed=2**64), scail(fps=61), scail(cfg="1")),
    *(scail(prompt=1), scail(prompt="x" * 4001), scail(freenoise=1), scail(profile="slow")),
    *(scail(loras=["a"]), scail(loras=[{"name": "a"}] * 5), scail(loras=[{"strength": 1}])),
    *(scail(loras=[{"name": "a", "strength": 5}]), scail(blocks_to_swap="all"), scail(size="640")),
    *(scail(output={"a": 1}), scail(output={"crf": 52}), scail(output={"upload_url": "http://a"})),
    *(scail(output={"filename_prefix": "a/b"}), scail(metadata=[]), scail(api_version=2)),
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: str(fields)[:60])
def test_not_well_formed(fields):
    assert not VALIDATOR.is_valid(fields)
    # Nothing that the schema refuses passes the worker without a word.
    if not isinstance(fields, dict) or "workflow" not in fields:
        try:
            assert parse(fields).warnings
        except Exception:  # noqa: BLE001
            refused(fields)


def test_every_field_is_described():
    for field in REQUEST_FIELDS:
        for name in (field.name, *field.spellings):
            assert name in SCHEMA["properties"]
    inside = SCHEMA["properties"]["output"]["properties"]
    assert set(inside) == {field.name for field in OUTPUT_FIELDS}


def page(name):
    path = ROOT / "docs" / f"reference_{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_equal_the_tables():
    request, environment = page("request"), page("environment")
    hint = "run: python docs/reference_request.py docs/reference_environment.py"
    assert request.PAGE.read_text(encoding="utf-8") == request.reference(), hint
    assert request.SCHEMA.read_text(encoding="utf-8") == request.schema(), hint
    assert environment.PAGE.read_text(encoding="utf-8") == environment.reference(), hint
    for code in CODES:
        assert f"| {code} |" in request.reference()


def test_the_example_of_the_page_is_understood():
    text = page("request").reference()
    example = json.loads(text.split("```json\n")[1].split("```")[0])
    assert parse(example).mode == "scail"
