"""From named fields to the resolved request: every field checked in the order of the contract."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xicon_infer.job_fields import MAX_LORA_STRENGTH, MAX_LORAS
from xicon_infer.media.address import check_url
from xicon_infer.request_defaults import default_of
from xicon_infer.request_field import RequestField
from xicon_infer.request_fields import (
    DIMENSION_MULTIPLE,
    FIRST,
    MAX_METADATA_BYTES,
    OUTPUT_FIELDS,
    REQUEST_FIELDS,
)
from xicon_infer.request_form import is_empty
from xicon_infer.request_types import Findings, Form, RequestContext
from xicon_infer.request_values import (
    check_range,
    json_bytes,
    read_size,
    refuse,
    to_boolean,
    to_choice,
    to_integer,
    to_list,
    to_number,
    to_object,
    to_text,
    value_text,
)
from xicon_infer.settings import Settings
from xicon_infer.settings_table import MODES, OTHER_MODES
from xicon_infer.types import latent_frames, pixel_frames

_TABLE = {field.name: field for field in REQUEST_FIELDS}
_ELSEWHERE = ("api_version", "mode", "image", "video", "pose_video", "size", "loras")
_ORDER = (
    *(name for name in FIRST if name != "size"),
    *(name for name in _TABLE if name not in (*FIRST, *_ELSEWHERE)),
)
_ATTENTION = {"sageattn": "sage"}
"""The spelling of the ComfyUI node."""
_PREFIX = re.compile(r"[A-Za-z0-9._-]*")


def read_mode(
    fields: Mapping[str, Any], settings: Settings, context: RequestContext, findings: Findings
) -> tuple[str, bool]:
    """Returns the mode, and whether it could be read; if not, the rest is checked as for scail."""
    before = len(findings.errors)
    mode = MODES[0]
    with findings.collect():
        given = fields.get("mode", mode)
        plain = given.lower().replace("-", "_") if isinstance(given, str) else ""
        plain = OTHER_MODES.get(plain, plain)
        mode = plain if plain in MODES else to_choice("mode", given, MODES)
        if mode not in settings.modes or mode not in context.modes:
            message = f"Mode '{mode}' is not available on this worker"
            raise refuse("MODE_UNAVAILABLE", message, "mode")
    return mode, len(findings.errors) == before


def check_prompt(fields: Mapping[str, Any], mode: str, findings: Findings) -> None:
    """Refuses a text-to-video request that says nothing."""
    prompt = fields.get("prompt")
    if mode == "wan_t2v" and (is_empty(prompt) or (isinstance(prompt, str) and _blank(prompt))):
        findings.errors.append(refuse("MISSING_FIELD", "Missing 'prompt' parameter", "prompt"))


def resolve_fields(
    fields: Mapping[str, Any],
    mode: str,
    form: Form,
    settings: Settings,
    findings: Findings,
) -> dict[str, Any]:
    """Returns every field but the media and LoRAs, checked, repaired and with defaults.

    Args:
        fields: by main names.
        mode: what to make.
        form: sets some defaults.
        settings: limits and further defaults.
        findings: gets faults and warnings.
    """
    given = dict(fields)
    for name in ("prompt", "negative_prompt"):
        if form == "legacy_nested" and is_empty(given.get(name)):
            given.pop(name, None)
    resolved: dict[str, Any] = {"mode": mode}
    for name in _ORDER:
        field = _TABLE[name]
        if name == "width":
            given = _with_size(given, findings)
        resolved[name] = default_of(field, resolved, form, settings)
        with findings.collect():
            if name in given:
                resolved[name] = _check(field, given[name], settings, findings)
        _check_together(name, resolved, settings, findings)
    for name in ("width", "height", "num_frames"):
        resolved[name] = resolved[name] and _lowered(name, resolved[name])
    return resolved


def read_loras(
    given: Any, context: RequestContext, findings: Findings
) -> list[dict[str, str | float]]:
    """Returns the LoRAs as {name, strength}; only names of installed files.

    Args:
        given: a list of {name, strength}.
        context: the installed files.
        findings: gets faults and warnings.
    """
    with findings.collect():
        entries = to_list("loras", given)
        if len(entries) > MAX_LORAS:
            message = f"'loras' must have at most {MAX_LORAS} entries, got {len(entries)}"
            raise refuse("OUT_OF_RANGE", message, "loras")
        return [_lora(entry, context, findings) for entry in entries]
    return []


def _blank(text: str) -> bool:
    return not text.replace("\0", "").strip()


def _with_size(given: dict[str, Any], findings: Findings) -> dict[str, Any]:
    """Returns the fields with width and height of `size`, where neither is given itself."""
    if "size" not in given:
        return given
    if "width" in given or "height" in given:
        message = "'size' is ignored: width or height is given"
        findings.warn("PARAM_PRECEDENCE", message, "size")
        return given
    with findings.collect():
        width, height = read_size(given["size"])
        return {**given, "width": width, "height": height}
    return given


def _check(field: RequestField, value: Any, settings: Settings, findings: Findings) -> Any:
    """Returns the value of a field, by its kind."""
    name = field.name
    if field.auto and value == "auto":
        return value
    if field.kind in ("integer", "number"):
        return _checked_number(field, value, settings, findings)
    if field.kind == "boolean":
        return to_boolean(name, value, words="auto or " if field.auto else "")
    if field.kind == "choice":
        word = (
            _ATTENTION.get(value) if name == "attention_mode" and isinstance(value, str) else None
        )
        return word or to_choice(name, value, field.choices)
    if field.kind == "text":
        return to_text(name, value, int(field.high))
    if name == "output":
        return _read_output(value, settings, findings)
    return _read_metadata(value)


def _checked_number(
    field: RequestField, value: Any, settings: Settings, findings: Findings
) -> int | float | None:
    """Returns a number in its range, repaired where the contract says so; None for seed -1."""
    name, words = field.name, "auto or " if field.auto else ""
    number: int | float
    if field.kind == "integer":
        number = to_integer(name, value, findings, words=words)
    else:
        number = to_number(name, value, findings)
    high = getattr(settings, field.limit) if field.limit else field.high
    if name == "seed":
        if number == -1:
            return None
        words = "-1 or "
    check_range(name, number, value, (field.low, high), words=words)
    lowered = _lowered(name, number)
    if lowered != number:
        code = "FRAMES_ROUNDED" if name == "num_frames" else "DIMENSION_ROUNDED"
        findings.warn(code, f"'{name}' {number} lowered to {lowered}", name)
    return lowered if field.kind == "integer" else float(lowered)


def _lowered(name: str, number: int | float) -> int | float:
    """Returns the next lower number that the model can make: a multiple of 32, or 4n + 1."""
    if name in ("width", "height"):
        return int(number) // DIMENSION_MULTIPLE * DIMENSION_MULTIPLE
    return pixel_frames(latent_frames(int(number))) if name == "num_frames" else number


def _check_together(
    name: str, resolved: Mapping[str, Any], settings: Settings, findings: Findings
) -> None:
    """Checks what a field and the ones before it must be together."""
    with findings.collect():
        if name == "context_overlap":
            width, height = resolved["width"], resolved["height"]
            if width * height > settings.max_pixels:
                limit = f"exceeds the limit of {settings.max_pixels} pixels"
                message = f"Resolution {width}x{height} {limit}"
                findings.errors.append(refuse("PIXELS_EXCEEDED", message, "width"))
            if resolved["context_overlap"] >= resolved["context_frames"]:
                message = "'context_overlap' must be smaller than 'context_frames'"
                raise refuse("OUT_OF_RANGE", message, "context_overlap")
        starts = {"pose_end": "pose_start", "end_cond_cfg": "st_cond_cfg"}
        if name in starts and resolved[starts[name]] > resolved[name]:
            message = f"'{starts[name]}' must not be larger than '{name}'"
            raise refuse("OUT_OF_RANGE", message, starts[name])


def _read_metadata(value: Any) -> Mapping[str, Any]:
    to_object("metadata", value)
    try:
        size = json_bytes(value)
    except ValueError:
        raise refuse("INVALID_TYPE", "'metadata' must be plain JSON", "metadata") from None
    if size > MAX_METADATA_BYTES:
        message = f"'metadata' must be at most {MAX_METADATA_BYTES} bytes, got {size}"
        raise refuse("OUT_OF_RANGE", message, "metadata")
    return value


def _read_output(value: Any, settings: Settings, findings: Findings) -> dict[str, Any]:
    """Returns the options of the result; a wrong one leaves its default."""
    given = to_object("output", value)
    resolved: dict[str, Any] = {}
    for field in OUTPUT_FIELDS:
        resolved[field.name] = default_of(field, {}, "native", settings)
        with findings.collect():
            if given.get(field.name) is not None:
                resolved[field.name] = _checked_output(field, given[field.name], settings, findings)
    return resolved


def _checked_output(field: RequestField, value: Any, settings: Settings, findings: Findings) -> Any:
    name = f"output.{field.name}"
    if field.kind == "integer":
        number = to_integer(name, value, findings)
        check_range(name, number, value, (field.low, field.high))
        return number
    if field.kind == "boolean":
        return to_boolean(name, value)
    if field.kind == "choice":
        return to_choice(name, value, field.choices)
    text = to_text(name, value, int(field.high))
    if field.kind == "url":
        if value[:5].lower() == "http:":
            raise refuse("URL_SCHEME", f"Unsupported URL scheme 'http' for '{name}'", name)
        check_url(value, name, settings)
    elif not _PREFIX.fullmatch(value):
        message = f"'{name}' must be a string of A-Z, a-z, 0-9, '.', '_' and '-'"
        raise refuse("INVALID_TYPE", message, name)
    return text or None


def _lora(entry: Any, context: RequestContext, findings: Findings) -> dict[str, str | float]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        message = "'loras' must be a list of objects with 'name' and 'strength'"
        raise refuse("INVALID_TYPE", message, "loras")
    name = entry["name"]
    if name not in context.loras:
        raise refuse("LORA_NOT_FOUND", f"Unknown LoRA {value_text(name)}", "loras")
    given = entry.get("strength")
    strength = 1.0 if given is None else to_number("loras.strength", given, findings)
    check_range("loras.strength", strength, given, (-MAX_LORA_STRENGTH, MAX_LORA_STRENGTH))
    return {"name": name, "strength": float(strength)}
