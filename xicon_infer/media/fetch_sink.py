"""The file that a fetch writes: counted, hashed, bounded, and stopped between two blocks."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from xicon_infer.errors import Cancelled, MediaError
from xicon_infer.media.fetch_network import Network
from xicon_infer.media.fetch_types import FetchLimits, Role
from xicon_infer.media.write import write_error

BLOCK_BYTES = 1 << 16


class Tally:
    """Bytes of all files of a job: those that arrived, those announced, and room for them.

    Every thread counts, one thread tells.
    """

    def __init__(self, folder: Path, limits: FetchLimits, network: Network) -> None:
        self._lock = threading.Lock()
        self._folder, self._limits, self._network = folder, limits, network
        self.done = 0
        self.announced = 0

    def add(self, num_bytes: int) -> None:
        """Counts bytes that arrived; a negative number takes them back."""
        with self._lock:
            self.done += num_bytes

    def announce(self, num_bytes: int, field: str) -> None:
        """Counts bytes that will come.

        Raises:
            MediaError: DISK_FULL, if the disk has no room for everything announced so far.
        """
        with self._lock:
            self.announced += num_bytes
            needed = max(0, self.announced - self.done) + self._limits.reserve_bytes
            if self._network.free_bytes(self._folder) < needed:
                raise _disk_full(field)


@dataclass(frozen=True)
class Intake:
    """One fetch on its way. stop: set when it is to end. deadline: on the clock of `network`."""

    field: str
    role: Role
    limits: FetchLimits
    network: Network
    stop: threading.Event
    tally: Tally
    deadline: float

    def check(self) -> None:
        """Raises Cancelled if the fetch is to end."""
        if self.stop.is_set():
            raise Cancelled("the fetch was stopped")

    def left_s(self) -> float:
        """Returns the seconds left, above 0.

        Raises:
            MediaError: FETCH_TIMEOUT, if none are left.
        """
        left = self.deadline - self.network.now()
        if left <= 0:
            allowed = self.limits.total_s(self.role)
            raise MediaError(
                f"'{self.field}': it did not arrive within {allowed:g} s; "
                "use a faster server or a smaller file",
                field=self.field,
                code="FETCH_TIMEOUT",
            )
        return left


class Sink:
    """A file that grows block by block. size: bytes written. sha256: of them, when done."""

    def __init__(self, file: io.FileIO, path: Path, intake: Intake) -> None:
        self._file, self._intake = file, intake
        self._digest = hashlib.sha256()
        self._announced = 0
        self._max_bytes = intake.limits.max_bytes(intake.role)
        self.path = path
        self.size = 0

    @property
    def sha256(self) -> str:
        """Returns the hash of what is written, as 64 hexadecimal digits."""
        return self._digest.hexdigest()

    def announce(self, num_bytes: int) -> None:
        """Says how large the file will be, before anything of it is written.

        Raises:
            MediaError: MEDIA_TOO_LARGE or DISK_FULL.
        """
        self.bound(num_bytes)
        more = max(0, num_bytes - self._announced)
        self._announced += more
        self._intake.tally.announce(more, self._intake.field)

    def bound(self, num_bytes: int) -> None:
        """Raises MediaError MEDIA_TOO_LARGE if the file may not have so many bytes."""
        if num_bytes > self._max_bytes:
            raise _too_large(self._intake, num_bytes)

    def write(self, block: bytes) -> None:
        """Adds a block.

        Raises:
            MediaError: MEDIA_TOO_LARGE or DISK_FULL.
            Cancelled: the fetch is to end.
        """
        self._intake.check()
        self.bound(self.size + len(block))
        self.size += len(block)
        try:
            rest = memoryview(block)
            while rest:  # an unbuffered file may take it in pieces
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise write_error(error, self._intake.role, self._intake.field) from error
        self._digest.update(block)
        self._intake.tally.add(len(block))

    def restart(self) -> None:
        """Empties the file, for another try from its first byte."""
        self._intake.tally.add(-self.size)
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.size = 0


@contextmanager
def open_sink(folder: Path, intake: Intake) -> Iterator[Sink]:
    """Yields an empty file under a random name; removed if the block fails.

    Raises:
        MediaError: DISK_FULL, or MEDIA_WRITE where the folder cannot be written to.
    """
    path = folder / f".{secrets.token_hex(8)}"
    try:
        intake.tally.announce(0, intake.field)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise write_error(error, intake.role, intake.field) from error
    try:
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123  a descriptor
            yield Sink(file, path, intake)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _too_large(intake: Intake, num_bytes: int) -> MediaError:
    allowed = intake.limits.max_bytes(intake.role) / 1e6
    return MediaError(
        f"'{intake.field}': the file has {num_bytes / 1e6:.1f} MB or more, "
        f"at most {allowed:.1f} MB are allowed; shorten or compress it",
        field=intake.field,
        code="MEDIA_TOO_LARGE",
    )


def _disk_full(field: str) -> MediaError:
    return MediaError(
        f"'{field}': the disk of this worker has no room for the file; "
        "try again later, or give the worker a larger disk",
        field=field,
        code="DISK_FULL",
    )
