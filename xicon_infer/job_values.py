"""One option at a time: from text or JSON to a value of the right type and range, or a refusal.

The messages are those of the request contract, so that the command line and a server say the
same. Types are strict: a number is not text, 6.0 is no integer, true is no number.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.job_fields import (
    MAX_LORA_STRENGTH,
    MAX_LORAS,
    MAX_PROMPT_CHARACTERS,
    Field,
)

_SHOWN_CHARACTERS = 64
_KEPT_CHARACTERS = 61

# Python's own int() and float() also take underscores, blanks and digits of other scripts.
_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Lora:
    """One LoRA: the name of a known file, or a path; strength -4 to 4, 0 switches it off."""

    name: str
    strength: float = 1.0


def refusal(field: str, message: str, code: str) -> InvalidRequest:
    """Returns the error for one option."""
    return InvalidRequest(message, field=field, code=code)


def shown(value: object) -> str:
    """Returns a value as JSON text for a message, cut to 61 characters if longer than 64."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_KEPT_CHARACTERS] + "..."


def check_value(field: Field, value: object) -> Any:
    """Returns the value as the option's type: `Path` for a path, float for a number.

    Raises:
        InvalidRequest: wrong type, not one of the choices, or out of range.
    """
    checks: dict[str, Callable[[Field, Any], Any]] = {
        "path": _check_path,
        "text": _check_text,
        "integer": _check_integer,
        "number": _check_number,
        "switch": _check_switch,
        "choice": _check_choice,
        "loras": _check_loras,
    }
    return checks[field.kind](field, value)


def value_from_text(field: Field, text: str) -> object:
    """Returns the value that a word of the command line stands for, ready for `check_value`.

    Text that is no number is passed on as it is, for `check_value` to refuse.
    """
    words = {str(word): word for word in (*field.choices, *field.also)}
    if text in words:
        return words[text]
    if field.kind == "integer" and _INTEGER.fullmatch(text):
        return int(text)
    if field.kind == "number" and _NUMBER.fullmatch(text):
        return float(text)
    return text


def _check_path(field: Field, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise refusal(
            field.name, f"'{field.name}' must be a path, got {shown(value)}", "INVALID_TYPE"
        )
    text = str(value)
    if not text.strip() or "\0" in text:
        message = f"'{field.name}' must be a path that is not empty, got {shown(text)}"
        raise refusal(field.name, message, "INVALID_VALUE")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        message = f"'{field.name}' must be a path; character {error.start} cannot be in one"
        raise refusal(field.name, message, "INVALID_VALUE") from None
    return Path(value)


def _check_text(field: Field, value: Any) -> str:
    if not isinstance(value, str):
        raise refusal(field.name, f"'{field.name}' must be a string", "INVALID_TYPE")
    if len(value) > MAX_PROMPT_CHARACTERS:
        message = (
            f"'{field.name}' must be at most {MAX_PROMPT_CHARACTERS} characters, got {len(value)}"
        )
        raise refusal(field.name, message, "OUT_OF_RANGE")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"'{field.name}' must be valid UTF-8 text; character {error.start} is not"
        raise refusal(field.name, message, "INVALID_TYPE") from None
    text = value.replace("\0", "")
    if field.pattern and not re.fullmatch(field.pattern, text):
        message = f"'{field.name}' must be {field.form}, got {shown(text)}"
        raise refusal(field.name, message, "INVALID_VALUE")
    return text


def _check_switch(field: Field, value: Any) -> bool:
    if not isinstance(value, bool):
        message = f"'{field.name}' must be true or false, got {shown(value)}"
        raise refusal(field.name, message, "INVALID_TYPE")
    return value


def _check_choice(field: Field, value: Any) -> Any:
    # True equals 1, and a list is no key: compare with the type.
    for choice in field.choices:
        if type(value) is type(choice) and value == choice:
            return choice
    allowed = ", ".join(str(choice) for choice in field.choices)
    message = f"'{field.name}' must be one of {allowed}, got {shown(value)}"
    raise refusal(field.name, message, "INVALID_CHOICE")


def _check_integer(field: Field, value: Any) -> Any:
    if isinstance(value, str) and value in field.also:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise _not_numeric(field, "an integer", value)
    return _in_range(field, value)


def _check_number(field: Field, value: Any) -> Any:
    if isinstance(value, str) and value in field.also:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise _not_numeric(field, "a number", value)
    return float(_in_range(field, value))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _not_numeric(field: Field, kind: str, value: object) -> InvalidRequest:
    words = "".join(f"{word} or " for word in field.also if isinstance(word, str))
    message = f"Invalid numeric parameter: '{field.name}' must be {words}{kind}, got {shown(value)}"
    return refusal(field.name, message, "INVALID_NUMBER")


def _in_range(field: Field, value: Any) -> Any:
    if value in field.also or field.low <= value <= field.high:
        return value
    words = "".join(f"{word} or " for word in field.also)
    message = (
        f"'{field.name}' must be {words}between {_bound(field.low)} and {_bound(field.high)}, "
        f"got {shown(value)}"
    )
    raise refusal(field.name, message, "OUT_OF_RANGE")


def _bound(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _check_loras(field: Field, value: Any) -> tuple[Lora, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        message = f"'{field.name}' must be a list, got {shown(value)}"
        raise refusal(field.name, message, "INVALID_TYPE")
    if len(value) > MAX_LORAS:
        message = f"'{field.name}' must have at most {MAX_LORAS} entries, got {len(value)}"
        raise refusal(field.name, message, "OUT_OF_RANGE")
    if list(value) == ["none"]:
        return ()
    return tuple(_check_lora(field, entry) for entry in value)


def _check_lora(field: Field, entry: Any) -> Lora:
    if isinstance(entry, Lora):
        entry = {"name": entry.name, "strength": entry.strength}
    if isinstance(entry, str):
        entry = _split_lora(entry)
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or set(entry) - {"name", "strength"}:
        message = f"'{field.name}' entries must be NAME[:strength] or {{name, strength}}"
        raise refusal(field.name, f"{message}, got {shown(entry)}", "INVALID_TYPE")
    if name in ("", "none") or "\0" in name:
        message = f"'{field.name}' must name a LoRA file; 'none' stands alone, got {shown(name)}"
        raise refusal(field.name, message, "INVALID_VALUE")
    limit = MAX_LORA_STRENGTH
    bounds = Field("loras.strength", "number", "model", "", low=-limit, high=limit)
    return Lora(name, _check_number(bounds, entry.get("strength", 1.0)))


def _split_lora(text: str) -> dict[str, object]:
    """Returns name and strength of NAME[:strength]; a colon in a file name stays in the name."""
    name, colon, tail = text.rpartition(":")
    if colon and _NUMBER.fullmatch(tail):
        return {"name": name, "strength": float(tail)}
    if colon and not set(tail) & set("./\\"):
        return {"name": name, "strength": tail}
    return {"name": text}
