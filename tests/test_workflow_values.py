"""The calculator of a graph, and constants behind links."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xicon_infer.errors import InvalidRequest
from xicon_infer.workflow_graph import read_nodes, shown
from xicon_infer.workflow_values import CONSTANTS, UNKNOWN, calculate, fold, number_of

EXPRESSIONS = [
    ("a / 2", 208.0),
    ("a/2+b", 215.0),
    ("(a + b) * c", 423 * 1.5),
    ("a // b", 59),
    ("a % b", 3),
    ("-a", -416),
    ("-2 ** 2", -4),
    ("2 ** -1", 0.5),
    ("2 ** 3 ** 2", 512),
    ("10 - 3 - 2", 5),
    ("8 / 4 / 2", 1.0),
    ("+1.5e2", 150.0),
    (".5 * b", 3.5),
    ("  ( ( a ) )  ", 416),
]
NONSENSE = [
    *("", " ", "a +", "(a", "a)", "a b", "2 3", "d", "ab", "a.b", "__import__('os')", "a; b"),
    *("1 / 0", "1 % 0", "9 ** 9 ** 9", "2 ** 65", "(-1) ** 0.5", "1e999", "a if b else c"),
    *("(" * 100 + "a" + ")" * 100, "-" * 100 + "a", "1" * 500, "1 + " * 200 + "1", "a(b)", "[a]"),
]


def constant(kind, value):
    return {"class_type": kind, "inputs": {CONSTANTS[kind]: value}}


def calculator(**inputs):
    return {"class_type": "SimpleCalculatorKJ", "inputs": inputs}


@pytest.mark.parametrize(("text", "value"), EXPRESSIONS)
def test_expressions(text, value):
    result = calculate(text, {"a": 416, "b": 7, "c": 1.5}, "1")
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("text", [*NONSENSE, None, 5, ["a"]])
def test_everything_else_is_refused(text):
    with pytest.raises(InvalidRequest, match="node '1' has an expression that is not plain"):
        calculate(text, {"a": 416, "b": 7, "c": 1.5}, "1")


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, True, "7", None])
def test_variables_are_numbers(value):
    with pytest.raises(InvalidRequest):
        calculate("a", {"a": value}, "1")


@given(
    st.recursive(
        st.integers(0, 999).map(str) | st.sampled_from(["a", "b"]),
        lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        max_leaves=8,
    )
)
def test_arithmetic_is_that_of_python(text):
    numbers = {"a": 3, "b": 5}
    try:
        assert calculate(text, numbers, "1") == eval(text, {"__builtins__": {}}, numbers)
    except InvalidRequest:
        assert len(text) > 100 or abs(eval(text, {"__builtins__": {}}, numbers)) > 2**64


@given(st.text(alphabet="ab12.+-*/%() e", max_size=60))
def test_no_text_raises_anything_else(text):
    with contextlib.suppress(InvalidRequest):
        assert abs(calculate(text, {"a": 2, "b": 3}, "1")) <= 2**64


def test_outputs_of_a_calculator():
    graph = read_nodes(
        {
            "1": constant("INTConstant", "25"),
            "2": {
                "class_type": "SimpleCalculatorKJ",
                "inputs": {"expression": "a / 2", "a": ["1", 0]},
            },
            "3": {"class_type": "SimpleCalculatorKJ", "inputs": {"variables.a": ["2", 1], "b": 3}},
        }
    )
    assert [fold(graph, ["2", slot], {}) for slot in (0, 1, 2)] == [12.5, 12, True]
    assert fold(graph, ["3", 0], {}) == 15


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_followed(kind):
    graph = read_nodes({"1": constant(kind, ["2", 0]), "2": constant("INTConstant", 5)})
    assert fold(graph, ["1", 0], {}) == 5


def test_what_only_running_would_tell():
    graph = read_nodes(
        {
            "1": {"class_type": "GetImageSizeAndCount", "inputs": {}},
            "2": calculator(expression="a", a=["1", 1]),
        }
    )
    assert fold(graph, ["1", 1], {}) is UNKNOWN
    assert fold(graph, ["2", 0], {}) is UNKNOWN


def test_circles_are_refused():
    graph = read_nodes(
        {
            "1": constant("INTConstant", ["1", 0]),
            "2": calculator(expression="a", a=["2", 0]),
        }
    )
    for node in "12":
        with pytest.raises(InvalidRequest) as caught:
            fold(graph, [node, 0], {})
        assert caught.value.code == "WORKFLOW_FORMAT"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("416", 416), (" -1 ", -1), ("5.5", 5.5), ("1e3", 1000.0), (".5", 0.5), ("x", "x")),
        *(("1_0", "1_0"), ("nan", "nan"), ("inf", "inf"), ("9" * 50, "9" * 50), ("", "")),
        *((7, 7), (None, None)),
    ],
)
def test_numbers_may_be_text(text, number):
    assert number_of(text) == number
    assert type(number_of(text)) is type(number)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 62, '"' + "a" * 62 + '"'),
        ("a" * 63, '"' + "a" * 60 + "..."),
        ({"a": [1]}, '{"a": [1]}'),
        ("\ud800", '"\\ud800"'),
        ([[]] * 9, "[[], [], [], [], [], [], [], [], []]"),
    ],
)
def test_values_are_shown_short(value, text):
    assert shown(value) == text
