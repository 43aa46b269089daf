"""Which bytes are read at once, and where in memory they go. Numbers only, no torch.

A tensor of `OWN_BYTES` or more gets memory of its own, a slab; smaller ones share slabs in the
order of the file. So a tensor that is dropped gives its memory back at once: the keys and values
of the cross-attention, one block, one component; no names need to be known for it.

An extent is one read: up to a given size of one file, cut at multiples of that size, so that two
threads never fetch the same page. It may reach over several tensors and over small gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

OWN_BYTES = 4 * 2**20
"""Tensors of this size or more get a slab of their own. Below 2 MiB huge pages do not fit, and
memory made of small pages fills at half the speed or less (`benchmarks/load.py`)."""

SHARED_BYTES = 64 * 2**20
"""Most that smaller tensors put into one slab."""

ALIGNMENT = 256
"""Where tensors start in a slab, in bytes; as the CUDA allocator's, and enough for every dtype."""

GAP_BYTES = 256 * 2**10
"""Bytes between two tensors that are read along rather than skipped: 0.26 ms at 1 GB/s, in place of
another request. Not tuned."""

_LEAST_BYTES = 2**20
_READS_PER_THREAD = 4
"""Few enough that a read is long, many enough that the threads end together."""


class Piece(NamedTuple):
    """Bytes start to end of a file that go to `offset` in a slab."""

    start: int
    end: int
    slab: int
    offset: int


class Extent(NamedTuple):
    """Bytes start to end of a file, read at once; what is in no piece is thrown away."""

    start: int
    end: int
    pieces: tuple[Piece, ...]


class Layout(NamedTuple):
    """Memory for tensors. slabs: bytes of each. places: tensor -> slab and offset in it."""

    slabs: list[int]
    places: dict[str, tuple[int, int]]


def plan_memory(sizes: Mapping[str, int]) -> Layout:
    """Returns the slabs for tensors, and where each tensor starts.

    Args:
        sizes: tensor name -> bytes, in the order of the file.
    """
    slabs: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    shared = -1  # the slab that small tensors go to
    for name, size in sizes.items():
        if size >= OWN_BYTES:
            places[name] = (len(slabs), 0)
            slabs.append(size)
            continue
        if shared < 0 or _aligned(slabs[shared]) + size > SHARED_BYTES:
            shared = len(slabs)
            slabs.append(0)
        offset = _aligned(slabs[shared])
        places[name] = (shared, offset)
        slabs[shared] = offset + size
    return Layout(slabs, places)


def extent_bytes(total: int, threads: int, largest: int) -> int:
    """Returns how much to read at once so that every thread has several reads to do.

    Args:
        total: bytes to read.
        threads: how many share them.
        largest: the answer for a large total, a multiple of 1 MiB.
    """
    share = -(-total // (threads * _READS_PER_THREAD * _LEAST_BYTES)) * _LEAST_BYTES
    return max(_LEAST_BYTES, min(share, largest))


def plan_extents(pieces: Iterable[Piece], size: int) -> list[Extent]:
    """Returns the reads that fetch some pieces of one file, in the order of the file.

    Args:
        pieces: in any order, not overlapping; empty ones are left out.
        size: most bytes of one read.
    """
    extents: list[Extent] = []
    run: list[Piece] = []
    for piece in sorted(p for p in pieces if p.end > p.start):
        for part in _cut(piece, size):
            fits = run and part.start // size == run[0].start // size
            if fits and part.start - run[-1].end <= GAP_BYTES:
                _append(run, part)
                continue
            if run:
                extents.append(Extent(run[0].start, run[-1].end, tuple(run)))
            run = [part]
    if run:
        extents.append(Extent(run[0].start, run[-1].end, tuple(run)))
    return extents


def _cut(piece: Piece, size: int) -> Iterator[Piece]:
    """Yields a piece in parts that do not cross a multiple of `size` in the file."""
    start = piece.start
    while start < piece.end:
        end = min(piece.end, (start // size + 1) * size)
        yield Piece(start, end, piece.slab, piece.offset + start - piece.start)
        start = end


def _append(run: list[Piece], part: Piece) -> None:
    """Adds a part to a run, as one with the last where both file and memory go on."""
    last = run[-1]
    goes_on = part.start == last.end and part.slab == last.slab
    if goes_on and part.offset == last.offset + last.end - last.start:
        run[-1] = last._replace(end=part.end)
    else:
        run.append(part)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
