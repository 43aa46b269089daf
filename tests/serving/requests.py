"""Small requests for tests, and how to have them checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from xicon_infer.request import Request, RequestContext, RequestError, parse_request
from xicon_infer.settings import read_settings

IMAGE = "https://cdn.example.com/ref.png"
VIDEO = "https://cdn.example.com/dance.mp4"
LORAS = ("a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors", "e.safetensors")

LEAST: dict[str, dict[str, Any]] = {
    "scail": {"mode": "scail", "image": IMAGE, "video": VIDEO},
    "steady_dancer": {"mode": "steady_dancer", "image": IMAGE, "video": VIDEO},
    "wan_i2v": {"mode": "wan_i2v", "image": IMAGE},
    "wan_t2v": {"mode": "wan_t2v", "prompt": "a fox"},
    "pose_only": {"mode": "pose_only", "video": VIDEO},
}
NESTED: dict[str, Any] = {
    "images": {"reference_image": IMAGE},
    "videos": {"dance_video": VIDEO},
    "prompt": "p",
}
FLAT: dict[str, Any] = {"image_url": IMAGE, "video_url": VIDEO}


def parse(
    fields: Any, env: Mapping[str, str] | None = None, event: Any = None, **context: Any
) -> Request:
    """Returns the request of these fields on a worker with some LoRAs."""
    settings = read_settings(env or {})
    given = {"modes": settings.modes, "loras": LORAS, **context}
    job = {"id": "job-1", "input": fields, **(event or {})}
    return parse_request(job, settings, RequestContext(**given))


def refused(fields: Any, env: Mapping[str, str] | None = None, **context: Any) -> RequestError:
    """Returns the refusal of these fields."""
    with pytest.raises(RequestError) as caught:
        parse(fields, env, **context)
    return caught.value


def said(fields: Any, env: Mapping[str, str] | None = None, **context: Any) -> str:
    """Returns the refusal as the platform shows it."""
    error = refused(fields, env, **context)
    return f"{error.message} [{error.code}]"


def codes(request: Request) -> list[str]:
    """Returns the codes of the warnings of validation."""
    return sorted(warning.code for warning in request.warnings)


def scail(**more: Any) -> dict[str, Any]:
    """Returns a native request of mode scail."""
    return {**LEAST["scail"], **more}
