"""Weight files brought into the page cache while the program starts. Loads no torch.

Importing torch takes a second or two in which the disk is idle: start this before. The loader then
finds the first gigabytes in memory, and reads the rest from the disk as it would have.

A warm-up is a hint. It never fails: a file that is missing or cannot be read is left to the loader
to name. It reads no more than three quarters of the memory that is free, so that it does not push
out again what it has brought in.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from xicon_infer.weights.manifest import files_for, locate
from xicon_infer.weights.reader_threads import read_through, share_out

READ_BYTES = 16 * 2**20
"""One system call. Short ones would wait for Python's lock, which imports hold for long."""

_SCRATCH_BYTES = 256 * 2**10
_MEMORY_SHARE = 0.75


class _Part(NamedTuple):
    """Bytes start to end of a file."""

    path: Path
    start: int
    end: int


class _Stopped(Exception):
    """The warm-up was told to stop."""


class Warmup:
    """A warm-up under way, from `warm_files`.

    bytes_read: so far. skipped: files that could not be read, and why.
    """

    def __init__(self, parts: Sequence[_Part], threads: int) -> None:
        self.bytes_read = 0
        self.skipped: dict[Path, str] = {}
        self._parts = parts
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(threads,), name="warmup", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Returns True if nothing is being read any more."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stops it, and returns when its threads have ended: after the reads in their hands."""
        self._stop.set()
        self._thread.join()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until everything is read; returns whether it is.

        Args:
            timeout_s: longest wait; None waits to the end.
        """
        self._thread.join(timeout_s)
        return self.done

    def _run(self, threads: int) -> None:
        scratch = memoryview(bytearray(_SCRATCH_BYTES))

        def work(part: _Part) -> int:
            if self._stop.is_set():
                raise _Stopped
            try:
                _warm(part, scratch)
            except (OSError, EOFError) as error:
                self.skipped.setdefault(part.path, str(error))
                return 0
            return part.end - part.start

        def after(num_bytes: int) -> None:
            self.bytes_read += num_bytes

        with suppress(_Stopped):
            share_out(self._parts, work, threads=threads, after=after)


def warm_files(
    paths: Sequence[Path], *, threads: int = 4, limit_bytes: int | None = None
) -> Warmup:
    """Starts to read files into the page cache, and returns at once.

    Args:
        paths: in the order in which they will be needed; one that is missing is skipped.
        threads: that read, at least 1.
        limit_bytes: most to read of all files together; None for what fits into memory. Never
            more than three quarters of the free memory.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    room = int(_MEMORY_SHARE * free_memory())
    limit = room if limit_bytes is None else min(room, limit_bytes)
    return Warmup(list(_parts(paths, limit)), threads)


def warm_preset(
    pipeline: str, preset: str, search_dirs: Sequence[Path], *, limit_bytes: int | None = None
) -> Warmup:
    """Starts to read the files of a preset that are there; arguments as in `warm_files`."""
    found = (locate(entry, search_dirs) for entry in files_for(pipeline, preset))
    return warm_files([path for path in found if path is not None], limit_bytes=limit_bytes)


def free_memory(root: Path = Path("/")) -> int:
    """Returns the host memory that can still be used, in bytes; 0 if that cannot be told.

    Page cache counts as free. In a container it is what its limit leaves (cgroup version 2).

    Args:
        root: of the file system that describes the machine, for tests.
    """
    available = _fields(root / "proc/meminfo").get("MemAvailable:", 0) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return available
    reclaimable = _fields(group / "memory.stat").get("file", 0)
    return max(0, min(available, limit - used + reclaimable))


def _fields(path: Path) -> dict[str, int]:
    """Returns the numbers of a file with a name and a number on each line."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _parts(paths: Sequence[Path], limit: int) -> Iterator[_Part]:
    for path in dict.fromkeys(paths):
        try:
            size = path.stat().st_size
        except OSError:
            continue
        for start in range(0, min(size, limit), READ_BYTES):
            yield _Part(path, start, min(start + READ_BYTES, size, limit))
        limit -= min(size, limit)


def _warm(part: _Part, scratch: memoryview) -> None:
    fd = os.open(part.path, os.O_RDONLY)
    try:
        read_through(fd, part.start, part.end, scratch)
    finally:
        os.close(fd)
