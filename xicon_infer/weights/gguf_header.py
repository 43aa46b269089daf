"""The header of a GGUF file: metadata and the list of tensors, read with every bound checked.

The `gguf` package has a reader, too. It reads on past the end of a damaged file until memory is
full, and takes 10 s and 0.7 GB for the tokenizer that text encoders carry in their metadata (gguf
0.19, 256,384 tokens); this one takes what is there or refuses.

Source: ggml-org/ggml: docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

from xicon_infer.errors import WeightsError

MAGIC = b"GGUF"

VERSIONS = (2, 3)

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
"""Value types of the metadata, by their number."""

_SHORT = 16
"""Arrays of up to so many numbers are kept, longer ones only counted."""

_MOST_AXES = 8

GgufField = str | int | float | bool | list[int | float | bool]
"""A value of the metadata."""


class GgufInfo(NamedTuple):
    """A tensor as the header has it: axes fastest first, type number, offset in the data."""

    axes: tuple[int, ...]
    kind: int
    offset: int


class RawHeader(NamedTuple):
    """A header: metadata and tensors by name, where it ends, and the bytes of the whole file.

    Long arrays of the metadata are not kept, only described.
    """

    fields: dict[str, GgufField]
    infos: dict[str, GgufInfo]
    end: int
    size: int


def parse_header(path: Path) -> RawHeader:
    """Returns the header of a GGUF file.

    Raises:
        WeightsError: the file is no GGUF file, of another version, damaged, or ends too early.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            count, fields = _read_fields(cursor)
            infos = _read_infos(cursor, count)
            return RawHeader(fields, infos, cursor.position, len(data))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: damaged GGUF header: {error}") from error


class _Cursor:
    """A place in a header; every read stops at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, size: int) -> bytes:
        """Returns the next bytes."""
        self.skip(size)
        return self.data[self.position - size : self.position]

    def skip(self, size: int) -> None:
        """Goes on by `size` bytes."""
        if size > len(self.data) - self.position:
            raise WeightsError(
                f"{self.path}: damaged or incomplete GGUF header: it needs {size} bytes at byte "
                f"{self.position}, the file has {len(self.data)}. Fetch it again."
            )
        self.position += size

    def number(self, form: str) -> int | float | bool:
        """Returns the next number, of a form of `struct`."""
        value: int | float | bool = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def count(self, form: str = "<Q") -> int:
        """Returns the next whole number."""
        return int(self.number(form))

    def text(self) -> str:
        """Returns the next string; raises a ValueError where it is no UTF-8."""
        return self.take(self.count()).decode("utf-8")


def _read_fields(cursor: _Cursor) -> tuple[int, dict[str, GgufField]]:
    """Returns the number of tensors, and the metadata."""
    if cursor.take(4) != MAGIC:
        raise WeightsError(f"{cursor.path}: is not a GGUF file")
    version = cursor.count("<I")
    if version not in VERSIONS:
        raise WeightsError(
            f"{cursor.path}: GGUF version {version}, allowed: {', '.join(map(str, VERSIONS))} in "
            "little-endian order"
        )
    num_tensors, num_fields = cursor.count(), cursor.count()
    fields: dict[str, GgufField] = {}
    for _ in range(num_fields):
        name = cursor.text()
        if name in fields:
            raise WeightsError(f"{cursor.path}: damaged GGUF header: {name} occurs twice")
        fields[name] = _read_value(cursor, cursor.count("<I"))
    return num_tensors, fields


def _read_value(cursor: _Cursor, kind: int) -> GgufField:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise WeightsError(f"{cursor.path}: damaged GGUF header: unknown value type {kind}")
    inner, count = cursor.count("<I"), cursor.count()
    if inner == _STRING:
        for _ in range(count):
            cursor.skip(cursor.count())
        return f"{count} strings"
    if inner not in _SCALARS:
        raise WeightsError(f"{cursor.path}: damaged GGUF header: unknown array type {inner}")
    if count <= _SHORT:
        return [cursor.number(_SCALARS[inner]) for _ in range(count)]
    cursor.skip(count * struct.calcsize(_SCALARS[inner]))
    return f"{count} numbers"


def _read_infos(cursor: _Cursor, count: int) -> dict[str, GgufInfo]:
    infos: dict[str, GgufInfo] = {}
    for _ in range(count):
        name, num_axes = cursor.text(), cursor.count("<I")
        if num_axes > _MOST_AXES or name in infos:
            what = f"{num_axes} axes" if num_axes > _MOST_AXES else "occurs twice"
            raise WeightsError(f"{cursor.path}: damaged GGUF header: tensor {name}: {what}")
        axes = tuple(cursor.count() for _ in range(num_axes))
        infos[name] = GgufInfo(axes, cursor.count("<I"), cursor.count())
    if not infos:
        raise WeightsError(f"{cursor.path}: holds no tensors")
    return infos
