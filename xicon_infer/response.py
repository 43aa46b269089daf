"""The answers of the worker, as dictionaries for the SDK of the platform.

Pure functions: what was made comes in, what the client gets goes out. A message may name fields
and codes, never a path, an address or a traceback; those go to the log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xicon_infer.errors import XiconError
from xicon_infer.request_types import Request, RequestError, RequestWarning
from xicon_infer.request_values import json_bytes
from xicon_infer.response_codes import CODES

__all__ = [
    "dry_run_answer",
    "failure",
    "health",
    "json_bytes",
    "legacy_video",
    "media_entry",
    "safe_message",
    "success",
]

MEDIA_FORMATS = {"mp4": "video/h264-mp4", "webm": "video/webm", "gif": "image/gif"}
"""Container -> the word that the answers of older workers had."""

_INTERNAL = "Something went wrong in the worker; its log tells more under this request id"
_MAX_MESSAGE_CHARACTERS = 1000
_MAX_ERRORS = 20

_SECRETS = (
    re.compile(r"(?<![\w:/])~?(?:/[\w.@+~-]+){2,}/?"),  # paths of files
    re.compile(r"\b[A-Za-z]:\\[^\s'\"]*"),
    re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"),
    re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,}[0-9a-fA-F]{0,4}"),
    re.compile(r"(?<=[\w/])\?[^\s'\"]+"),  # the query of an address
    re.compile(r"(?<=://)[^\s/@'\"]+@"),
)


def success(
    request: Request,
    *,
    videos: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]] = (),
    errors: Sequence[str] = (),
    warnings: Iterable[RequestWarning] = (),
) -> dict[str, Any]:
    """Returns the answer about a video, in the form that the request asked for.

    Args:
        request: its own warnings come first.
        videos: from `media_entry`; put in order, the result first.
        metadata: of the run; id, mode, form and the client's own are added.
        images: only if asked for.
        errors: faults that did not prevent the result.
        warnings: of the run.
    """
    ordered = sorted((dict(video) for video in videos), key=lambda v: v.get("role") != "result")
    answer: dict[str, Any] = {"status": "success", "videos": ordered}
    if images:
        answer["images"] = [dict(image) for image in images]
    answer |= {
        "errors": [safe_message(error) for error in errors],
        "warnings": _told(request, warnings),
        "metadata": {
            "request_id": request.id,
            "mode": request.mode,
            "form": request.form,
            **metadata,
            "client": request.metadata,
        },
    }
    return legacy_video(answer) if request.response_format == "legacy_video" else answer


def legacy_video(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer as two of the older workers gave it: the first video and no list."""
    first = answer["videos"][0]
    return {
        "video": first["data"],
        "video_type": first["type"],
        "status": answer["status"],
        "warnings": answer["warnings"],
        "metadata": answer["metadata"],
    }


def media_entry(
    *, filename: str, kind: str, data: str, container: str, role: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entry of one file.

    Args:
        filename: without a folder.
        kind: s3_url, base64 or path.
        data: link, text, or path relative to the volume.
        container: mp4, webm, gif, or the format of a picture.
        role: result or pose.
        facts: width, height, fps, frames, duration_s, size_bytes, sha256, expires_at.
    """
    known = MEDIA_FORMATS.get(container, f"image/{container}")
    entry = {"filename": filename, "type": kind, "data": data, "format": known, "role": role}
    return {**entry, **{name: value for name, value in facts.items() if value is not None}}


def dry_run_answer(request: Request) -> dict[str, Any]:
    """Returns the resolved request; base64 is replaced by its length."""
    return {
        "status": "valid",
        "request": {name: _short(value) for name, value in request.resolved.items()},
        "warnings": _told(request, ()),
        "metadata": {
            "request_id": request.id,
            "mode": request.mode,
            "form": request.form,
            "client": request.metadata,
        },
    }


def health(
    *, degraded: Sequence[str], facts: Mapping[str, Any], jobs_done: int, last_error: str | None
) -> dict[str, Any]:
    """Returns the answer to action health.

    Args:
        degraded: what is amiss although the worker runs, one sentence each; they go out without
            paths and addresses.
        facts: versions, gpu, vram_total_bytes, vram_free_bytes, disk_free_bytes, modes,
            uptime_s; other names are left out, so that no path or environment slips in.
        jobs_done: since the start.
        last_error: its code.
    """
    allowed = ("versions", "gpu", "vram_total_bytes", "vram_free_bytes", "disk_free_bytes")
    shown = {name: facts[name] for name in (*allowed, "modes", "uptime_s") if name in facts}
    status = "degraded" if degraded else "healthy"
    reasons = [safe_message(reason) for reason in degraded]
    told = {"status": status, "reasons": reasons} if reasons else {"status": status}
    return {**told, **shown, "jobs_done": jobs_done, "last_error": last_error}


def failure(
    error: BaseException,
    *,
    request_id: str,
    stage: str = "validate",
    hint: str | None = None,
    refresh_worker: bool = False,
) -> dict[str, Any]:
    """Returns the answer about a failed job; `error` in it is always a text.

    Args:
        error: anything that is no `XiconError` is a bug, and its text stays in the log.
        request_id: of the job.
        stage: where it failed.
        hint: what to do, in place of the one of the code.
        refresh_worker: ask the platform for a fresh worker.
    """
    code = error.code if isinstance(error, XiconError) else "INTERNAL"
    message = _message(error)
    others = error.errors if isinstance(error, RequestError) else ()
    answer: dict[str, Any] = {
        "error": f"{message} [{code}]",
        "error_code": code,
        "error_detail": {
            "code": code,
            "message": message,
            "field": error.field if isinstance(error, XiconError) else None,
            "stage": stage,
            "retryable": code in CODES and CODES[code].retryable,
            "request_id": request_id,
            "hint": hint or (CODES[code].hint if code in CODES else "") or None,
            "errors": [
                {"code": one.code, "message": one.message, "field": one.field}
                for one in others[:_MAX_ERRORS]
            ],
        },
    }
    return answer | {"refresh_worker": True} if refresh_worker else answer


def safe_message(text: str) -> str:
    """Returns a message without paths, addresses of machines, queries and credentials of URLs."""
    for pattern in _SECRETS:
        text = pattern.sub("(hidden)", text)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text[:_MAX_MESSAGE_CHARACTERS]


def _message(error: BaseException) -> str:
    """Returns the text of an error; a refused request holds nothing but the client's own words."""
    if isinstance(error, RequestError):
        return error.message
    return safe_message(error.message) if isinstance(error, XiconError) else _INTERNAL


def _told(request: Request, warnings: Iterable[RequestWarning]) -> list[dict[str, Any]]:
    every = (*request.warnings, *request.adaptations, *warnings)
    return [{**one.as_json(), "message": safe_message(one.message)} for one in every]


def _short(value: Any) -> Any:
    if isinstance(value, Mapping) and value.get("kind") == "base64":
        return {"kind": "base64", "value": f"{len(value['value'])} characters"}
    return value
