"""Constants of a ComfyUI graph: literals, links to constant nodes, and the calculator node.

The calculator's text is read by a parser of its own that knows numbers, variables and
+ - * / // % ** and brackets; nothing is handed to Python. Numbers stay within what a graph can
mean, texts within a few hundred characters.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from xicon_infer.workflow_graph import Graph, Link, Node, at, check_row, cut, link_of, refuse

Number = int | float

MAX_EXPRESSION_CHARACTERS = 400
MAX_DEPTH = 40
"""Of calculators that feed calculators, and of brackets in one of them."""

_MAX_VALUE = 2.0**64
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)|([a-z])\b|(\*\*|//|[-+*/%()]))")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?\s*")
_MAX_DIGITS = 40

UNKNOWN = object()
"""What an input has that only running the graph could tell."""

CONSTANTS: Mapping[str, str] = {
    "INTConstant": "value",
    "FloatConstant": "value",
    "BOOLConstant": "value",
    "StringConstant": "string",
    "StringConstantMultiline": "string",
    "PrimitiveInt": "value",
    "PrimitiveFloat": "value",
    "PrimitiveBoolean": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "CM_IntToFloat": "a",
}
"""Class -> the input that its output repeats."""

_SCHEDULE_SLOTS = ("", "steps", "shift", "scheduler", "start_step", "end_step")
"""Outputs of WanVideoScheduler that repeat an input."""


def number_of(value: object) -> object:
    """Returns the number that a text stands for, as ComfyUI reads it; else the value as it is."""
    if not isinstance(value, str) or len(value) > _MAX_DIGITS or not _NUMBER.fullmatch(value):
        return value
    return float(value) if re.search("[.eE]", value) else int(value)


Memo = dict[str, Any]
"""Id of a calculator -> its value, so that each is worked out once."""


def fold(graph: Graph, value: object, memo: Memo, depth: int = 0) -> Any:
    """Returns the constant that an input has, or `UNKNOWN`.

    Args:
        graph: all nodes.
        value: of the input, a literal or a link.
        memo: calculators of this graph that were worked out; grows.
        depth: of calculators so far.

    Raises:
        InvalidRequest: WORKFLOW_FORMAT, links in a circle or too many calculators in a row.
    """
    seen: set[Link] = set()
    while (link := link_of(value)) is not None:
        node = at(graph, link)
        check_row(node, link, seen)
        if depth > MAX_DEPTH:
            message = f"Workflow has too many calculators in a row at node '{cut(node.id)}'"
            raise refuse(message, "WORKFLOW_FORMAT")
        if node.type == "SimpleCalculatorKJ":
            if node.id not in memo:
                memo[node.id] = _calculated(graph, node, memo, depth + 1)
            return _output(memo[node.id], link.slot)
        name = _repeats(node, link)
        if name is None:
            return UNKNOWN
        value = node.inputs.get(name, UNKNOWN)
    return value


def _repeats(node: Node, link: Link) -> str | None:
    if node.type in CONSTANTS:
        return CONSTANTS[node.type]
    if node.type in ("WanVideoScheduler", "WanVideoSchedulerv2"):
        known = 0 < link.slot < len(_SCHEDULE_SLOTS)
        return _SCHEDULE_SLOTS[link.slot] if known else None
    return None


def _calculated(graph: Graph, node: Node, memo: Memo, depth: int) -> object:
    """Returns the value of a calculator's expression, or `UNKNOWN`."""
    variables = {}
    for name, value in node.inputs.items():
        letter = str(name).rpartition(".")[2]
        if len(letter) == 1:
            variables[letter] = number_of(fold(graph, value, memo, depth))
    text = fold(graph, node.inputs.get("expression", "a + b"), memo, depth)
    if any(value is UNKNOWN for value in (text, *variables.values())):
        return UNKNOWN
    return calculate(text, variables, node.id)


def _output(value: Any, slot: int) -> object:
    """Returns what an output of a calculator gives: the number, a whole one, or yes and no."""
    if value is UNKNOWN or slot not in (1, 2):
        return value
    return int(value) if slot == 1 else bool(value)


def calculate(text: object, variables: Mapping[str, object], node: str) -> Number:
    """Returns the value of an arithmetic expression.

    Args:
        text: numbers, letters, + - * / // % ** and brackets.
        variables: letter -> number.
        node: id for messages.

    Raises:
        InvalidRequest: WORKFLOW_UNSUPPORTED, anything else, a division by zero, a huge number.
    """
    problem = f"Workflow node '{cut(node)}' has an expression that is not plain arithmetic"
    if not isinstance(text, str) or len(text) > MAX_EXPRESSION_CHARACTERS:
        raise refuse(problem)
    numbers = {
        name: value
        for name, value in variables.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= _MAX_VALUE
    }
    try:
        result, rest = _sum(_tokens(text), numbers, 0)
        if rest or not abs(result) <= _MAX_VALUE:
            raise ValueError(text)
    except (ValueError, IndexError, KeyError, ArithmeticError):
        raise refuse(problem) from None
    return result


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(text[position])
        tokens.append(match.group().strip())
        position = match.end()
    return tokens


_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    # Through floats: a power of whole numbers could have millions of digits.
    "**": lambda a, b: float(a) ** float(b),
}


def _sum(tokens: list[str], numbers: Mapping[str, Number], depth: int) -> tuple[Number, list[str]]:
    """Returns the value of a sum at the start of the tokens, and the tokens after it."""
    left, tokens = _product(tokens, numbers, depth)
    while tokens and tokens[0] in ("+", "-"):
        right, rest = _product(tokens[1:], numbers, depth)
        left, tokens = _applied(tokens[0], left, right), rest
    return left, tokens


def _product(
    tokens: list[str], numbers: Mapping[str, Number], depth: int
) -> tuple[Number, list[str]]:
    left, tokens = _signed(tokens, numbers, depth)
    while tokens and tokens[0] in ("*", "/", "//", "%"):
        right, rest = _signed(tokens[1:], numbers, depth)
        left, tokens = _applied(tokens[0], left, right), rest
    return left, tokens


def _signed(
    tokens: list[str], numbers: Mapping[str, Number], depth: int
) -> tuple[Number, list[str]]:
    """Returns the value of a term with its signs; a power binds tighter than a sign before it."""
    if depth > MAX_DEPTH:
        raise ValueError("depth")
    if tokens[0] in ("+", "-"):
        value, rest = _signed(tokens[1:], numbers, depth + 1)
        return (-value if tokens[0] == "-" else value), rest
    value, rest = _atom(tokens, numbers, depth)
    if rest and rest[0] == "**":
        power, rest = _signed(rest[1:], numbers, depth + 1)
        value = _applied("**", value, power)
    return value, rest


def _atom(tokens: list[str], numbers: Mapping[str, Number], depth: int) -> tuple[Number, list[str]]:
    head, rest = tokens[0], tokens[1:]
    if head == "(":
        value, rest = _sum(rest, numbers, depth + 1)
        if rest[0] != ")":
            raise ValueError(rest[0])
        return value, rest[1:]
    if head.isalpha():
        return numbers[head], rest
    return (float(head) if re.search("[.eE]", head) else int(head)), rest


def _applied(sign: str, left: Number, right: Number) -> Number:
    value = _BINARY[sign](left, right)
    if isinstance(value, complex) or not math.isfinite(value) or abs(value) > _MAX_VALUE:
        raise ValueError(sign)
    return int(value) if sign == "**" and value == int(value) else value
