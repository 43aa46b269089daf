"""One request case against the validator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xicon_infer.request import Request, RequestContext, RequestError, parse_request
from xicon_infer.settings import Settings, read_settings


def replay(case: Mapping[str, Any]) -> str:
    """Returns why a case fails, "" if it does not."""
    expected = case["expect"]
    settings = read_settings(case.get("env") or {})
    try:
        request = parse_request(case["job"], settings, context_of(case, settings))
    except RequestError as error:
        return rejection_fault(expected, error)
    return acceptance_fault(expected, request)


def context_of(case: Mapping[str, Any], settings: Settings) -> RequestContext:
    """Returns what the worker of a case has."""
    given = case.get("context") or {}
    return RequestContext(
        default_driving_video=given.get("default_driving_video", False),
        loras=tuple(given.get("loras") or ()),
        input_files=tuple(given.get("input_files") or ()),
        modes=settings.modes,
    )


def rejection_fault(expected: Mapping[str, Any], error: RequestError) -> str:
    """Returns what is wrong with a refusal."""
    text = f"{error.message} [{error.code}]"
    if expected["outcome"] != "reject":
        return f"refused: {text}"
    found = {"error": text, "error_code": error.code, "field": error.field}
    for name, value in found.items():
        if name in expected and expected[name] != value:
            return f"{name} is {value!r}, not {expected[name]!r}"
    return ""


def acceptance_fault(expected: Mapping[str, Any], request: Request) -> str:
    """Returns what is wrong with a request that was understood."""
    if expected["outcome"] != "accept":
        return f"accepted, not {expected.get('error')!r}"
    if expected.get("form", request.form) != request.form:
        return f"form is {request.form}, not {expected['form']}"
    for name, value in (expected.get("resolved") or {}).items():
        if name not in request.resolved:
            return f"{name} is not resolved"
        if not same(request.resolved[name], value):
            return f"{name} is {request.resolved[name]!r}, not {value!r}"
    warnings = sorted(warning.code for warning in request.warnings)
    if sorted(expected.get("warnings", warnings)) != warnings:
        return f"warnings are {warnings}, not {expected['warnings']}"
    return ""


def same(found: Any, value: Any) -> bool:
    """Returns True for equal JSON; numbers by value, but true is no number."""
    if isinstance(value, Mapping):
        return (
            isinstance(found, Mapping)
            and set(found) == set(value)
            and all(same(found[name], part) for name, part in value.items())
        )
    if isinstance(value, list):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(value)
            and all(same(*pair) for pair in zip(found, value, strict=True))
        )
    return isinstance(found, bool) == isinstance(value, bool) and found == value
