"""The pictures and videos of a request: where each stands, of which kind it is, what is required.

Nothing is opened here: URLs are judged by their text, paths by their spelling.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xicon_infer.media.address import check_url
from xicon_infer.request_field import DANCING, DRIVEN
from xicon_infer.request_fields import NESTED
from xicon_infer.request_types import (
    MEDIA_KINDS,
    ROLES,
    Findings,
    Form,
    Media,
    MediaKind,
    RequestContext,
)
from xicon_infer.request_values import refuse
from xicon_infer.settings import Settings

_MAX_PATH_CHARACTERS = 4096
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_DATA = re.compile(
    r"data:(image/[\w.+-]+|video/[\w.+-]+|application/octet-stream)(;[\w.+-]+=[^;,\s]*)*;base64",
    re.IGNORECASE | re.ASCII,
)
_MAX_HEADER_CHARACTERS = 256

_DROPPED: Mapping[str, tuple[str, ...]] = {
    "wan_t2v": ROLES,
    "wan_i2v": ("video", "pose_video"),
    "pose_only": ("pose_video",),
}
"""Mode -> roles that it cannot use."""


def read_media(
    fields: Mapping[str, Any],
    mode: str,
    settings: Settings,
    findings: Findings,
    names: frozenset[str] = frozenset(),
) -> tuple[dict[str, Media], set[str]]:
    """Returns the media by role, and the roles that have a fault.

    Args:
        fields: by main names.
        mode: says which roles it has no use for.
        settings: of URLs and paths.
        findings: gets faults and warnings.
        names: bare file names that may stand for files below the input roots.
    """
    found: dict[str, Media] = {}
    bad: set[str] = set()
    dropped = []
    for role in ROLES:
        sources = _sources(fields, role)
        if sources and role in _DROPPED.get(mode, ()):
            dropped.append(role)
            continue
        if len(sources) > 1:
            message = f"several sources for '{role}': {sources[0][0]} is used"
            findings.warn("MEDIA_PRECEDENCE", message, role)
        before = len(findings.errors)
        with findings.collect():
            if sources:
                found[role] = _read_one(role, *sources[0][1:], settings, findings, names)
        if len(findings.errors) > before:
            bad.add(role)
    if dropped:
        message = f"mode {mode} does not use {', '.join(dropped)}"
        findings.warn("UNUSED_FIELD", message, dropped[0])
    return found, bad


def require_media(
    found: dict[str, Media],
    bad: set[str],
    mode: str,
    form: Form,
    context: RequestContext,
    findings: Findings,
) -> None:
    """Adds the default driving video where one is needed, and refuses what is missing.

    Args:
        found: by role; gets the default.
        bad: roles whose fault was told already.
        mode: says what is needed.
        form: words of the message.
        context: whether there is a default.
        findings: gets faults and warnings.
    """
    if mode in (*DANCING, "wan_i2v") and not {"image"} & (bad | found.keys()):
        flat = "Image input is required. Provide image_path, image_url, or image_base64"
        message = flat if form == "legacy_flat" else "Missing 'image' parameter"
        findings.errors.append(refuse("MISSING_FIELD", message, "image"))
    if mode not in DRIVEN or {"video", "pose_video"} & (bad | found.keys()):
        return
    if context.default_driving_video:
        found["video"] = Media("default", None)
        message = "no driving video was given: the worker's own is used"
        findings.warn("DEFAULT_VIDEO_USED", message, "video")
        return
    message = "No driving video: provide one or configure XICON_DEFAULT_VIDEO"
    findings.errors.append(refuse("DRIVING_VIDEO_REQUIRED", message, "video"))


def _sources(fields: Mapping[str, Any], role: str) -> list[tuple[str, MediaKind | None, Any]]:
    """Returns key, kind that the key tells, and value of each source that is not empty."""
    keys: list[tuple[str, MediaKind | None, Any]] = [(role, None, fields.get(role))]
    if role in NESTED:
        kinds: tuple[MediaKind, ...] = ("path", "url", "base64")
        keys += [(f"{role}_{kind}", kind, fields.get(f"{role}_{kind}")) for kind in kinds]
        outer, key = NESTED[role]
        inside = fields.get(outer)
        value = inside.get(key) if isinstance(inside, Mapping) else None
        keys.append((f"{outer}.{key}", None, value))
    return [source for source in keys if not _absent(source[2])]


def _absent(value: object) -> bool:
    if isinstance(value, Mapping):
        given = [value[kind] for kind in MEDIA_KINDS if value.get(kind) is not None]
        return bool(given) and all(part == "" for part in given)
    return value is None or value == ""


def _read_one(
    role: str,
    kind: MediaKind | None,
    value: Any,
    settings: Settings,
    findings: Findings,
    names: frozenset[str],
) -> Media:
    if isinstance(value, Mapping):
        kinds = [kind for kind in MEDIA_KINDS if value.get(kind) not in (None, "")]
        if len(kinds) != 1:
            raise _invalid(role, "must have exactly one of url, base64, path")
        kind = kinds[0]
        value = value[kind]
    if not isinstance(value, str):
        raise _invalid(role, "must be a string or an object")
    if value[:5].lower() == "data:":
        kind = "base64"
    elif kind == "path" and "://" in value:
        findings.warn("MEDIA_KIND", f"the path of '{role}' is a URL and is read as one", role)
        kind = "url"
    elif kind is None:
        kind = _kind_of(role, value)
    if kind == "url":
        check_url(value, role, settings)
        return Media(kind, value)
    if kind == "path":
        return Media(kind, value if value in names else _checked_path(role, value, settings))
    _check_base64(role, value, settings)
    return Media("base64", value)


def _kind_of(role: str, value: str) -> MediaKind:
    if _SCHEME.match(value):
        return "url"
    if value.startswith("/"):
        return "path"
    raise _invalid(role, "must be a URL, a data URI or an object")


def _checked_path(role: str, value: str, settings: Settings) -> str:
    """Returns the path without dots and double slashes, if it is below an input root."""
    allowed = value.startswith("/") and len(value) <= _MAX_PATH_CHARACTERS and _encodable(value)
    path = "/" + posixpath.normpath(value).lstrip("/")
    below = [root for root in settings.input_roots if root in Path(path).parents]
    if not allowed or not below:
        message = f"Path for '{role}' is not under an allowed input directory"
        raise refuse("PATH_NOT_ALLOWED", message, role)
    return path


def _encodable(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _check_base64(role: str, value: str, settings: Settings) -> None:
    """Refuses what cannot be base64 of a picture or video, without decoding it.

    Raises:
        InvalidRequest: INVALID_BASE64 or MEDIA_TOO_LARGE.
    """
    text = value
    if value[:5].lower() == "data:":
        header, comma, text = value.partition(",")
        if not comma or len(header) > _MAX_HEADER_CHARACTERS or not _DATA.fullmatch(header):
            message = f"Data URI for '{role}' must be base64 of an image or a video"
            raise refuse("INVALID_BASE64", message, role)
    most = settings.max_image_bytes if role == "image" else settings.max_video_bytes
    blanks = sum(text.count(blank) for blank in " \t\r\n")
    if (len(text) - blanks) * 3 // 4 > most + 2:  # up to two characters may be padding
        message = f"'{role}' is larger than the limit of {most} bytes"
        raise refuse("MEDIA_TOO_LARGE", message, role)


def _invalid(role: str, problem: str) -> Exception:
    return refuse("INVALID_MEDIA", f"'{role}' {problem}", role)
