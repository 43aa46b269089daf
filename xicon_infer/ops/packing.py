"""Tensors of any kind side by side in one buffer of bytes, so that one copy moves them all."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes; tensors in a buffer start at multiples of this, as the widest loads of a kernel want."""


class Place(NamedTuple):
    """Where a tensor lies in a packed buffer."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """Returns the tensor in a buffer, uint8 [n]."""
        part = buffer[self.offset : self.offset + self.nbytes].view(self.dtype)
        return part.as_strided(self.shape, self.stride)


def layout(tensors: Iterable[Tensor]) -> list[Place]:
    """Returns where each tensor lies in a buffer that holds them all."""
    places: list[Place] = []
    for tensor in tensors:
        # Keeps the order in memory of tensors without gaps or overlap; others become plain.
        like = torch.empty_like(tensor, device="meta")
        offset = -(-end(places) // ALIGNMENT) * ALIGNMENT
        shape, stride = tuple(tensor.shape), like.stride()
        places.append(
            Place(offset, tensor.numel() * tensor.element_size(), tensor.dtype, shape, stride)
        )
    return places


def end(places: Sequence[Place]) -> int:
    """Returns the bytes of the buffer."""
    return places[-1].offset + places[-1].nbytes if places else 0


def own_pages(size: int) -> Tensor:
    """Returns host memory, uint8 [size], in pages that hold nothing else.

    Memory is locked by whole pages; a page that two buffers share may be refused to the second.
    """
    page = mmap.PAGESIZE
    room = torch.empty(page + -(-size // page) * page, dtype=torch.uint8)
    start = -room.data_ptr() % page
    return room[start : start + size]
