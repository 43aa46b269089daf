"""Files sent as base64 text, with or without a `data:` header.

Line breaks, the URL-safe alphabet and missing padding are common and harmless; any other
character means that the text is something else, and is refused.
"""

from __future__ import annotations

import base64
import re

from xicon_infer.errors import MediaError
from xicon_infer.media.fetch_sink import Intake, Sink

_BLANKS = " \t\r\n"
_CHARACTERS_AT_ONCE = 1 << 20  # a multiple of 4
_HEADER = re.compile(r"data:([\w.+-]+/[\w.+-]+)(;[\w.+=\"-]+)*;base64", re.IGNORECASE | re.ASCII)
_MAX_HEADER_CHARACTERS = 256
_TEXT = re.compile(r"[A-Za-z0-9+/]+(={0,2})")
_TO_STANDARD = str.maketrans("-_", "+/", _BLANKS)


def decode_base64(text: str, sink: Sink, intake: Intake) -> None:
    """Writes the bytes that a text stands for.

    Args:
        text: base64, or a `data:` URI of an image, a video or unnamed bytes.
        sink: takes the bytes; told their number before anything is decoded.
        intake: names the field.

    Raises:
        MediaError: INVALID_BASE64, MEDIA_TOO_LARGE or DISK_FULL.
        Cancelled: the fetch is to end.
    """
    start = _data_start(text, intake)
    # Counted, not stripped: a text of any length is measured before it is copied.
    blanks = sum(text.count(blank, start) for blank in _BLANKS)
    sink.bound((len(text) - start - blanks) * 3 // 4 - 2)
    plain = text[start:].translate(_TO_STANDARD)
    found = _TEXT.fullmatch(plain)
    if not found:
        raise _invalid(intake, _fault(plain))
    padding = len(found[1])
    length = len(plain) - padding
    if length % 4 == 1 or (padding and len(plain) % 4):
        raise _invalid(intake, "its length is wrong; it may be cut off")
    sink.announce(length * 3 // 4)
    for first in range(0, len(plain), _CHARACTERS_AT_ONCE):
        piece = plain[first : first + _CHARACTERS_AT_ONCE]
        sink.write(base64.b64decode(piece + "=" * (-len(piece) % 4)))


def _data_start(text: str, intake: Intake) -> int:
    """Returns where the base64 begins."""
    if text[:5].lower() != "data:":
        return 0
    comma = text.find(",", 0, _MAX_HEADER_CHARACTERS)
    header = _HEADER.fullmatch(text, 0, comma) if comma > 0 else None
    if not header:
        raise _invalid(intake, "its data URI must begin like data:image/png;base64,")
    mime = header[1].lower()
    if not mime.startswith(("image/", "video/")) and mime != "application/octet-stream":
        allowed = "image/*, video/* and application/octet-stream are allowed"
        raise _invalid(intake, f"its data URI is of another type; {allowed}")
    return comma + 1


def _fault(plain: str) -> str:
    if not plain.strip("="):
        return "it is empty"
    if "=" in plain.rstrip("=") or plain.endswith("==="):
        return "it has '=' before its end; two texts may have been joined"
    return "it has a character that base64 has not; send the file's bytes encoded as base64"


def _invalid(intake: Intake, text: str) -> MediaError:
    return MediaError(
        f"'{intake.field}' is not valid base64: {text}", field=intake.field, code="INVALID_BASE64"
    )
