"""Whether a file is of the kind that its name promises, told from its header.

For files whose hash nobody has listed. It finds what downloads go wrong with: a web page or an
error message in place of the file, a Git LFS pointer, half a file. It does not read the weights.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from xicon_infer.errors import WeightsError

_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".gguf")
_STARTS = {
    ".onnx": (b"\x08", "an ONNX model"),  # the field ir_version, which comes first
    ".torchscript": (b"PK\x03\x04", "a TorchScript archive"),
}
_TEXTS = (
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML document (often a storage error)"),
    (b'{"error', "an error message"),
)


def check_header(path: Path, name: str) -> None:
    """Raises WeightsError if a file is plainly not what its name says.

    Args:
        path: the file, under any name.
        name: its published name, whose suffix says what it should be; of an unknown suffix only
            pages, pointers and error messages are refused.

    Raises:
        WeightsError: it is empty, something else, damaged or incomplete.
    """
    suffix = PurePosixPath(name).suffix.lower()
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"{name} cannot be read: {error.strerror or error}") from error
    if not head:
        raise WeightsError(f"{name} is empty. Fetch it again.")
    for start, what in _TEXTS:
        if head.lstrip().lower().startswith(start):
            raise WeightsError(f"{name} is {what}, not the file. Check the address and the login.")
    start, what = _STARTS.get(suffix, (b"", ""))
    if not head.startswith(start):
        raise WeightsError(f"{name} is not {what}: it starts with {head[:8].hex()}.")
    if suffix == ".json":
        _check_json(path, name)
    elif suffix in _CHECKPOINTS:
        _check_checkpoint(path, name)


def _check_json(path: Path, name: str) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{name} is not whole JSON: {error}") from error


def _check_checkpoint(path: Path, name: str) -> None:
    from xicon_infer.weights.checkpoint import open_checkpoint

    try:
        open_checkpoint(path)
    except WeightsError as error:
        raise WeightsError(error.message.replace(str(path), name), code=error.code) from error
