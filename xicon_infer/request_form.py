"""From what the platform hands over to named fields: envelope, form and other spellings."""

from __future__ import annotations

import difflib
import json
import uuid
from collections.abc import Mapping
from itertools import islice
from typing import Any

from xicon_infer.errors import InvalidRequest
from xicon_infer.job_fields import MAX_LORAS
from xicon_infer.request_fields import (
    API_VERSION,
    FLAT_KEYS,
    NESTED,
    OUTPUT_FIELDS,
    REQUEST_FIELDS,
)
from xicon_infer.request_types import MEDIA_KINDS, Findings, Form, RequestError
from xicon_infer.request_values import cut, refuse, to_object, value_text

ACTIONS = ("health",)

_MAX_ID_CHARACTERS = 256
_MAX_UNKNOWN = 100
"""Unknown fields that are told one by one; a request of a million names must cost nothing."""

_NATIVE_MARKS = ("mode", "api_version", "image", "video", "pose_video")
_NESTED_NAMES = tuple(outer for outer, _ in NESTED.values())
_MAIN_NAMES = tuple(field.name for field in REQUEST_FIELDS)
_SPELLINGS = {other: field.name for field in REQUEST_FIELDS for other in field.spellings}
_FORM_NAMES = ("action", "workflow", *FLAT_KEYS, *_NESTED_NAMES)
_KNOWN = (*_MAIN_NAMES, *_SPELLINGS, *_FORM_NAMES)
_OUTPUT_NAMES = tuple(field.name for field in OUTPUT_FIELDS)
_LORA_NAMES = ("name", "strength")

BESIDE_WORKFLOW = (
    "api_version",
    "output",
    "dry_run",
    "strict",
    "timeout_s",
    "metadata",
    "response_format",
)
"""Fields that count beside a workflow, which says everything about the video itself."""


def request_id(event: object) -> str:
    """Returns the id of the job, or a new one."""
    found = event.get("id") if isinstance(event, Mapping) else None
    if not isinstance(found, str) or not found:
        return f"local-{uuid.uuid4().hex[:16]}"
    return found.encode("utf-8", "backslashreplace").decode()[:_MAX_ID_CHARACTERS]


def read_input(event: object) -> dict[str, Any]:
    """Returns the fields of an envelope that are given: null means left out.

    Raises:
        RequestError: INPUT_REQUIRED, INVALID_JSON or INVALID_TYPE.
    """
    raw = event.get("input") if isinstance(event, Mapping) else None
    if isinstance(raw, str):
        raw = parse_json(raw, "Invalid JSON format in input", "input")
    if raw is None:
        raise RequestError(refuse("INPUT_REQUIRED", "Please provide input", "input"))
    if not isinstance(raw, Mapping):
        raise RequestError(refuse("INVALID_TYPE", "'input' must be a JSON object", "input"))
    return {str(name): value for name, value in raw.items() if value is not None}


def parse_json(text: str, message: str, field: str) -> Any:
    """Returns what a JSON text says.

    Raises:
        RequestError: INVALID_JSON with the message; also for a nest that is too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(refuse("INVALID_JSON", message, field)) from None


def choose_form(fields: Mapping[str, Any]) -> Form:
    """Returns the form in which a request is written.

    Args:
        fields: those that are given.
    """
    if "action" in fields:
        return "action"
    if "workflow" in fields:
        return "workflow"
    if any(name in fields for name in _NATIVE_MARKS):
        return "native"
    return "legacy_flat" if any(name in fields for name in FLAT_KEYS) else "legacy_nested"


def check_action(fields: Mapping[str, Any]) -> str:
    """Returns the action.

    Raises:
        RequestError: UNSUPPORTED_ACTION.
    """
    action = fields["action"]
    if not isinstance(action, str) or action not in ACTIONS:
        message = f"Unsupported action {value_text(action)}"
        raise RequestError(refuse("UNSUPPORTED_ACTION", message, "action"))
    return action


def check_version(fields: Mapping[str, Any], findings: Findings) -> None:
    """Refuses every version of the contract but this one.

    Raises:
        RequestError: UNSUPPORTED_VERSION.
    """
    version = fields.get("api_version", API_VERSION)
    if isinstance(version, str) and version.strip() == str(API_VERSION):
        message = "'api_version' was text and is read as a number"
        findings.warn("COERCED_STRING", message, "api_version")
    elif isinstance(version, bool) or version != API_VERSION:
        message = f"Unsupported api_version {value_text(version)}"
        raise RequestError(refuse("UNSUPPORTED_VERSION", message, "api_version"))


def main_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields by their main names; a main name wins over its other spellings."""
    named = {name: value for name, value in fields.items() if name not in _SPELLINGS}
    for other, main in _SPELLINGS.items():
        if other in fields and main not in named:
            named[main] = fields[other]
    return named


def check_nested(fields: Mapping[str, Any], findings: Findings, *, lenient: bool) -> set[str]:
    """Refuses a legacy nested request without its required keys, in the order of the original.

    Args:
        fields: by main names.
        findings: gets the faults.
        lenient: accept a missing `videos` or `prompt`, as a later worker did.

    Returns:
        What is missing or of a wrong type: "image", "video", "prompt"; needs no second look.
    """
    bad = set()
    before = len(findings.errors)
    with findings.collect():
        if "images" not in fields:
            raise _missing("Missing 'images' parameter", "images")
        images = to_object("images", fields["images"])
        if images.get("reference_image") in (None, ""):
            message = "Missing 'reference_image' in images"
            raise _missing(message, "images.reference_image")
    if len(findings.errors) > before:
        bad.add("image")
    before = len(findings.errors)
    with findings.collect():
        if "videos" not in fields and not lenient:
            raise _missing("Missing 'videos' parameter", "videos")
        to_object("videos", fields.get("videos", {}))
    if len(findings.errors) > before:
        bad.add("video")
    if is_empty(fields.get("prompt")) and not lenient:
        findings.errors.append(_missing("Missing 'prompt' parameter", "prompt"))
        bad.add("prompt")
    return bad


def check_containers(fields: Mapping[str, Any], findings: Findings) -> set[str]:
    """Refuses nested objects that are none, where another form may use them too.

    Returns:
        Roles that cannot be looked at.
    """
    bad = set()
    for role, (outer, _) in NESTED.items():
        before = len(findings.errors)
        with findings.collect():
            to_object(outer, fields.get(outer, {}))
        if len(findings.errors) > before:
            bad.add(role)
    return bad


def is_empty(value: object) -> bool:
    """Returns True for what counts as no text: nothing, or nothing but NUL characters."""
    return value is None or (isinstance(value, str) and not value.replace("\0", ""))


def check_unknown(
    fields: Mapping[str, Any], findings: Findings, *, strict: bool, form: Form
) -> None:
    """Warns of every field that means nothing, or refuses it.

    Args:
        fields: as given, before other spellings are read.
        findings: gets a warning or a fault for each.
        strict: refuse.
        form: beside a workflow only few fields count.
    """
    for name, near in _unknown_names(fields, form):
        shown = cut(name)
        if strict:
            findings.errors.append(refuse("UNKNOWN_FIELD", f"Unknown field '{shown}'", shown))
            continue
        hint = f"; did you mean '{near}'?" if near else ""
        findings.warn("UNKNOWN_FIELD", f"Unknown field '{shown}' is ignored{hint}", shown)
    if form == "workflow":
        for name in fields:
            if name in _KNOWN and name not in (*BESIDE_WORKFLOW, "workflow", "images"):
                message = f"'{name}' has no effect beside 'workflow'"
                findings.warn("UNUSED_FIELD", message, name)


def _unknown_names(fields: Mapping[str, Any], form: Form) -> list[tuple[str, str]]:
    """Returns every unknown name, those of inner objects with a dot, and the known name nearest."""
    unknown = islice((name for name in fields if name not in _KNOWN), _MAX_UNKNOWN)
    found = [(name, _near(name, _KNOWN)) for name in unknown]
    inner: list[tuple[str, object, tuple[str, ...]]] = [
        ("output", fields.get("output"), _OUTPUT_NAMES)
    ]
    if form != "workflow":
        inner += [(outer, fields.get(outer), (key,)) for outer, key in NESTED.values()]
        inner += [
            (role, fields.get(role), MEDIA_KINDS) for role in ("image", "video", "pose_video")
        ]
    loras = fields.get("loras")
    entries = loras if isinstance(loras, list) else []
    inner += [("loras", entry, _LORA_NAMES) for entry in entries[:MAX_LORAS]]
    found += [
        (f"{outer}.{key}", _near(str(key), names))
        for outer, value, names in inner
        for key, content in islice(
            value.items() if isinstance(value, Mapping) else (), _MAX_UNKNOWN
        )
        if content is not None and str(key) not in names
    ]
    return found[:_MAX_UNKNOWN]


def _near(name: str, names: tuple[str, ...]) -> str:
    return next(iter(difflib.get_close_matches(name[:64], names, n=1)), "")


def _missing(message: str, field: str) -> InvalidRequest:
    return refuse("MISSING_FIELD", message, field)
