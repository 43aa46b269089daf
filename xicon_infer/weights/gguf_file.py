"""GGUF files: their header, and their tensors as floating-point numbers.

Names are the original Wan names, or those of llama.cpp for a text encoder. Weights stored in
blocks of few bits are dequantised by the `gguf` package, to float32 and from there to the dtype
that is asked for, a piece at a time: beyond the result a few pieces exist, whatever the model.

Source: city96/ComfyUI-GGUF: loader.py, tools/convert.py (names, architectures, 5-D tensors).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.weights.gguf_header import GgufField, GgufInfo, parse_header

ARCHITECTURES = ("wan", "t5", "t5encoder", "pig", "cow")
"""What `general.architecture` may say; it may also be absent. "pig" and "cow" mark converters
that name no model: what is inside is then told from the names."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Start of the metadata key that holds the shape of a tensor that was stored in another one."""

_RANKS = (
    ("modulation", 3),
    ("img_emb.emb_pos", 3),
    *(
        (f"condition_embedding_align.norm{n}.{end}", 4)
        for n in (1, 2)
        for end in ("weight", "bias")
    ),
)
"""End of a Wan name -> its number of axes. llama.cpp drops leading axes of size one on writing."""

_PATCH = (1, 2, 2)
"""Last axes of every patch embedding, which has five and GGUF's tools write four at most."""

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that torch has; their bytes are taken as they are."""

_PIECE = 2**20
"""Numbers dequantised at a time: 4 MiB as float32, and a few times that inside the package."""

_MOST_THREADS = 8
"""Tensors dequantised at the same time; numpy lets other threads run meanwhile."""


class GgufTensor(NamedTuple):
    """A tensor in a file: shape as in PyTorch, type as "Q4_K", start and size in bytes."""

    shape: tuple[int, ...]
    type: str
    start: int
    size: int


class GgufHeader(NamedTuple):
    """What a GGUF file says of itself: metadata as text, and its tensors by name."""

    metadata: dict[str, str]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Returns metadata and tensors of a GGUF file without reading weights.

    Raises:
        WeightsError: the file is damaged, incomplete, of another architecture, or holds a type
            that the `gguf` package cannot dequantise; or the package is not installed.
    """
    package = _load_package(path)
    fields, infos, start, size = parse_header(path)
    _check_architecture(path, fields)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise WeightsError(f"{path}: damaged: general.alignment is {alignment!r}")
    start += -start % alignment
    placed = {
        name: _place(path, name, info, start, package.constants) for name, info in infos.items()
    }
    _check_extents(path, placed, size)
    _check_types(path, {tensor.type for tensor in placed.values()}, package)
    shapes = _true_shapes(path, {name: tensor.shape for name, tensor in placed.items()}, fields)
    return GgufHeader(
        {key: str(value) for key, value in fields.items()},
        {name: tensor._replace(shape=shapes[name]) for name, tensor in placed.items()},
    )


def dtype_of(type_name: str, blocks: torch.dtype) -> torch.dtype:
    """Returns the dtype that a tensor is read as; `blocks` is that of quantised ones."""
    return _PLAIN.get(type_name, blocks)


def is_quantized(type_name: str) -> bool:
    """Returns whether tensors of a GGUF type are stored in blocks that must be dequantised."""
    return type_name not in _PLAIN


def read_gguf_tensors(
    path: Path, tensors: Mapping[str, GgufTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns tensors by name, on the CPU.

    Args:
        path: the file.
        tensors: which, from `read_gguf_header`.
        dtype: of those stored in blocks. The others come as stored, as views of the mapped file.

    Raises:
        WeightsError: the file changed since its header was read.
    """
    package = _load_package(path)
    try:
        # Copy on write: torch takes no read-only memory without a warning.
        data = np.memmap(path, mode="c")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if any(tensor.start + tensor.size > len(data) for tensor in tensors.values()):
        raise WeightsError(f"{path}: cannot be read: the file became shorter. Fetch it again.")
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        made = pool.map(lambda tensor: _read(data, tensor, dtype, package), tensors.values())
        return dict(zip(tensors, made, strict=True))


def _read(
    data: np.memmap[tuple[int], np.dtype[np.uint8]],
    tensor: GgufTensor,
    dtype: torch.dtype,
    package: ModuleType,
) -> Tensor:
    raw = data[tensor.start : tensor.start + tensor.size]
    if tensor.type in _PLAIN:
        plain = _PLAIN[tensor.type]
        flat = torch.from_numpy(raw if tensor.start % plain.itemsize == 0 else raw.copy())
        return flat.view(plain).reshape(tensor.shape)
    kind = package.GGMLQuantizationType[tensor.type]
    numbers, num_bytes = package.GGML_QUANT_SIZES[kind]
    made = torch.empty(math.prod(tensor.shape), dtype=dtype)
    step = max(1, _PIECE // numbers)
    for first in range(0, len(raw) // num_bytes, step):
        blocks = np.asarray(raw[first * num_bytes : (first + step) * num_bytes])
        piece = package.quants.dequantize(blocks[None], kind)
        begin = first * numbers
        made[begin : begin + piece.size] = torch.from_numpy(piece.reshape(-1))
    return made.reshape(tensor.shape)


def _load_package(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(
            f"{path}: is a GGUF file; reading it needs the gguf package. Run `pip install gguf`, "
            "or use a .safetensors file of this model."
        ) from error
    return gguf


def _place(path: Path, name: str, info: GgufInfo, start: int, constants: ModuleType) -> GgufTensor:
    """Returns where a tensor lies; refuses unknown types and sizes that make no whole blocks."""
    try:
        kind = constants.GGMLQuantizationType(info.kind)
    except ValueError as error:
        raise WeightsError(
            f"{path}: tensor {name} has GGUF type {info.kind}, which the gguf package does not "
            "know. Update the package, or use another file of this model."
        ) from error
    numbers, num_bytes = constants.GGML_QUANT_SIZES[kind]
    row = info.axes[0] if info.axes else 1
    if row % numbers:
        raise WeightsError(
            f"{path}: damaged GGUF header: tensor {name}: rows of {row} in blocks of {numbers}"
        )
    size = math.prod(info.axes) // numbers * num_bytes
    return GgufTensor(tuple(reversed(info.axes)), kind.name, start + info.offset, size)


def _check_extents(path: Path, tensors: Mapping[str, GgufTensor], size: int) -> None:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start + tensor.size > size:
            raise WeightsError(
                f"{path}: incomplete: tensor {name} ends at byte {tensor.start + tensor.size}, "
                f"the file has {size}. Fetch it again."
            )
        if tensor.start < position:
            raise WeightsError(f"{path}: damaged GGUF header: tensor {name} overlaps another")
        position = tensor.start + tensor.size


def _check_types(path: Path, types: Iterable[str], package: ModuleType) -> None:
    """Refuses types that the package knows by name but cannot dequantise."""
    for name in sorted(set(types) - _PLAIN.keys()):
        kind = package.GGMLQuantizationType[name]
        block = np.zeros((1, package.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            package.quants.dequantize(block, kind)
        except NotImplementedError as error:
            raise WeightsError(
                f"{path}: holds tensors of type {name}, which the gguf package cannot dequantise. "
                "Use a Q4_0 to Q8_0 or Q2_K to Q6_K file of this model."
            ) from error


def _check_architecture(path: Path, fields: Mapping[str, GgufField]) -> None:
    found = fields.get("general.architecture", ARCHITECTURES[0])
    if found not in ARCHITECTURES:
        raise WeightsError(
            f"{path}: is a GGUF file of architecture {found!r}, allowed: "
            f"{', '.join(ARCHITECTURES)}. Use a file of a Wan2.1 transformer or a UMT5 encoder."
        )
    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise WeightsError(
            f"{path}: is one of {parts} parts of a split GGUF file. Join them "
            "with llama.cpp's gguf-split --merge."
        )


def _true_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, GgufField]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the tensors had in PyTorch.

    In order: the one that the metadata keeps; the one of a patch embedding, which has as many
    output channels as its bias; leading axes of size one.
    """
    true: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        kept = fields.get(ORIGINAL_SHAPE + name)
        if kept is not None:
            if not isinstance(kept, list) or math.prod(kept) != math.prod(shape):
                raise WeightsError(f"{path}: tensor {name} {shape}: original shape {kept!r}")
            true[name] = tuple(int(size) for size in kept)
            continue
        rank = next((axes for end, axes in _RANKS if name.endswith(end)), 0)
        bias = shapes.get(name.removesuffix("weight") + "bias")
        if "patch_embedding" in name and name.endswith("weight") and len(shape) != 5 and bias:
            cells = math.prod((*bias, *_PATCH))
            if math.prod(shape) % cells == 0:
                shape = (math.prod(bias), math.prod(shape) // cells, *_PATCH)
        true[name] = (1,) * (rank - len(shape)) + shape
    return true
