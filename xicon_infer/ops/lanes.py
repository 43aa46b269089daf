"""Two queues of work on a device, copies and computing, and the events between them.

`xicon_infer.ops.offload` talks to a device through `Lanes` alone, so that its events can be tested
where there is no GPU. The CUDA form is unverified on a GPU.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Lane = Literal["copy", "compute"]


class Lanes(Protocol):
    """Two queues of work on one device: copies, and everything else.

    An event that was never recorded does not hold anything up. Waiting is for the last recording
    before the call.
    """

    def empty(self, size: int) -> Tensor:
        """Returns a device buffer, uint8 [size]."""

    def pin(self, host: Tensor) -> bool:
        """Locks the pages of a host tensor, so that copies run on their own; False if it cannot."""

    def unpin(self, host: Tensor) -> None:
        """Unlocks what `pin` locked."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy of host bytes into a device buffer, uint8 of equal size."""

    def event(self) -> Any:
        """Returns a new event."""

    def record(self, event: Any, lane: Lane) -> None:
        """Queues that the event happens when all work of the lane so far is done."""

    def wait(self, event: Any, lane: Lane) -> None:
        """Queues that later work of the lane waits for the event."""

    def finish(self) -> None:
        """Returns when all copies are done."""


class DirectLanes:
    """Lanes of a device without queues: everything happens at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, size: int) -> Tensor:
        """Returns a buffer."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pin(self, host: Tensor) -> bool:
        """Returns True: there is nothing to lock."""
        return True

    def unpin(self, host: Tensor) -> None:
        """Does nothing."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies."""
        target.copy_(source)

    def event(self) -> Any:
        """Returns nothing: all work is done already."""
        return None

    def record(self, event: Any, lane: Lane) -> None:
        """Does nothing."""

    def wait(self, event: Any, lane: Lane) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


class CudaLanes:
    """Lanes of a CUDA device: the current stream, and one for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, size: int) -> Tensor:
        """Returns a device buffer."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pin(self, host: Tensor) -> bool:
        """Locks the pages where they are.

        Not `Tensor.pin_memory`: that copies, and rounds every size up to a power of two.
        """
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        locked = int(runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)) == 0
        if not locked:
            # CUDA keeps the error, and the next kernel, whichever it is, would be blamed for it.
            with suppress(RuntimeError):
                torch.ones(1, device=self.device)
        return locked

    def unpin(self, host: Tensor) -> None:
        """Unlocks the pages."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(host.data_ptr())

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queues the copy on the copy stream."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def event(self) -> Any:
        """Returns an event without a clock."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self, event: Any, lane: Lane) -> None:
        """Records on the stream of the lane."""
        event.record(self._stream(lane))

    def wait(self, event: Any, lane: Lane) -> None:
        """Makes the stream of the lane wait; the host does not."""
        self._stream(lane).wait_event(event)

    def finish(self) -> None:
        """Waits for the copy stream."""
        self.stream.synchronize()

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self.stream if lane == "copy" else torch.cuda.current_stream(self.device)


def lanes_of(device: torch.device) -> Lanes:
    """Returns the lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else DirectLanes(device)
