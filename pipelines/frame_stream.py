"""Decoded frames on their way to whoever uses them, in a thread, while decoding goes on.

The caller's thread queues the work of the device and never waits for it: a piece becomes bytes on
the device, its copy to pinned host memory begins, and the next piece is queued. A second thread
waits for each copy, keeps the frames, and hands them on, say to a video encoder. At most `depth`
pieces wait between the two, so that a slow encoder slows the decoder instead of filling memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from xicon_infer.ops.pixels import model_to_bytes
from xicon_infer.types import Progress, UInt8Array

Use = Callable[[Iterator[UInt8Array]], object]
"""Takes blocks of frames uint8 [n, H, W, 3], in order; it may stop before their end."""

DEPTH = 2
_POLL_S = 0.1
"""How often the decoder, waiting for room, looks whether the user of its frames failed."""


class Copy(NamedTuple):
    """A copy under way: frames uint8 [n, H, W, 3] on the host, valid after `wait`."""

    frames: Tensor
    wait: Callable[[], object]


class _Stopped(Exception):
    """The decoder failed, so that no further frames come; ends the user of the frames."""


def begin_copy(frames: Tensor) -> Copy:
    """Begins to copy frames uint8 [n, H, W, 3] to the host, and does not wait.

    On a GPU into pinned memory, which PyTorch keeps and uses again, with an event behind it.
    """
    if frames.device.type != "cuda":
        return Copy(frames, lambda: None)
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
    host.copy_(frames, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(frames.device))
    return Copy(host, event.synchronize)


def stream_frames(
    pieces: Iterable[Tensor],
    frames: UInt8Array,
    *,
    progress: Progress,
    use: Use | None = None,
    copy: Callable[[Tensor], Copy] = begin_copy,
    depth: int = DEPTH,
) -> None:
    """Fills `frames` with decoded pieces, and has them used as they come.

    Args:
        pieces: model videos [1, 3, n, H, W], asked for in this thread.
        frames: uint8 [F, H, W, 3], as many as the pieces hold together; written.
        progress: told of frames whose decoding was queued, in this thread.
        use: gets the frames in another thread. All of `frames` is filled even if it stops early.
        copy: begins to bring bytes to the host.
        depth: most pieces that wait, at least 1.

    Raises:
        BaseException: what `pieces`, `progress` or `use` raise; the other side is stopped first.
    """
    handover = _Handover(frames, use, depth)
    done = 0
    try:
        for piece in pieces:
            copied = copy(model_to_bytes(piece))
            handover.put(copied)
            done += copied.frames.shape[0]
            progress.step(done, len(frames), "frame")
        handover.put(None)
    except BaseException:
        handover.stop()
        raise
    finally:
        handover.join()


class _Handover:
    """The queue between both threads, and the second thread.

    Args:
        frames: as in `stream_frames`.
        use: as there.
        depth: as there.
    """

    def __init__(self, frames: UInt8Array, use: Use | None, depth: int) -> None:
        self._frames, self._use = frames, use
        self._waiting: queue.Queue[Copy | None] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._failed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="frames", daemon=True)
        self._thread.start()

    def put(self, item: Copy | None) -> None:
        """Hands over a piece, or None for the end; ends quietly if the user of frames failed."""
        while not self._failed.is_set():
            with suppress(queue.Full):
                self._waiting.put(item, timeout=_POLL_S)
                return
        self.join()

    def stop(self) -> None:
        """Has the second thread end without waiting for more frames."""
        self._stopped.set()

    def join(self) -> None:
        """Waits for the second thread; raises what it raised, unless it was told to stop."""
        self._thread.join()
        if self._error is not None and not self._stopped.is_set():
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        try:
            arriving = self._arriving()
            if self._use is not None:
                self._use(arriving)
            for _ in arriving:  # what a user that stopped early left
                pass
        except _Stopped:
            pass
        except BaseException as caught:  # noqa: BLE001  raised again in the decoder's thread
            self._error = caught
            self._failed.set()

    def _arriving(self) -> Iterator[UInt8Array]:
        start = 0
        while (item := self._next()) is not None:
            item.wait()
            stop = start + item.frames.shape[0]
            self._frames[start:stop] = item.frames.numpy()
            yield self._frames[start:stop]
            start = stop

    def _next(self) -> Copy | None:
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                return self._waiting.get(timeout=_POLL_S)
        raise _Stopped
