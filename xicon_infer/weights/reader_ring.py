"""From a file to a device through a ring of pinned memory.

A reader takes the slot that has waited longest, waits until the copy out of it is done, fills it
from the file and sends it off; the copy runs while other readers read. The ring knows the device
as three calls, so that its order is tested without one.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from xicon_infer.weights.reader_extents import Extent
from xicon_infer.weights.reader_threads import read_fully

SLOTS = 8
SLOT_BYTES = 64 * 2**20
"""512 MiB of pinned memory at most, pinned slot by slot while other slots are being read into."""


class Event(Protocol):
    """Something that a device will have done."""

    def synchronize(self) -> None:
        """Returns when it is done."""


class Device(Protocol):
    """Memory that bytes are copied to from the slots of a ring. Called from several threads."""

    def slot(self, index: int) -> memoryview:
        """Returns the host memory of a slot, made when it is first asked for."""

    def copy(self, index: int, extent: Extent) -> Event:
        """Starts to copy the pieces of an extent, which begins at the slot's first byte."""

    def finish(self) -> None:
        """Returns when everything that was started is done."""


def make_ring(device: Device, slots: int = SLOTS) -> Callable[[int, Extent], None]:
    """Returns a function that reads an extent of a file and starts its copy to the device.

    It is called in reader threads. When it returns, the slot may still be copied: call
    `device.finish()` before the data are used or their memory is given back.

    Args:
        device: where the bytes go.
        slots: how many extents may be under way at once.
    """
    free: queue.SimpleQueue[tuple[int, Event | None]] = queue.SimpleQueue()
    for index in range(slots):
        free.put((index, None))

    def take(fd: int, extent: Extent) -> None:
        index, copied = free.get()
        try:
            if copied is not None:
                copied.synchronize()
            read_fully(fd, [device.slot(index)[: extent.end - extent.start]], extent.start)
            copied = device.copy(index, extent)
        finally:
            free.put((index, copied))

    return take


class CudaDevice:
    """Slabs on a CUDA device, filled by one copy stream. Unverified on a GPU.

    Args:
        device: with or without an index.
        slabs: uint8 tensors on it.
        slot_bytes: of each slot.
    """

    def __init__(self, device: torch.device, slabs: Sequence[Tensor], slot_bytes: int) -> None:
        # Reader threads start on device 0; "cuda" without an index is this thread's device.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._slabs = slabs
        self._slot_bytes = slot_bytes
        self._slots: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # The allocator may hand out memory that work already queued here still uses.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def slot(self, index: int) -> memoryview:
        """Returns the pinned memory of a slot."""
        if index not in self._slots:
            with torch.cuda.device(self._device):
                self._slots[index] = torch.empty(
                    self._slot_bytes, dtype=torch.uint8, pin_memory=True
                )
        return self._slots[index].numpy().data

    def copy(self, index: int, extent: Extent) -> Event:
        """Queues one copy for each piece; returns the event behind them."""
        slot = self._slots[index]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for start, end, slab, offset in extent.pieces:
                source = slot[start - extent.start : end - extent.start]
                self._slabs[slab][offset : offset + end - start].copy_(source, non_blocking=True)
            return self._stream.record_event()

    def finish(self) -> None:
        """Waits for the copy stream."""
        self._stream.synchronize()
