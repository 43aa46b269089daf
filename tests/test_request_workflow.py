"""The workflow form as the request layer sees it: what a graph says, and what stands beside it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.serving.__main__ import read_cases
from tests.serving.requests import LORAS, codes, parse, refused
from tests.test_request_job import job_of

CASES = read_cases(Path(__file__).parent / "golden" / "serving" / "cases.json")
SCAIL = next(case for case in CASES if case["id"] == "workflow-scail")
LORA = SCAIL["context"]["loras"][0]


def graph(**inputs):
    """Returns the input of the case; inputs of nodes are changed by `n7_strength=2`."""
    fields = copy.deepcopy(SCAIL["job"]["input"])
    for name, value in inputs.items():
        node, _, key = name[1:].partition("_")
        fields["workflow"][node]["inputs"][key] = value
    return fields


def read(fields, env=None, **context):
    return parse(fields, env, **{"loras": (LORA, *LORAS), **context})


def test_a_graph_is_a_request_like_any_other():
    request = read(graph())
    assert request.form == "workflow"
    job = job_of(request)
    assert (job.pipeline, job.width, job.height, job.seed) == ("scail", 416, 672, 779298828917358)
    assert [lora.name for lora in job.loras] == [LORA]
    text = read({**graph(), "workflow": json.dumps(graph()["workflow"])})
    assert text.resolved == request.resolved


def test_fields_beside_a_graph():
    beside = {"dry_run": True, "timeout_s": 60, "metadata": {"a": 1}, "output": {"crf": 30}}
    request = read({**graph(), **beside, "api_version": 1, "response_format": "legacy_video"})
    assert request.dry_run
    assert (request.timeout_s, request.metadata) == (60, {"a": 1})
    assert (request.output["crf"], request.response_format) == (30, "legacy_video")
    assert codes(request) == []
    told = read({**graph(), "width": 512, "colour": 1})
    assert codes(told) == ["UNKNOWN_FIELD", "UNUSED_FIELD"]
    assert told.resolved["width"] == 416
    error = refused({**graph(), "colour": 1, "strict": True}, loras=(LORA,))
    assert (error.code, error.field) == ("UNKNOWN_FIELD", "colour")


def test_the_rules_of_requests_hold_for_graphs():
    assert refused(graph(n9_steps=0), loras=(LORA,)).message == (
        "'steps' must be between 1 and 100, got 0"
    )
    error = refused(graph(n2_video="http://10.0.0.1/a.mp4"), loras=(LORA,))
    assert (error.code, error.field) == ("URL_BLOCKED", "video")
    assert refused(graph(), {"XICON_MODES": "wan_t2v"}, loras=(LORA,)).code == "MODE_UNAVAILABLE"
    assert refused({**graph(), "api_version": 2}, loras=(LORA,)).code == "UNSUPPORTED_VERSION"
    assert refused(graph(), loras=()).code == "WORKFLOW_MODEL"


def test_files_by_bare_name():
    fields = graph(n1_image="mine.png")
    assert refused(fields, loras=(LORA,)).code == "MEDIA_NOT_FOUND"
    request = read(fields, input_files=("mine.png",))
    assert request.resolved["image"] == {"kind": "path", "value": "mine.png"}


def test_the_rate_of_the_driving_video():
    request = read(graph(n2_force_rate=0))
    assert request.resolved["fps"] == "source"
    assert job_of(request).fps == "source"


@pytest.mark.parametrize("value", [1, [], {}, "", "x", "[" * 50_000, {"1": 2}, {"1": {}}])
def test_what_is_no_graph(value):
    assert refused({"workflow": value}).field == "workflow"
