"""Reading `.npz` files that may come from anybody: no pickles, and no more memory than allowed.

`numpy.load` refuses pickles but trusts the sizes a file states, so a small file can ask for all
memory. Here sizes are limited before anything is unpacked, and a stated shape has to agree with
the bytes that are there.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import MediaError

Array = npt.NDArray[Any]

MAX_BYTES = 256 * 2**20


def read_arrays(
    path: Path, names: Mapping[str, bool], *, max_bytes: int = MAX_BYTES
) -> dict[str, Array]:
    """Returns the arrays of those names; arrays of other names are not read.

    Args:
        path: the `.npz` file.
        names: name -> whether it must be there.
        max_bytes: largest file, and largest sum of its arrays once unpacked.

    Raises:
        MediaError: if the file is missing, damaged or too large, an array that must be there is
            not, or one does not hold numbers.
    """
    try:
        refuse_above(path, "file size in bytes", path.stat().st_size, max_bytes)
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for name, needed in names.items():
                if needed and name not in members:
                    raise refusal(path, name, "is missing")
            known = {name: members[name] for name in names if name in members}
            total = sum(info.file_size for info in known.values())
            refuse_above(path, "unpacked size in bytes", total, max_bytes)
            return {name: _read_member(archive, info) for name, info in known.items()}
    except FileNotFoundError as error:
        raise MediaError(f"The track file {path} does not exist.") from error
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        RuntimeError,
        ValueError,
    ) as error:
        raise MediaError(
            f"The track file {path} is not a readable .npz: {error}. Save the track again."
        ) from error


def refusal(path: Path, name: str, problem: str) -> MediaError:
    """Returns the error for one array of a file."""
    return MediaError(f"The track file {path}: the array {name} {problem}.", field=name)


def refuse_above(path: Path, what: str, value: int, limit: int) -> None:
    """Raises MediaError if `value` is above `limit`."""
    if value > limit:
        raise MediaError(
            f"The track file {path}: {what} is {value}; at most {limit} is allowed. "
            "Cut the track into pieces."
        )


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    """Returns one array; raises ValueError if it is not an array of numbers."""
    # Only deflate can be unpacked up to a limit, so a lying size cannot fill the memory.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is packed in an unusual way")
    with archive.open(info) as file:
        data = file.read(info.file_size + 1)
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, columns_first, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"{info.filename} has the array format {version}")
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if dtype.kind not in "fiu" or count * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{info.filename} is not an array of numbers of its stated size")
    values = np.frombuffer(data, dtype, count, stream.tell())
    return values.reshape(shape, order="F" if columns_first else "C")
