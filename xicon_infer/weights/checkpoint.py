"""Checkpoint files: what is in them, and their tensors.

`open_checkpoint` reads names, shapes and dtypes without reading weights, and refuses what is not
a whole checkpoint with a sentence that says what the file is instead. The format is told from the
content: safetensors under any name, shards with an index, GGUF, and PyTorch's `.pth`, `.pt` and
`.bin`. PyTorch files are read with `weights_only=True`: a pickle that wants to run code is refused.
Tensors stay views of the mapped file until something converts them; GGUF blocks are dequantised.
"""

from __future__ import annotations

import json
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
from xicon_infer.weights.gguf_file import (
    GgufTensor,
    dtype_of,
    is_quantized,
    read_gguf_header,
    read_gguf_tensors,
)
from xicon_infer.weights.gguf_header import MAGIC
from xicon_infer.weights.quantized import check_metadata, refuse_integers
from xicon_infer.weights.safetensors_file import read_safetensors_header

INDEX_SUFFIX = ".safetensors.index.json"

BLOCK_DTYPE = torch.bfloat16
"""What the blocks of GGUF files become unless the reader asks for another dtype."""

_OTHER_FORMATS = ((b"\x1f\x8b", "gzip-compressed, not a checkpoint. Unpack it."),)

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

    dtypes: of each tensor as `read_tensors` gives it. metadata: of a safetensors or GGUF file.
    files: tensor name -> file that holds it. offsets: tensor name -> where its bytes start in that
    file (safetensors). blocks: tensor name -> place and type of a GGUF file's tensors. loaded:
    tensors of a PyTorch file, mapped where its format allows.
    """

    path: Path
    format: Literal["safetensors", "torch", "gguf"]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    files: dict[str, Path] = field(repr=False)
    offsets: dict[str, int] = field(repr=False, default_factory=dict)
    blocks: dict[str, GgufTensor] = field(repr=False, default_factory=dict)
    loaded: dict[str, Tensor] = field(repr=False, default_factory=dict)

    @property
    def quantized(self) -> dict[str, str]:
        """Returns tensor name -> GGUF type ("Q4_K") of the tensors that reading dequantises."""
        return {name: b.type for name, b in self.blocks.items() if is_quantized(b.type)}


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
        checkpoint = _open_sharded(path)
    else:
        kind = _tell_format(path)
        if kind == "gguf":
            checkpoint = _open_gguf(path)
        elif kind == "safetensors":
            checkpoint = _open_safetensors(path)
        else:
            checkpoint = _open_torch(path, is_zip=kind == "zip")
    refuse_integers(path, checkpoint.dtypes)
    return checkpoint


def read_tensors(
    checkpoint: Checkpoint,
    names: Collection[str] | None = None,
    *,
    dtype: torch.dtype = BLOCK_DTYPE,
) -> dict[str, Tensor]:
    """Returns tensors by name, on the CPU, as stored; views of the mapped file where possible.

    Args:
        checkpoint: from `open_checkpoint`.
        names: which; None for all.
        dtype: what the blocks of a GGUF file become, each dequantised in float32 and rounded
            once. Nothing else is converted.

    Raises:
        WeightsError: a name is not in the file, or the file changed since it was opened.
    """
    wanted = list(checkpoint.shapes) if names is None else list(names)
    unknown = [name for name in wanted if name not in checkpoint.shapes]
    if unknown:
        raise WeightsError(f"{checkpoint.path}: holds no tensor {', '.join(sorted(unknown)[:8])}")
    if checkpoint.format == "torch":
        return {name: checkpoint.loaded[name] for name in wanted}
    if checkpoint.format == "gguf":
        blocks = {name: checkpoint.blocks[name] for name in wanted}
        return read_gguf_tensors(checkpoint.path, blocks, dtype)
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


def _tell_format(path: Path) -> Literal["safetensors", "gguf", "zip", "pickle"]:
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
    if head.startswith(MAGIC):
        return "gguf"
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
    header = read_safetensors_header(path)
    check_metadata(path, header.metadata, header.dtypes)
    return Checkpoint(
        path=path,
        format="safetensors",
        shapes=header.shapes,
        dtypes=header.dtypes,
        metadata=header.metadata,
        files=dict.fromkeys(header.shapes, path),
        offsets=header.offsets,
    )


def _open_gguf(path: Path) -> Checkpoint:
    header = read_gguf_header(path)
    return Checkpoint(
        path=path,
        format="gguf",
        shapes={name: tensor.shape for name, tensor in header.tensors.items()},
        dtypes={name: dtype_of(t.type, BLOCK_DTYPE) for name, t in header.tensors.items()},
        metadata=header.metadata,
        files=dict.fromkeys(header.tensors, path),
        blocks=header.tensors,
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
        offsets={name: opened[file].offsets[name] for name, file in shards.items()},
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
