"""No JSON value whatsoever makes the validator raise anything but its own error."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.requests import FLAT, LEAST, LORAS, NESTED
from xicon_infer.job import make_job
from xicon_infer.request import RequestContext, RequestError, parse_request, to_job_values
from xicon_infer.request_fields import FLAT_KEYS, OUTPUT_FIELDS, REQUEST_FIELDS
from xicon_infer.request_values import value_text
from xicon_infer.response import dry_run_answer, failure, json_bytes
from xicon_infer.response_codes import CODES, WARNINGS
from xicon_infer.settings import read_settings

DEFAULT = read_settings({})
CONTEXT = RequestContext(modes=DEFAULT.modes, loras=LORAS, default_driving_video=True)

NAMES = [name for field in REQUEST_FIELDS for name in (field.name, *field.spellings)]
OUTPUT_NAMES = [field.name for field in OUTPUT_FIELDS]
WORDS = ["url", "base64", "path", "name", "strength", "reference_image", "dance_video"]
MARK = "Zq7"
"""A text that no message has of its own."""

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "", "-1", " 7 ", "1e999", "640x352", "data:", "//", "/a", "\ud800"]),
    st.sampled_from([field.default_for("scail") for field in REQUEST_FIELDS]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from([*WORDS, *OUTPUT_NAMES]) | st.text(max_size=8), inner, max_size=4
        ),
    ),
    max_leaves=8,
)
KEYS = st.sampled_from([*NAMES, *FLAT_KEYS, "images", "videos", "action", "workflow"]) | st.text(
    max_size=8
)
FORMS = st.sampled_from([*LEAST.values(), FLAT, NESTED, {}])


def judge(event: Any) -> None:
    """Has an event checked, and what comes of it as well."""
    try:
        request = parse_request(event, DEFAULT, CONTEXT)
    except RequestError as error:
        for one in (error, *error.errors):
            assert one.code in CODES, one.code
            assert len(one.message) < 400
            assert one.field is not None
        json_bytes(failure(error, request_id="job"))
        return
    assert {warning.code for warning in (*request.warnings, *request.adaptations)} <= set(WARNINGS)
    if request.action is None:
        json_bytes(dry_run_answer(request))
        files = {role: f"{role}.file" for role in request.media}
        make_job(to_job_values(request, files, "out.mp4"), source="request")


@given(JSON)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_input(value):
    judge({"id": "job", "input": value})
    judge({"input": json.dumps(value)})
    judge(value)


@given(FORMS, st.dictionaries(KEYS, JSON, max_size=5))
@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
def test_any_value_of_any_field(form, fields):
    judge({"id": "job", "input": {**form, **fields}})


def deep(levels: int, *, mapping: bool) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value} if mapping else [value]
    return value


HOSTILE = [
    deep(100_000, mapping=False),
    deep(100_000, mapping=True),
    deep(900, mapping=True),
    10**5000,
    -(10**5000),
    float("nan"),
    float("-inf"),
    1e308,
    "\ud800",
    "\0",
    "9" * 10_000,
    "x" * 100_000,
    {"url": {"url": {"url": "x"}}},
    {"\ud800": 1, "": 2},
    [[]] * 1000,
    [{"name": "\ud800"}],
    True,
]


@pytest.mark.parametrize(
    "name", [*NAMES, *FLAT_KEYS, "images", "videos", "action", "workflow", "unknown"]
)
def test_hostile_values_of_every_field(name):
    for value in HOSTILE:
        for form in (*LEAST.values(), FLAT, NESTED):
            judge({"id": value, "input": {**form, name: value}, "s3Config": value})


@pytest.mark.parametrize("name", OUTPUT_NAMES)
def test_hostile_values_of_the_output(name):
    for value in HOSTILE:
        judge({"input": {**LEAST["scail"], "output": {name: value}}})


@pytest.mark.parametrize("name", [*NAMES, *FLAT_KEYS, "images", "videos", "action", "workflow"])
def test_no_message_has_more_than_64_characters_of_a_value(name):
    text = MARK * 200
    values = [
        text,
        [text],
        {text: text},
        {"url": text},
        f"{text}://{text}",
        f"/{text}",
        [{"name": text}],
    ]
    values += [f"https://{text}.com:22/{text}", f"data:{text};base64,{text}", f"https://{text}@a/"]
    for value in values:
        for form in (LEAST["scail"], FLAT, NESTED):
            with pytest.raises(RequestError) as caught:
                judge_strictly({**form, name: value, text: 1})
            for one in (caught.value, *caught.value.errors):
                assert one.message.count(MARK) * len(MARK) <= 64, one.message
                assert len(one.field or "") <= 64


def judge_strictly(fields: dict[str, Any]) -> None:
    """Has fields checked that hold an unknown one, which a strict worker refuses."""
    parse_request({"input": fields}, read_settings({"XICON_STRICT_INPUT": "1"}), CONTEXT)


def test_thousands_of_broken_requests():
    chance = random.Random(3)
    good = [*LEAST.values(), FLAT, NESTED]
    for _ in range(3_000):
        fields = copy.deepcopy(chance.choice(good))
        for _ in range(chance.randint(1, 3)):
            name = chance.choice([*NAMES, *fields])
            fields[name] = chance.choice([*HOSTILE[3:], None, "", 0, -1, [], {}, "auto"])
        event = {"input": fields if chance.random() < 0.9 else value_text(fields)}
        judge(event)
