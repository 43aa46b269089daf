"""What a fetched file really is: decided by its bytes, before anything is decoded in the worker."""

from __future__ import annotations

from pathlib import Path

from xicon_infer.errors import MediaError
from xicon_infer.media.fetch_mp4 import check_references
from xicon_infer.media.fetch_probe import check_video
from xicon_infer.media.fetch_sink import Intake
from xicon_infer.media.fetch_types import Kind, Role
from xicon_infer.media.image import open_image
from xicon_infer.media.source import IMAGE_KINDS, read_head, refuse, sniff

SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "GIF": ".gif",
    "MP4": ".mp4",
    "MATROSKA": ".mkv",
}
"""Of what may come in, by kind."""

_ALLOWED: dict[Role, tuple[str, ...]] = {
    "image": IMAGE_KINDS,
    # Differs from `source.VIDEO_KINDS`: AVI is for files of one's own.
    "video": ("MP4", "MATROSKA", "GIF"),
}
_IN_WORDS: dict[Role, str] = {
    "image": "JPEG, PNG, WebP, BMP, GIF",
    "video": "MP4, MOV, MKV, WebM, GIF",
}
_PAGES = {"PAGE": "a web page", "JSON": "JSON text, probably an error message"}


def kind_of(path: Path, name: str, source: Kind, intake: Intake) -> str:
    """Returns the kind of a file of which nothing is known but its bytes.

    Args:
        path: the file.
        name: what messages call it; the name that was sent proves nothing and is not shown.
        source: how it came.
        intake: role, field and limits.

    Raises:
        MediaError: UNSUPPORTED_MEDIA or MEDIA_CORRUPT (empty).
    """
    role, field = intake.role, intake.field
    if not path.stat().st_size:
        raise MediaError(f"'{field}': the file is empty", field=field, code="MEDIA_CORRUPT")
    kind = sniff(read_head(path, max_bytes=intake.limits.max_bytes(role), field=field))
    if source == "url" and kind in _PAGES:
        raise MediaError(
            f"'{field}': the URL returned {_PAGES[kind]}; give the address of the file itself. "
            f"Allowed: {_IN_WORDS[role]}",
            field=field,
            code="UNSUPPORTED_MEDIA",
        )
    if kind not in _ALLOWED[role]:
        refuse(name, kind, allowed=_IN_WORDS[role], field=field)
    return kind


def check_content(path: Path, kind: str, intake: Intake) -> None:
    """Refuses a file whose header asks for more than the limits, or that names other files.

    Raises:
        MediaError: MEDIA_TOO_LARGE, VIDEO_TOO_LONG, MEDIA_CORRUPT or UNSUPPORTED_MEDIA.
        Cancelled: the fetch is to end.
    """
    if intake.role == "image":
        with open_image(path, limits=intake.limits.media, field=intake.field):
            return
    if kind == "MP4":
        check_references(path, intake.field)
    check_video(path, intake)
