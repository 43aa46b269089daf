"""What may be opened at all: the limits, and a look at the first bytes of a file.

Neither the name of a file nor what a server called it is believed. Text that makes a reader open
further files (playlists, SVG, web pages) is refused here, before any library sees it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from xicon_infer.errors import MediaError

_HEAD_BYTES = 1024


@dataclass(frozen=True)
class MediaLimits:
    """What an input may cost; more is refused before, or as soon as, it is spent.

    max_side_px is of a video frame; max_duration_s is the length of the source, not of the
    selection; max_frames counts decoded frames and kept frames; max_clip_bytes is the memory of
    the kept frames; max_seconds the time that reading one file may take.
    """

    max_image_bytes: int = 30_000_000
    max_image_pixels: int = 50_000_000
    max_video_bytes: int = 300_000_000
    max_side_px: int = 8192
    max_duration_s: float = 120.0
    max_frames: int = 7200
    max_clip_bytes: int = 12 * 1024**3
    max_seconds: float = 600.0


DEFAULT_LIMITS = MediaLimits()

# Name, offset and bytes; the first that fits decides.
_SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("WEBP", 8, b"WEBP"),
    ("AVI", 8, b"AVI "),
    ("WAV", 8, b"WAVE"),
    ("HEIC", 4, b"ftypheic"),
    ("HEIC", 4, b"ftypheix"),
    ("HEIC", 4, b"ftypmif1"),
    ("AVIF", 4, b"ftypavif"),
    ("MP4", 4, b"ftyp"),
    ("MP4", 4, b"moov"),
    ("MP4", 4, b"mdat"),
    ("MP4", 4, b"wide"),
    ("MP4", 4, b"free"),
    ("MP4", 4, b"skip"),
    ("MATROSKA", 0, b"\x1aE\xdf\xa3"),
    ("TIFF", 0, b"II*\x00"),
    ("TIFF", 0, b"MM\x00*"),
    ("PDF", 0, b"%PDF"),
    ("PSD", 0, b"8BPS"),
    ("BMP", 0, b"BM"),
    ("ZIP", 0, b"PK\x03\x04"),
    ("PLAYLIST", 0, b"#EXTM3U"),
    ("PLAYLIST", 0, b"ffconcat"),
    ("PAGE", 0, b"<"),
    ("JSON", 0, b"{"),
    ("JSON", 0, b"["),
)
_TEXT_KINDS = ("PLAYLIST", "PAGE", "JSON")

IMAGE_KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
VIDEO_KINDS = ("MP4", "MATROSKA", "AVI", "GIF")

_ADVICE = {
    "PAGE": "it is a web page or XML; the link probably returned a page instead of the file",
    "JSON": "it is JSON text; the link probably returned an error message instead of the file",
    "SVG": "it is an SVG drawing; export it as PNG",
    "PLAYLIST": "it is a playlist, which only names other files; give the video itself",
    "HEIC": "it is a HEIC picture; convert it to JPEG",
    "AVIF": "it is an AVIF picture; convert it to PNG",
    "WAV": "it is a sound file",
    "MP4": "it is a video, and a picture is expected",
    "MATROSKA": "it is a video, and a picture is expected",
    "AVI": "it is a video, and a picture is expected",
    "JPEG": "it is a picture, and a video is expected",
    "PNG": "it is a picture, and a video is expected",
    "WEBP": "it is a picture, and a video is expected",
    "BMP": "it is a picture, and a video is expected",
}


def sniff(head: bytes) -> str:
    """Returns the kind of a file from its first bytes: "JPEG", "MP4", "PAGE", ..., or ""."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for kind, offset, signature in _SIGNATURES:
        data = text if kind in _TEXT_KINDS else head
        if data[offset : offset + len(signature)] == signature:
            return "SVG" if kind == "PAGE" and b"<svg" in text.lower() else kind
    return ""


def read_head(path: Path | str, *, max_bytes: int, field: str) -> bytes:
    """Returns the first bytes of a regular file that is not empty and not too large.

    Args:
        path: the file.
        max_bytes: the largest size allowed.
        field: the request field that named the file, for the message.

    Returns:
        Up to 1024 bytes.

    Raises:
        MediaError: MEDIA_NOT_FOUND, UNSUPPORTED_MEDIA (folder, pipe, device), MEDIA_CORRUPT
            (empty) or MEDIA_TOO_LARGE.
    """
    shown = display_name(path)
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise MediaError(
                f"'{field}': {shown} is {what}; give a file", field=field, code="UNSUPPORTED_MEDIA"
            )
        with Path(path).open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise MediaError(
            f"'{field}': {shown} cannot be opened: {reason(error)}; check the name",
            field=field,
            code="MEDIA_NOT_FOUND",
        ) from error
    if not head:
        raise MediaError(
            f"'{field}': {shown} is empty; was it downloaded completely?",
            field=field,
            code="MEDIA_CORRUPT",
        )
    if status.st_size > max_bytes:
        raise MediaError(
            f"'{field}': {shown} has {status.st_size / 1e6:.1f} MB, "
            f"at most {max_bytes / 1e6:.1f} MB are allowed; shorten or compress it",
            field=field,
            code="MEDIA_TOO_LARGE",
        )
    return head


def refuse(path: Path | str, kind: str, *, allowed: str, field: str) -> NoReturn:
    """Raises the error for a file of a kind that cannot be used here.

    Args:
        path: the file.
        kind: what `sniff` said.
        allowed: the kinds that can be used, in words.
        field: the request field that named the file.

    Raises:
        MediaError: always; UNSUPPORTED_MEDIA with advice where the kind is known.
    """
    advice = _ADVICE.get(kind) or (f"it is a {kind} file" if kind else "its kind is unknown")
    raise MediaError(
        f"'{field}': {display_name(path)} cannot be used: {advice}. Allowed: {allowed}",
        field=field,
        code="UNSUPPORTED_MEDIA",
    )


def display_name(path: Path | str) -> str:
    """Returns the last part of a path for a message: printable, short, no folder."""
    name = os.fsencode(Path(path).name).decode("utf-8", "replace")
    name = "".join(char if char.isprintable() else "?" for char in name)
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def reason(error: BaseException) -> str:
    """Returns why an operating-system call failed, without the path it concerned."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
