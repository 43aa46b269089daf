"""One value of a request at a time: coerced as the contract says, or refused with its texts.

Requests come from form builders, which send numbers as text; the command line is stricter
(`xicon_infer.job_values`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.request_types import Findings

_SHOWN_CHARACTERS = 64
_KEPT_CHARACTERS = 61
_MAX_DIGITS = 4000
"""Python refuses to read a text of more than 4300 digits as a number."""

_BLANKS = " \t\r\n"
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[xX*]\s*([0-9]{1,9})\s*")

# A bound of an iterencode that is stopped early: it never holds the text of a large value.
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=lambda value: type(value).__name__)


def refuse(code: str, message: str, field: str) -> InvalidRequest:
    """Returns the error about a field."""
    return InvalidRequest(message, field=field, code=code)


def value_text(value: object) -> str:
    """Returns a value as JSON text for a message, cut to 61 characters if longer than 64.

    Never fails and never works through a large value; halves of surrogate pairs are escaped.
    """
    if isinstance(value, str):
        value = value[: _SHOWN_CHARACTERS + 1]
    text = ""
    try:
        for piece in _ENCODER.iterencode(value):
            text += piece[: _SHOWN_CHARACTERS + 1]
            if len(text) > _SHOWN_CHARACTERS:
                break
    except (ValueError, TypeError, RecursionError):
        # An integer too long to print, a key that is no text, a nest too deep.
        text += "..."
    return cut(text.encode("utf-8", "backslashreplace").decode())


def cut(text: str) -> str:
    """Returns a text of a client, cut to 61 characters if longer than 64."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_KEPT_CHARACTERS] + "..."


def to_integer(name: str, value: object, findings: Findings, *, words: str = "") -> int:
    """Returns a whole number: fractions are cut off and digits in text read, with a warning.

    Args:
        name: of the field.
        value: as received.
        findings: gets the warning.
        words: what else is allowed, for the message, for example "auto or ".

    Raises:
        InvalidRequest: INVALID_NUMBER.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        if value != int(value):
            message = f"'{name}' {value:g} cut to {int(value)}"
            findings.warn("COERCED_INT", message, name)
        return int(value)
    if isinstance(value, str):
        text = value.strip(_BLANKS)
        if len(text) <= _MAX_DIGITS and _INTEGER.fullmatch(text):
            findings.warn("COERCED_STRING", f"'{name}' was text and is read as a number", name)
            return int(text)
    raise _not_numeric(name, f"{words}an integer", value)


def to_number(name: str, value: object, findings: Findings) -> int | float:
    """Returns a finite number; text is read, with a warning.

    Raises:
        InvalidRequest: INVALID_NUMBER.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        text = value.strip(_BLANKS)
        if len(text) <= _MAX_DIGITS and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
            findings.warn("COERCED_STRING", f"'{name}' was text and is read as a number", name)
            return float(text)
    raise _not_numeric(name, "a number", value)


def check_range(
    name: str, number: float, shown: object, bounds: tuple[float, float], *, words: str = ""
) -> None:
    """Refuses a number outside its bounds.

    Args:
        name: of the field.
        number: as understood.
        shown: as received, for the message.
        bounds: lowest and highest, both allowed.
        words: what else is allowed, for the message.

    Raises:
        InvalidRequest: OUT_OF_RANGE.
    """
    low, high = bounds
    if not low <= number <= high:
        limits = f"{words}between {int(low)} and {int(high)}"
        raise refuse("OUT_OF_RANGE", f"'{name}' must be {limits}, got {value_text(shown)}", name)


def to_boolean(name: str, value: object, *, words: str = "") -> bool:
    """Returns true or false as they are.

    Raises:
        InvalidRequest: INVALID_TYPE.
    """
    if not isinstance(value, bool):
        raise refuse("INVALID_TYPE", f"'{name}' must be {words}a boolean", name)
    return value


def to_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Returns one of the choices.

    Raises:
        InvalidRequest: INVALID_CHOICE.
    """
    if not isinstance(value, str) or value not in choices:
        message = f"'{name}' must be one of {', '.join(choices)}, got {value_text(value)}"
        raise refuse("INVALID_CHOICE", message, name)
    return value


def to_text(name: str, value: object, most: int) -> str:
    """Returns a text without NUL characters, otherwise as it is.

    Raises:
        InvalidRequest: INVALID_TYPE, or OUT_OF_RANGE if it is too long.
    """
    if not isinstance(value, str):
        raise refuse("INVALID_TYPE", f"'{name}' must be a string", name)
    if len(value) > most:
        message = f"'{name}' must be at most {most} characters, got {len(value)}"
        raise refuse("OUT_OF_RANGE", message, name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse("INVALID_TYPE", f"'{name}' must be valid Unicode text", name) from None
    return value.replace("\0", "")


def to_object(name: str, value: object) -> Mapping[str, Any]:
    """Returns a JSON object as it is.

    Raises:
        InvalidRequest: INVALID_TYPE.
    """
    if not isinstance(value, Mapping):
        raise refuse("INVALID_TYPE", f"'{name}' must be an object", name)
    return value


def to_list(name: str, value: object) -> Sequence[Any]:
    """Returns a JSON list as it is.

    Raises:
        InvalidRequest: INVALID_TYPE.
    """
    if not isinstance(value, list | tuple):
        raise refuse("INVALID_TYPE", f"'{name}' must be a list", name)
    return value


def read_size(value: object) -> tuple[int, int]:
    """Returns width and height of WxH or W*H, in pixels.

    Raises:
        InvalidRequest: INVALID_NUMBER.
    """
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None or not isinstance(value, str) or not value.isascii():
        raise _not_numeric("size", "WIDTHxHEIGHT", value)
    return int(found[1]), int(found[2])


def json_bytes(value: object) -> int:
    """Returns the length of the JSON text in UTF-8, as the SDK of the platform writes it.

    Raises:
        ValueError: it cannot be sent: NaN, an infinity, half a surrogate pair, or nested too deep.
    """
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _not_numeric(name: str, kind: str, value: object) -> InvalidRequest:
    message = f"Invalid numeric parameter: '{name}' must be {kind}, got {value_text(value)}"
    return refuse("INVALID_NUMBER", message, name)
