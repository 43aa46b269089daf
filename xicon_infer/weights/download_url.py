"""One file from one address: resumed, checked, and there only when it is whole.

What has arrived lies beside the file as NAME.<identity>.part. The identity comes from the hash,
size and ETag of what is published, so a part of another version is never continued. The part is
locked while somebody writes to it: a second process waits and then finds the file. It is renamed
once its size and hash are right; a part that turned out wrong is deleted, one that was
interrupted is kept.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPResponse
from pathlib import Path
from typing import BinaryIO, Literal

from xicon_infer.errors import WeightsError
from xicon_infer.weights.download_http import (
    Broken,
    Status,
    Stop,
    Transfer,
    open_url,
    read_blocks,
    status_reason,
    without_query,
)

State = Literal["downloaded", "present", "resumed"]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_READ_BYTES = 1 << 22
_FRESH_BYTES = 1 << 20
"""An attempt that brings this much new counts as a success: the waits begin again."""
_LOCK_POLL_S = 0.2
_IDENTITY = re.compile(r"[0-9a-f]{12}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True)
class Source:
    """What is published at an address.

    headers: to send, as an access token. size_bytes, sha256: None while unknown. etag: whatever
    tells one version from another; "" if nothing does. fixed: the address names one version, so
    that its content cannot change; elsewhere `etag` is sent as If-Range.
    """

    url: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    size_bytes: int | None = None
    sha256: str | None = None
    etag: str = ""
    fixed: bool = False


@dataclass
class _Part:
    """The file being written, and what is known of it so far."""

    path: Path
    file: BinaryIO
    size: int
    expected: int | None
    validator: str
    digest: hashlib._Hash


def part_path(source: Source, target: Path) -> Path:
    """Returns where a file lies until it is whole."""
    identity = f"{source.sha256}|{source.etag}|{source.size_bytes}"
    return target.with_name(
        f"{target.name}.{hashlib.sha256(identity.encode()).hexdigest()[:12]}.part"
    )


def kept_bytes(source: Source, target: Path) -> int:
    """Returns how many bytes of a file an earlier, interrupted download left."""
    if not _can_resume(source):
        return 0
    try:
        size = part_path(source, target).stat().st_size
    except OSError:
        return 0
    return size if source.size_bytes is None or size <= source.size_bytes else 0


def fetch(
    source: Source,
    target: Path,
    *,
    transfer: Transfer,
    stop: Stop,
    arrived: Callable[[], bool],
    check: Callable[[Path], None],
    gained: Callable[[int], None],
) -> State:
    """Fetches a file and returns "downloaded", "resumed", or "present".

    Args:
        source: what is published.
        target: where it goes; replaced if it is there. Its folder is made.
        transfer: how often and how long to try.
        stop: ends it within a second.
        arrived: says, once nobody else writes, whether another process already put the file there.
        check: raises WeightsError for a whole file that is not what it should be.
        gained: told how many more bytes are there; fewer where it had to begin again.

    Raises:
        WeightsError: it could not be fetched, is not what it should be, or cannot be written.
        Cancelled: `stop` is set.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _drop_other_parts(source, target)
        with _locked_part(source, target, stop) as part:
            if arrived():
                return "present"
            resumed = _take_up(part, stop, gained)
            _complete(part, source, transfer=transfer, stop=stop, gained=gained)
            _verify(part, source, check)
            os.fsync(part.file.fileno())
            part.path.replace(target)
            return "resumed" if resumed else "downloaded"
    except OSError as error:
        raise disk_error(error, target) from error


def disk_error(error: OSError, target: Path) -> WeightsError:
    """Returns the error for a file that could not be written."""
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return WeightsError(
            f"{target} cannot be written: {reason}. Free some space and pull again; what has "
            "arrived is kept.",
            code="DISK_FULL",
        )
    return WeightsError(f"{target} cannot be written: {reason}. Choose a folder you may write to.")


def validator_of(headers: Message) -> str:
    """Returns what If-Range takes to name this version: a strong ETag, a date, or ""."""
    etag: str = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def update_digest(digest: hashlib._Hash, file: BinaryIO, after: Callable[[int], None]) -> None:
    """Feeds a file to a hash from its start.

    Args:
        digest: the hash.
        file: opened for reading.
        after: told how many bytes were read, block by block; what it raises ends the reading.
    """
    file.seek(0)
    while block := file.read(_READ_BYTES):
        digest.update(block)
        after(len(block))


def _can_resume(source: Source) -> bool:
    return bool(source.sha256 or source.etag)


def _drop_other_parts(source: Source, target: Path) -> None:
    """Deletes what is left of other versions, unless somebody is writing it."""
    keep = part_path(source, target)
    for other in target.parent.iterdir():
        identity = other.name.removeprefix(f"{target.name}.").removesuffix(".part")
        if other.name != f"{target.name}.{identity}.part" or not _IDENTITY.fullmatch(identity):
            continue
        if other != keep:
            with suppress(OSError), other.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                other.unlink()


@contextmanager
def _locked_part(source: Source, target: Path, stop: Stop) -> Iterator[_Part]:
    """Yields the part file, ours alone; it is deleted afterwards if nothing is in it."""
    path = part_path(source, target)
    file = _open_locked(path, stop)
    try:
        size = os.fstat(file.fileno()).st_size
        if not _can_resume(source) or (source.size_bytes is not None and size > source.size_bytes):
            file.truncate(0)
            size = 0
        validator = "" if source.fixed else source.etag
        yield _Part(path, file, size, source.size_bytes, validator, hashlib.sha256())
    finally:
        with suppress(OSError):
            if _is_at(file, path) and not os.fstat(file.fileno()).st_size:
                path.unlink()
        file.close()


def _open_locked(path: Path, stop: Stop) -> BinaryIO:
    while True:
        stop.check()
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                file.close()
                stop.wait(_LOCK_POLL_S)
                continue
            # Some network file systems know no locks. Two writers then write the same bytes to
            # the same places, as parts are named by their content: wasteful, but not wrong.
        if _is_at(file, path):
            return file
        file.close()  # renamed or deleted by the process that held the lock


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Returns whether the opened file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _take_up(part: _Part, stop: Stop, gained: Callable[[int], None]) -> bool:
    """Reads what an earlier run left; returns whether there was any."""

    def after(num_bytes: int) -> None:
        stop.check()
        gained(num_bytes)

    update_digest(part.digest, part.file, after)
    return part.size > 0


def _complete(
    part: _Part,
    source: Source,
    *,
    transfer: Transfer,
    stop: Stop,
    gained: Callable[[int], None],
) -> None:
    """Fetches what is missing, connecting again as often as `transfer` allows."""
    failures, best = 0, part.size
    while part.expected is None or part.size < part.expected:
        stop.check()
        try:
            _attempt(part, source, transfer=transfer, stop=stop, gained=gained)
            return
        except Broken as error:
            if part.size - best >= _FRESH_BYTES:
                failures, best = 0, part.size
            if failures == len(transfer.backoff_s):
                raise WeightsError(
                    f"{error}, after {failures + 1} attempts and {part.size} of "
                    f"{part.expected or 'unknown'} bytes from {without_query(source.url)}. "
                    "Pull again to go on from there."
                ) from error
            stop.wait(max(transfer.backoff_s[failures], error.retry_after_s))
            failures += 1


def _attempt(
    part: _Part,
    source: Source,
    *,
    transfer: Transfer,
    stop: Stop,
    gained: Callable[[int], None],
) -> None:
    """Makes one request for the rest and writes what it brings.

    Raises:
        Broken: not everything arrived.
    """
    with closing(_request(part, source, transfer=transfer, stop=stop, gained=gained)) as answer:
        if answer.status == 206:
            _check_range(part, answer, gained)
        else:
            _restart(part, gained)
            _learn(part, source, answer)
        part.file.seek(part.size)
        rest = None if part.expected is None else part.expected - part.size
        for block in read_blocks(answer, rest, transfer=transfer, stop=stop):
            transfer.write(part.file, block)
            part.digest.update(block)
            part.size += len(block)
            gained(len(block))
    if part.expected is not None and part.size < part.expected:
        raise Broken("the connection ended early")


def _request(
    part: _Part,
    source: Source,
    *,
    transfer: Transfer,
    stop: Stop,
    gained: Callable[[int], None],
) -> HTTPResponse:
    headers = {**source.headers, "Accept-Encoding": "identity"}
    resuming = part.size > 0 and (_can_resume(source) or bool(part.validator))
    if resuming:
        headers["Range"] = f"bytes={part.size}-"
        if part.validator:
            headers["If-Range"] = part.validator
    try:
        return open_url(source.url, headers, transfer=transfer, stop=stop)
    except Status as error:
        if error.code == 416 and resuming:
            _restart(part, gained)
            raise Broken("the published file is shorter than what has arrived") from error
        raise WeightsError(f"{without_query(source.url)}: {status_reason(error.code)}") from error


def _check_range(part: _Part, answer: HTTPResponse, gained: Callable[[int], None]) -> None:
    """Raises Broken, and starts anew, unless a piece goes on where the part ends."""
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    total = int(found[2]) if found else None
    if not part.size or not found or int(found[1]) != part.size:
        _restart(part, gained)
        raise Broken("the server sent another piece of the file than was asked for")
    if part.expected is not None and total != part.expected:
        _restart(part, gained)
        raise Broken(f"the published file has {total} bytes, {part.expected} are expected")
    part.expected = total


def _restart(part: _Part, gained: Callable[[int], None]) -> None:
    part.file.truncate(0)
    gained(-part.size)
    part.size = 0
    part.digest = hashlib.sha256()


def _learn(part: _Part, source: Source, answer: HTTPResponse) -> None:
    """Learns size and version from an answer that brings the file from its start.

    Raises:
        Broken: the same version is offered with another size.
        WeightsError: it is sent in a coding that was not asked for.
    """
    coding = answer.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise WeightsError(
            f"{without_query(source.url)}: the server packs it as {coding}; fetch it by hand"
        )
    length = answer.headers.get("Content-Length", "")
    offered = int(length) if length.isdigit() else None
    validator = "" if source.fixed else validator_of(answer.headers)
    if part.validator and validator != part.validator:
        part.expected = offered  # published anew since we asked
    elif part.expected is None:
        part.expected = offered
    elif offered not in (None, part.expected):
        raise Broken(f"the server offers {offered} bytes, {part.expected} are expected")
    part.validator = validator


def _verify(part: _Part, source: Source, check: Callable[[Path], None]) -> None:
    """Raises WeightsError, and deletes the part, if the whole file is not what it should be."""
    try:
        found = part.digest.hexdigest()
        if source.sha256 and found != source.sha256:
            raise WeightsError(
                f"what {without_query(source.url)} sends has the sha256 {found}, expected is "
                f"{source.sha256}. It was deleted. Pull again; if that does not help, the "
                "published file is not the one that is listed."
            )
        check(part.path)
    except WeightsError:
        part.path.unlink()
        raise
