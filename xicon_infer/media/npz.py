"""NPZ files, the form in which tracks are kept: read safely, written whole.

Pickled objects are never loaded: they can run code. Sizes are read from the headers of the
arrays before anything is unpacked, because a small file can claim any size.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import MediaError
from xicon_infer.media.source import display_name, read_head, refuse, sniff
from xicon_infer.media.write import atomic_path

_MAX_BYTES = 1024**3
"""Of the file, and of its arrays together; a track of two minutes has about 30 MB."""
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError)


def read_npz(
    path: Path | str,
    *,
    required: Collection[str] = (),
    max_bytes: int = _MAX_BYTES,
    field: str = "track",
) -> dict[str, npt.NDArray[Any]]:
    """Returns the arrays of an NPZ file by name.

    Args:
        path: the file.
        required: names that must be there.
        max_bytes: the largest size of the file, and of all arrays unpacked.
        field: the request field that named the file, for messages.

    Returns:
        Every array of numbers, booleans or text in the file.

    Raises:
        MediaError: MEDIA_NOT_FOUND, UNSUPPORTED_MEDIA (not NPZ, or a name is missing),
            MEDIA_TOO_LARGE or MEDIA_CORRUPT.
    """
    kind = sniff(read_head(path, max_bytes=max_bytes, field=field))
    if kind != "ZIP":
        refuse(path, kind, allowed="NPZ", field=field)
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(_claimed_bytes(archive, name) for name in archive.namelist())
        if claimed > max_bytes:
            raise _too_large(path, claimed, max_bytes, field)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (*_DAMAGE, NotImplementedError, SyntaxError, MemoryError) as error:
        raise MediaError(
            f"'{field}': {display_name(path)} is not a readable NPZ file of plain arrays; "
            "save it again with numpy.savez",
            field=field,
            code="MEDIA_CORRUPT",
        ) from error
    missing = sorted(set(required) - set(arrays))
    if missing:
        raise MediaError(
            f"'{field}': {display_name(path)} lacks the arrays {', '.join(missing)}; "
            f"it has {', '.join(sorted(arrays)) or 'none'}",
            field=field,
            code="UNSUPPORTED_MEDIA",
        )
    return arrays


def write_npz(
    path: Path | str, arrays: Mapping[str, npt.NDArray[Any]], *, field: str = "output"
) -> None:
    """Writes arrays, compressed, under their names.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE.
    """
    with atomic_path(path, field=field) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))


def _claimed_bytes(archive: zipfile.ZipFile, name: str) -> int:
    """Returns the bytes that one array says it has; its data is not unpacked."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        reader = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = reader(file)
    size = dtype.itemsize
    for side in shape:
        size *= side
    return int(size)


def _too_large(path: Path | str, claimed: int, max_bytes: int, field: str) -> MediaError:
    return MediaError(
        f"'{field}': {display_name(path)} unpacks to {claimed / 1e6:.0f} MB, at most "
        f"{max_bytes / 1e6:.0f} MB are allowed; use a shorter track",
        field=field,
        code="MEDIA_TOO_LARGE",
    )
