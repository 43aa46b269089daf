"""The header of a safetensors file, checked: nothing missing, overlapping or left over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xicon_infer.errors import WeightsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsHeader(NamedTuple):
    """What a file says of its tensors, by name; offsets are bytes from the start of the file."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    offsets: dict[str, int]
    metadata: dict[str, str]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Returns names, shapes, dtypes and places of the tensors of one file.

    Raises:
        WeightsError: the header is damaged, holds no tensors or a dtype that cannot be read, or
            the data are not exactly as long as it says.
    """
    header, size = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path}: damaged header: metadata is not an object")
    if not header:
        raise WeightsError(f"{path}: holds no tensors")
    extents = sorted((*_check_entry(path, name, entry), name) for name, entry in header.items())
    position = 0
    for start, end, name in extents:
        if end > size:
            raise WeightsError(
                f"{path}: incomplete: tensor {name} ends at byte {end} of the data, the file has "
                f"{size}. Fetch it again."
            )
        if start != position:
            raise WeightsError(f"{path}: damaged header: tensor {name} overlaps or leaves a gap")
        position = end
    if position != size:
        raise WeightsError(f"{path}: damaged: {size - position} bytes after the last tensor")
    first = path.stat().st_size - size
    return SafetensorsHeader(
        shapes={name: tuple(entry["shape"]) for name, entry in header.items()},
        dtypes={name: DTYPES[entry["dtype"]] for name, entry in header.items()},
        offsets={name: first + entry["data_offsets"][0] for name, entry in header.items()},
        metadata=metadata,
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file and the bytes of data behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise WeightsError(
                f"{path}: not a safetensors file, or incomplete: {size} bytes, of which "
                f"{length} should be header. Fetch it again."
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged header: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: damaged header: not an object")
    return header, size - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} occurs twice")
    return dict(pairs)


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Returns where a tensor starts and ends in the data; refuses impossible entries."""
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        start, end = entry["data_offsets"]
        counts = [*shape, start, end]
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{path}: damaged header: entry of tensor {name}: {error}") from error
    if dtype not in DTYPES:
        raise WeightsError(f"{path}: tensor {name} has dtype {dtype}, allowed: {', '.join(DTYPES)}")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise WeightsError(f"{path}: damaged header: tensor {name}: sizes {counts}")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise WeightsError(
            f"{path}: damaged header: tensor {name} of shape {shape} and dtype {dtype} cannot "
            f"have {end - start} bytes"
        )
    return start, end
