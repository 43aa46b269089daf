"""A safetensors file written one tensor at a time, in the order in which they are given.

safetensors' own writer takes all tensors at once and sorts them by dtype. Here the header has its
room reserved in front and is filled in last, so that no more than one tensor is held, and the
tensors lie in the order in which a loader wants them. The data start at a multiple of `ALIGNMENT`.

Source: huggingface/safetensors: README.md (format; spaces may follow the JSON of the header).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from xicon_infer.errors import WeightsError
from xicon_infer.weights.safetensors_file import DTYPES

ALIGNMENT = 4096
"""Of the first data byte; what direct reads from a disk need."""

_ENTRY_BYTES = 200
"""More than an entry of the header takes beside the name: dtype, up to five sizes, two offsets."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorWriter:
    """Writes one file; use it in a `with` statement, which removes an unfinished file.

    Args:
        path: made new, replaced if it is there.
        names: of every tensor that may be added.
        metadata_bytes: room for the metadata.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata_bytes: int) -> None:
        needed = 8 + metadata_bytes + sum(len(name) + _ENTRY_BYTES for name in names)
        self.path = path
        self._start = -(-needed // ALIGNMENT) * ALIGNMENT
        self._entries: dict[str, dict[str, object]] = {}
        self._position = 0
        self._finished = False
        try:
            self._file = path.open("wb")
            self._file.seek(self._start)
        except OSError as error:
            raise _refusal(path, error) from error

    def __enter__(self) -> TensorWriter:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file; removes it if `finish` was not reached."""
        self._file.close()
        if not self._finished:
            self.path.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> str:
        """Writes a tensor behind the last one; returns the SHA-256 of its bytes.

        Raises:
            WeightsError: the disk is full or the file cannot be written; or the tensor would not
                start at a multiple of its item size, as one of an odd width does to the next.
        """
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if self._position % data.element_size():
            raise WeightsError(
                f"{self.path.name}: {name} would start at byte {self._position}, which is no "
                f"multiple of {data.element_size()}; models of odd widths cannot be prepared"
            )
        raw = data.view(torch.uint8).numpy().data
        try:
            self._file.write(raw)
        except OSError as error:
            raise _refusal(self.path, error) from error
        end = self._position + raw.nbytes
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, end],
        }
        self._position = end
        return hashlib.sha256(raw).hexdigest()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header and brings everything to the disk.

        Raises:
            WeightsError: the metadata exceed their room, or the file cannot be written.
        """
        header = json.dumps(
            {"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")
        ).encode()
        room = self._start - 8
        if len(header) > room:
            raise WeightsError(f"{self.path.name}: {len(header)} bytes of header, room for {room}")
        try:
            self._file.seek(0)
            self._file.write(room.to_bytes(8, "little") + header.ljust(room))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refusal(self.path, error) from error
        self._finished = True


def _refusal(path: Path, error: OSError) -> WeightsError:
    return WeightsError(
        f"{path.parent}: {path.name} cannot be written: {error.strerror or error}. Free space or "
        "choose another folder.",
        field="output",
    )
