"""Host memory for weights: fresh memory of huge pages, or the mapped file itself."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from xicon_infer.errors import OutOfMemory
from xicon_infer.weights.reader_extents import GAP_BYTES, Extent
from xicon_infer.weights.reader_threads import read_fully, read_through

# Linux 5.14: brings pages in and enters them in the page table, as many as it can at a time.
_MADV_POPULATE_READ = 22
_SCRATCH_BYTES = 256 * 2**10


def host_slab(size: int) -> mmap.mmap:
    """Returns fresh memory, in huge pages where the system gives them.

    Args:
        size: bytes, at least 1.

    Raises:
        OutOfMemory: the system has none.
    """
    try:
        slab = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemory(
            f"no {size / 1e9:.2f} GB of host memory for weights: {error}. Close other programs, or "
            "choose smaller weights."
        ) from error
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        try:
            slab.madvise(advice)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
    return slab


def fill_slabs(slabs: Sequence[mmap.mmap]) -> Callable[[int, Extent], None]:
    """Returns a function that reads an extent of a file into slabs; for reader threads."""
    views = [memoryview(slab) for slab in slabs]
    sink = memoryview(bytearray(GAP_BYTES))  # written by any thread, read by none

    def take(fd: int, extent: Extent) -> None:
        targets = []
        position = extent.start
        for start, end, slab, offset in extent.pieces:
            targets += [sink[: start - position], views[slab][offset : offset + end - start]]
            position = end
        read_fully(fd, targets, extent.start)

    return take


def map_file(fd: int) -> mmap.mmap:
    """Returns a file as memory; what is written to it stays private.

    Raises:
        OSError: the file cannot be mapped.
    """
    return mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)


def bring_in(mapping: mmap.mmap) -> Callable[[int, Extent], None]:
    """Returns a function that has an extent of a mapped file in memory; for reader threads."""
    start_address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    scratch = memoryview(bytearray(_SCRATCH_BYTES))

    def take(fd: int, extent: Extent) -> None:
        start = extent.start // mmap.PAGESIZE * mmap.PAGESIZE
        code = _madvise(start_address + start, extent.end - start)
        if code in (errno.EINVAL, errno.ENOSYS):  # an older system: into the page cache at least
            read_through(fd, extent.start, extent.end, scratch)
        elif code:
            raise OSError(code, os.strerror(code))

    return take


def host_tensor(
    memory: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """Returns a tensor whose storage is a part of mapped memory, which it keeps alive.

    A part that does not start at a multiple of the dtype's size is copied.

    Args:
        memory: writable; changes of a mapped file stay private.
        offset: of the first byte.
        dtype: as stored.
        shape: as stored.
    """
    count = prod(shape)
    if offset % dtype.itemsize:
        part = bytearray(memory[offset : offset + count * dtype.itemsize])
        return torch.frombuffer(part, dtype=dtype).reshape(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).reshape(shape)


def _madvise(address: int, size: int) -> int:
    """Populates pages; returns the error number or 0. `mmap.madvise` would hold Python's lock."""
    while True:
        if _library().madvise(address, size, _MADV_POPULATE_READ) == 0:
            return 0
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            return code


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library
