"""Checkpoint files: what is in them, and their tensors.

`open_checkpoint` reads names, shapes and dtypes without reading weights, and refuses what is not
a whole checkpoint with a sentence that says what the file is instead. The format is told from the
content: safetensors under any name, shards with an index, and PyTorch's `.pth`, `.pt` and `.bin`.
PyTorch files are read with `weights_only=True`: a pickle that wants to run code is refused.
Tensors stay views of the mapped file until something converts them.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xicon_infer.errors import WeightsError

INDEX_SUFFIX = ".safetensors.index.json"

QUANTIZED_FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Layer formats of ComfyUI's mixed-precision files that can be read."""

_OTHER_FORMATS = (
    (b"GGUF", "a GGUF file, which this reader does not take"),
    (b"\x1f\x8b", "gzip-compressed, not a checkpoint. Unpack it."),
)

_DTYPES = {
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

_NESTED = ("module", "state_dict", "model", "model_state", "generator_ema")
"""Entries under which training tools keep the tensors ("module": DeepSpeed, as SCAIL's file)."""

_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
)
"""What a damaged pickle can raise on its way through the unpickler."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: names, shapes, dtypes; the weights stay in the file.

    metadata: of a safetensors file. files: tensor name -> file that holds it. loaded: tensors of
    a PyTorch file, mapped where its format allows.
    """

    path: Path
    format: Literal["safetensors", "torch"]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    files: dict[str, Path] = field(repr=False)
    loaded: dict[str, Tensor] = field(repr=False, default_factory=dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns what a checkpoint holds.

    Args:
        path: a file; an `*.safetensors.index.json`; or a folder with one index or one file.

    Raises:
        WeightsError: the file is missing, empty, incomplete, damaged, not a checkpoint, wants to
            run code, or is quantised in a format that cannot be read.
    """
    path = _choose_file(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _open_sharded(path)
    kind = _tell_format(path)
    if kind == "safetensors":
        return _open_safetensors(path)
    return _open_torch(path, is_zip=kind == "zip")


def read_tensors(checkpoint: Checkpoint, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Returns tensors by name, on the CPU, as stored; views of the mapped file where possible.

    Args:
        checkpoint: from `open_checkpoint`.
        names: which; None for all.

    Raises:
        WeightsError: a name is not in the file, or the file changed since it was opened.
    """
    wanted = list(checkpoint.shapes) if names is None else list(names)
    unknown = [name for name in wanted if name not in checkpoint.shapes]
    if unknown:
        raise WeightsError(f"{checkpoint.path}: holds no tensor {', '.join(sorted(unknown)[:8])}")
    if checkpoint.format == "torch":
        return {name: checkpoint.loaded[name] for name in wanted}
    by_file: dict[Path, list[str]] = {}
    for name in wanted:
        by_file.setdefault(checkpoint.files[name], []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, inside in by_file.items():
        tensors.update(_read_safetensors(file, inside))
    return {name: tensors[name] for name in wanted}


def _read_safetensors(file: Path, names: list[str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: cannot be read: {error}") from error


def _choose_file(path: Path) -> Path:
    """Returns the file to open for a file or a folder; refuses what is not there or not done."""
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX_SUFFIX}")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise WeightsError(
                f"{path}: a folder must hold one {INDEX_SUFFIX} or one .safetensors file, "
                f"found {len(found)}. Name the file."
            )
        return found[0]
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file. Fetch it, or correct the path.")
    control = path.with_name(path.name + ".aria2")
    if control.exists():
        raise WeightsError(f"{path}: its download is not finished ({control.name} is beside it)")
    return path


def _tell_format(path: Path) -> Literal["safetensors", "zip", "pickle"]:
    """Returns what a file looks like from its first bytes; refuses what is plainly something else.

    A safetensors file starts with the length of its header in 8 bytes, of which the last four are
    zero below 4 GB. Its first bytes alone can be those of any other format.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if not head:
        raise WeightsError(f"{path}: the file is empty. Fetch it again.")
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head[:8]):
        raise WeightsError(f"{path}: {_describe_text(head)}")
    for start, what in _OTHER_FORMATS:
        if head.startswith(start):
            raise WeightsError(f"{path}: is {what}")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80\x02"):  # torch.save, before it wrote zip files
        return "pickle"
    if head.startswith(b"\x80"):
        raise WeightsError(f"{path}: is a pickle that torch.save did not write, not a checkpoint")
    return "safetensors"


def _describe_text(head: bytes) -> str:
    text = head.decode("utf-8", errors="replace").lstrip().lower()
    again = "Fetch the file again, and check the address and the access token."
    if text.startswith("version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the weights. Run `git lfs pull`, or fetch the file itself."
        )
    if text.startswith(("<!doctype html", "<html")):
        return f"is a web page, not a checkpoint. {again}"
    if text.startswith("<?xml"):
        return f"is an XML document (often a storage error), not a checkpoint. {again}"
    if text.startswith(("{", "[")):
        return f"is a JSON document (often an error message), not a checkpoint. {again}"
    return f"is a text file, not a checkpoint. {again}"


def _open_safetensors(path: Path) -> Checkpoint:
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
    _check_quantization(path, metadata)
    return Checkpoint(
        path=path,
        format="safetensors",
        shapes={name: tuple(entry["shape"]) for name, entry in header.items()},
        dtypes={name: _DTYPES[entry["dtype"]] for name, entry in header.items()},
        metadata=metadata,
        files=dict.fromkeys(header, path),
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
    if dtype not in _DTYPES:
        raise WeightsError(
            f"{path}: tensor {name} has dtype {dtype}, allowed: {', '.join(_DTYPES)}"
        )
    if not all(type(count) is int and count >= 0 for count in counts):
        raise WeightsError(f"{path}: damaged header: tensor {name}: sizes {counts}")
    if end - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise WeightsError(
            f"{path}: damaged header: tensor {name} of shape {shape} and dtype {dtype} cannot "
            f"have {end - start} bytes"
        )
    return start, end


def _check_quantization(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuses ComfyUI mixed-precision files with layers in other formats than fp8."""
    if "_quantization_metadata" not in metadata:
        return
    try:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        formats = {layer: settings["format"] for layer, settings in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: unreadable quantisation metadata: {error}") from error
    for layer, name in formats.items():
        if name not in QUANTIZED_FORMATS:
            raise WeightsError(
                f"{path}: layer {layer} is quantised as {name}, allowed: "
                f"{', '.join(QUANTIZED_FORMATS)}. Use another file of this model."
            )


def _open_sharded(path: Path) -> Checkpoint:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: path.parent / str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: not an index of shards: {error!r}") from error
    if not shards:
        raise WeightsError(f"{path}: the index names no tensors")
    outside = sorted({str(weight_map[n]) for n, f in shards.items() if f.parent != path.parent})
    if outside:
        raise WeightsError(f"{path}: shards must lie beside the index: {', '.join(outside)}")
    missing = sorted({file.name for file in shards.values() if not file.is_file()})
    if missing:
        raise WeightsError(f"{path}: shards are missing: {', '.join(missing)}. Fetch them.")
    opened: dict[Path, Checkpoint] = {}
    for file in sorted(set(shards.values())):
        if _tell_format(_choose_file(file)) != "safetensors":
            raise WeightsError(f"{path}: shard {file.name} is not a safetensors file")
        opened[file] = _open_safetensors(file)
    absent = sorted(name for name, file in shards.items() if name not in opened[file].shapes)
    if absent:
        shown = ", ".join(absent[:8])
        raise WeightsError(f"{path}: {len(absent)} tensors are not in their shards: {shown}")
    return Checkpoint(
        path=path,
        format="safetensors",
        shapes={name: opened[file].shapes[name] for name, file in shards.items()},
        dtypes={name: opened[file].dtypes[name] for name, file in shards.items()},
        metadata={k: v for part in opened.values() for k, v in part.metadata.items()},
        files=shards,
    )


def _open_torch(path: Path, *, is_zip: bool) -> Checkpoint:
    if path.suffix == ".safetensors":  # torch.load would take the name for the format
        raise WeightsError(f"{path}: is a PyTorch file, not safetensors. Rename it to .pth.")
    if is_zip:
        _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise WeightsError(
                f"{path}: is a pickle that wants to run code, which is refused. Use a .safetensors "
                f"file of this model. ({str(error).strip().splitlines()[-1][:200]})"
            ) from error
        raise WeightsError(f"{path}: damaged or not a PyTorch checkpoint: {error}") from error
    except _PICKLE_ERRORS as error:
        raise WeightsError(f"{path}: damaged or not a PyTorch checkpoint: {error!r}") from error
    tensors = _named_tensors(content)
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors, but a {type(content).__name__}")
    return Checkpoint(
        path=path,
        format="torch",
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        metadata={},
        files=dict.fromkeys(tensors, path),
        loaded=tensors,
    )


def _check_archive(path: Path) -> None:
    """Refuses zip files that are incomplete or not written by `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{path}: incomplete or damaged: {error}. Fetch it again.") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path}: is a TorchScript program, not a checkpoint")
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(f"{path}: is a zip archive, not a checkpoint")


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """Returns the tensors of a loaded file: its own, else those of a known entry."""
    if not isinstance(content, Mapping):
        return {}
    own = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
    if own:
        return own
    nested = (_named_tensors(content[entry]) for entry in _NESTED if entry in content)
    return next((tensors for tensors in nested if tensors), {})
