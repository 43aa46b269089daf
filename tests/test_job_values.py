"""One option at a time: types, ranges, words of the command line, messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.job_examples import least_for
from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, Lora, make_job
from xicon_infer.job_fields import FIELDS, Field
from xicon_infer.job_values import check_value, value_from_text

BASE: dict[str, Any] = {"image": "ref.png", "track": "dance.npz"}
TABLE = {field.name: field for field in FIELDS}


def job_with(**values: Any) -> Job:
    return make_job({**BASE, **values})


def refused(**values: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        job_with(**values)
    return caught.value


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.name)
@pytest.mark.parametrize("value", [True, 1, 2.5, "abc", ["x"], {"a": 1}, float("nan"), b"x"])
def test_a_value_of_another_type_is_refused(field: Field, value: Any) -> None:
    right = {
        "path": (str, Path),
        "text": (str,),
        "switch": (bool,),
        "loras": (list,),
        "choice": (),
        "integer": (int,),
        "number": (int, float),
    }[field.kind]
    fits = isinstance(value, right) and (field.kind == "switch") == isinstance(value, bool)
    if fits and value == value:
        return
    if any(type(value) is type(choice) and value == choice for choice in field.choices):
        return
    with pytest.raises(InvalidRequest) as caught:
        make_job({**least_for(field), field.name: value})
    error = caught.value
    assert error.field == field.name
    assert error.code in ("INVALID_TYPE", "INVALID_NUMBER", "INVALID_CHOICE")


def test_text_of_a_range_error() -> None:
    error = refused(num_inference_steps=0)
    assert error.message == "'num_inference_steps' must be between 1 and 100, got 0"
    assert refused(seed=-5).message == (
        "'seed' must be -1 or between 0 and 18446744073709551615, got -5"
    )
    assert refused(fps=0).message == "'fps' must be source or between 1 and 60, got 0"
    assert refused(shift=0).message == "'shift' must be between 0.01 and 100, got 0"


def test_long_values_are_cut_in_messages() -> None:
    shown = refused(scheduler="x" * 200).message.split("got ")[1]
    assert shown == '"' + "x" * 60 + "..."


def test_ways_to_write_a_lora() -> None:
    written = ["a", "b:0.5", "dir/c.safetensors:-2", "d:e.safetensors"]
    assert job_with(loras=written).loras == (
        Lora("a"),
        Lora("b", 0.5),
        Lora("dir/c.safetensors", -2.0),
        Lora("d:e.safetensors"),
    )
    assert job_with(loras=[{"name": "a", "strength": 0}]).loras == (Lora("a", 0.0),)


def test_prompts_are_verbatim_but_for_nul() -> None:
    text = 'say "hi"\nline two\\ {{seed}}\t'
    assert job_with(prompt=text).prompt == text
    assert job_with(prompt="a\0b").prompt == "ab"
    assert job_with(negative_prompt="").negative_prompt == ""


def test_types_are_strict() -> None:
    assert refused(width=512.0).code == "INVALID_NUMBER"
    assert refused(width="512").message == (
        "Invalid numeric parameter: 'width' must be an integer, got \"512\""
    )
    assert refused(guidance_scale=True).message.endswith("must be a number, got true")
    assert refused(guidance_scale=float("inf")).code == "INVALID_NUMBER"
    assert refused(shift=10**400).code == "INVALID_NUMBER"
    assert refused(pose_rope_t_offset=True).code == "INVALID_CHOICE"
    assert isinstance(job_with(shift=3).shift, float)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FIELDS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=5,
    ),
)
def test_any_json_value_is_accepted_or_refused_by_name(field: Field, value: Any) -> None:
    try:
        job = job_with(**{field.name: value})
    except InvalidRequest as error:
        assert error.message
        assert error.field
    else:
        assert make_job(job.settings()) == job


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("width", "512", 512),
        ("seed", "-1", -1),
        ("shift", "1e1", 10.0),
        ("shift", ".5", 0.5),
        ("fps", "source", "source"),
        ("fps", "24", 24.0),
        ("pose_rope_t_offset", "0", 0),
        ("scheduler", "euler", "euler"),
    ],
)
def test_words_of_the_command_line(name: str, text: str, value: object) -> None:
    read = value_from_text(TABLE[name], text)
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("text", ["1_0", " 5", "٣", "0x10", "5.0", "--5", "", "9" * 5000])
def test_text_that_is_no_integer(text: str) -> None:
    with pytest.raises(InvalidRequest):
        check_value(TABLE["width"], value_from_text(TABLE["width"], text))


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1_0", "", "1.5.2", "abc"])
def test_text_that_is_no_number(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_value(TABLE["shift"], value_from_text(TABLE["shift"], text))
    assert caught.value.code == "INVALID_NUMBER"
