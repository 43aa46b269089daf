"""Files on this machine: below the allowed folders, opened once, and copied.

The copy costs one read and buys two things: nobody can exchange the file between the check and
the last of the decoder's reads, and those reads go to the local disk, not to a network volume.
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path

from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media.fetch_sink import BLOCK_BYTES, Intake, Sink
from xicon_infer.media.source import reason

_SYSTEM = (Path("/proc"), Path("/sys"), Path("/dev"))
"""What looks like a file here is a window into the machine."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK the opening of a pipe waits for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def copy_path(text: str, sink: Sink, intake: Intake) -> None:
    """Copies a file.

    Args:
        text: an absolute path; links in it are followed, and must end below an input root.
        sink: takes the bytes; told their number first.
        intake: the roots and the field.

    Raises:
        InvalidRequest: PATH_NOT_ALLOWED, whether or not there is a file.
        MediaError: MEDIA_NOT_FOUND, UNSUPPORTED_MEDIA (folder, pipe, device), MEDIA_TOO_LARGE or
            DISK_FULL.
        Cancelled: the fetch is to end.
    """
    root, inside = _locate(text, intake)
    try:
        descriptor = _open_below(root, inside, intake)
    except OSError as error:
        raise _missing(error, intake) from error
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123  a descriptor
        status = os.fstat(descriptor)
        _check_regular(status.st_mode, intake)
        sink.announce(status.st_size)
        while block := _read(file, intake):
            sink.write(block)


def _locate(text: str, intake: Intake) -> tuple[Path, Path]:
    """Returns the root and the place below it that a path means, all links resolved."""
    roots = intake.limits.input_roots
    path = Path(os.path.normpath(text))
    if not path.is_absolute() or not _can_be_named(text):
        raise _not_allowed(intake)
    if roots is not None and not any(path.is_relative_to(root) for root in roots):
        raise _not_allowed(intake)
    real = Path(os.path.realpath(path))
    homes = [Path(os.path.realpath(root)) for root in (roots or (Path("/"),))]
    home = next((home for home in homes if real.is_relative_to(home)), None)
    if home is None or any(real.is_relative_to(place) for place in _SYSTEM):
        raise _not_allowed(intake)
    return home, real.relative_to(home)


def _can_be_named(text: str) -> bool:
    """Returns False for what no file can be called."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _open_below(root: Path, inside: Path, intake: Intake) -> int:
    """Returns a descriptor of a file, reached step by step without following any link.

    So a link that is put in the way after `_locate` has looked leads nowhere.
    """
    folder = os.open(root, _FOLDER)
    try:
        for name in inside.parts[:-1]:
            deeper = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = deeper
        name = inside.name or "."
        # The mere opening of a device can have effects.
        _check_regular(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode, intake)
        return os.open(name, _FILE, dir_fd=folder)
    finally:
        os.close(folder)


def _check_regular(mode: int, intake: Intake) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        message = f"'{intake.field}': its path is {what}; give a file"
        raise MediaError(message, field=intake.field, code="UNSUPPORTED_MEDIA")


def _read(file: FileIO, intake: Intake) -> bytes | None:
    try:
        return file.read(BLOCK_BYTES)
    except OSError as error:
        raise _missing(error, intake) from error


def _missing(error: OSError, intake: Intake) -> MediaError:
    return MediaError(
        f"'{intake.field}': there is no readable file at its path: {reason(error)}; check the path",
        field=intake.field,
        code="MEDIA_NOT_FOUND",
    )


def _not_allowed(intake: Intake) -> InvalidRequest:
    message = f"Path for '{intake.field}' is not under an allowed input directory"
    return InvalidRequest(message, field=intake.field, code="PATH_NOT_ALLOWED")
