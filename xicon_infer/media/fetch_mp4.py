"""References to other files in MP4 and MOV: a data reference may name any file or address.

The demuxer does not follow them unless asked to; this refuses such files before it is asked
anything. Source: ISO/IEC 14496-12, 8.7.2; Apple: QuickTime File Format, data reference atoms.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xicon_infer.errors import MediaError

_TOWARDS_REFERENCES = (b"moov", b"trak", b"mdia", b"minf", b"dinf")
_MAX_BOXES = 100_000
_MAX_REFERENCE_BYTES = 1 << 20
_SELF_CONTAINED = 1
_REFUSED = (b"cmov", b"rmra")
"""A compressed index, which cannot be looked into here, and a list of other films."""


def check_references(path: Path, field: str) -> None:
    """Refuses an MP4 or MOV file that says its pictures or sound are in another file.

    Args:
        path: the file; need not be whole.
        field: the request field that named it.

    Raises:
        MediaError: UNSUPPORTED_MEDIA.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for kind, start, end in _boxes(file, 0, size):
            outside = kind == b"dref" and _points_outside(file, start, end)
            if outside or kind in _REFUSED:
                raise MediaError(
                    f"'{field}': the video refers to other files, or hides its index; "
                    "convert it to one plain MP4 (H.264)",
                    field=field,
                    code="UNSUPPORTED_MEDIA",
                )


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of the content of each box, those inside others included."""
    waiting = [(start, end)]
    for _ in range(_MAX_BOXES):
        if not waiting:
            return
        start, end = waiting.pop()
        found = _box(file, start, end)
        if found is None:
            continue
        kind, inside, after = found
        yield kind, inside, after
        waiting.append((after, end))
        if kind in _TOWARDS_REFERENCES:
            waiting.append((inside, after))


def _box(file: BinaryIO, start: int, end: int) -> tuple[bytes, int, int] | None:
    """Returns kind, start and end of the content of the box at a place; None if there is none."""
    file.seek(start)
    head = file.read(16)
    if end - start < 8 or len(head) < 8:
        return None
    size, kind = struct.unpack_from(">I4s", head)
    inside = start + 8
    if size == 1 and len(head) == 16:
        (size,) = struct.unpack_from(">Q", head, 8)
        inside = start + 16
    after = end if size == 0 else start + size
    return (kind, inside, min(after, end)) if after >= inside else None


def _points_outside(file: BinaryIO, start: int, end: int) -> bool:
    """Returns True if an entry of a data reference box is not "this file"."""
    for _, inside, after in _boxes_of(file, start + 8, end):
        file.seek(inside)
        content = file.read(min(after - inside, _MAX_REFERENCE_BYTES))
        flags = int.from_bytes(content[:4], "big") & 0xFFFFFF
        # An entry with neither flag nor location is what careless writers make of "this file".
        if not flags & _SELF_CONTAINED and content[4:].strip(b"\0"):
            return True
    return False


def _boxes_of(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields the boxes that follow one another in a stretch."""
    while found := _box(file, start, end):
        yield found
        start = found[2]
