"""A video onto the network volume: complete under its name, or not there.

Several workers write to one volume at the same time, each into the folder of its job. Nothing
here is ever deleted except what a killed worker left half-written: retention is the user's task.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from xicon_infer.errors import MediaError
from xicon_infer.media.deliver_types import BLOCK_BYTES
from xicon_infer.media.write import atomic_path, write_error

_LEFTOVER = re.compile(r"\.[0-9a-f]{16}(\.[a-z0-9]{1,5})?")
"""What `write.atomic_path` calls an unfinished file."""
_ABANDONED_S = 86_400.0
"""No job writes one file for a day."""


def store(source: Path, target: Path, *, stop: Callable[[], None] = lambda: None) -> None:
    """Copies a file; it is complete, and on the disk, before it gets its name.

    Args:
        source: the file.
        target: its place; folders that are missing are made.
        stop: asked between blocks; raises to end.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE; the message names no folder.
        Cancelled: `stop` raised it; nothing is left at the target.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, target, "output") from error
    with (
        atomic_path(target, field="output") as temporary,
        source.open("rb") as reader,
        temporary.open("wb") as writer,
    ):
        while block := reader.read(BLOCK_BYTES):
            stop()
            writer.write(block)
    _sync_folder(target.parent)


def told_path(target: Path, root: Path) -> str:
    """Returns a path as it is told in an answer: relative to the volume, with slashes."""
    return target.relative_to(root).as_posix()


def is_writable(folder: Path) -> bool:
    """Returns True if a file can be made in a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(_Tried), atomic_path(folder / "write-test"):
            raise _Tried
    except (OSError, MediaError):
        return False
    return True


class _Tried(Exception):
    """The file could be made; ends the attempt before it gets its name."""


def remove_leftovers(folder: Path, *, older_than_s: float = _ABANDONED_S) -> int:
    """Removes what killed workers left half-written, and returns how many files that were.

    Args:
        folder: where results are stored; only it and the folders of its jobs are looked into.
        older_than_s: a younger file may be one that another worker is just writing.
    """
    removed = 0
    before = time.time() - older_than_s
    for path in (*_listed(folder, ".*"), *_listed(folder, "*/.*")):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if _LEFTOVER.fullmatch(path.name) and status.st_mtime < before:
                path.unlink()
                removed += 1
    return removed


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself durable, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
