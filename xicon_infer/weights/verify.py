"""Whether files are what the manifest says: size, SHA-256, and a header that makes sense.

Hashes are computed by several threads at once, which share one progress count; a file whose size
is wrong already is not read. A file without a pinned hash cannot be proven right: it is "unpinned",
not "ok". The header is read in any case, because a web page saved under the name of a model has
some size and some hash as well.
"""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from xicon_infer.errors import Cancelled, WeightsError
from xicon_infer.types import Progress
from xicon_infer.weights.download import file_sha256
from xicon_infer.weights.header import check_header
from xicon_infer.weights.manifest import FileEntry
from xicon_infer.weights.places import Found

State = Literal["ok", "unpinned", "fault"]
"""ok: size and hash are those pinned (with `quick`: the size). unpinned: nothing pinned to compare
with, the header is sound. fault: something is wrong."""

_MEGA = 10**6
_POLL_S = 0.2


@dataclass(frozen=True)
class Verdict:
    """What is known of one file.

    id: of the entry whose file it is. text: what is wrong, or what was compared. sha256: computed,
    "" if it was not.
    """

    id: str
    path: Path
    state: State
    text: str
    size_bytes: int
    sha256: str = ""


def verify_files(
    found: Sequence[Found], *, quick: bool, progress: Progress, jobs: int = 4
) -> list[Verdict]:
    """Returns a verdict on each file, in the given order.

    Args:
        found: the files, from `xicon_infer.weights.places`.
        quick: compare no hashes.
        progress: told how many megabytes have been read; may raise `Cancelled`.
        jobs: files that are hashed at the same time.

    Raises:
        Cancelled: `progress` asked to stop.
    """
    verdicts = [check_file(item.published, item.path) for item in found]
    if quick:
        return verdicts
    for number, item in enumerate(found):
        if verdicts[number].state == "ok" and item.published.sha256 is None:
            verdicts[number] = replace(
                verdicts[number], state="unpinned", text="size and header; no sha256 is pinned"
            )
    hashed = {
        number: item
        for number, item in enumerate(found)
        if item.published.sha256 and verdicts[number].state != "fault"
    }
    digests = _hash_all([item.path for item in hashed.values()], progress=progress, jobs=jobs)
    for (number, item), digest in zip(hashed.items(), digests, strict=True):
        verdicts[number] = _compare(item.published, verdicts[number], digest)
    return verdicts


def check_file(entry: FileEntry, path: Path) -> Verdict:
    """Returns a verdict on size and header alone.

    Args:
        entry: whose file it is.
        path: the file.
    """
    size = 0
    try:
        size = path.stat().st_size
        _check_content(entry, path)
    except (WeightsError, OSError) as error:
        return Verdict(entry.id, path, "fault", _reason(error, path), size)
    verdict = Verdict(entry.id, path, "ok", "size and header", size)
    if entry.size_bytes is None:
        return replace(verdict, state="unpinned", text="header; no size is pinned")
    if size != entry.size_bytes:
        wrong = f"has {size} bytes instead of {entry.size_bytes}; fetch it again"
        return replace(verdict, state="fault", text=wrong)
    return verdict


def _compare(entry: FileEntry, verdict: Verdict, digest: str | WeightsError) -> Verdict:
    if isinstance(digest, WeightsError):
        return replace(verdict, state="fault", text=_reason(digest, verdict.path))
    if digest != entry.sha256:
        wrong = f"has sha256 {digest} instead of {entry.sha256}; fetch it again"
        return replace(verdict, state="fault", text=wrong, sha256=digest)
    return replace(verdict, state="ok", text="size, sha256 and header", sha256=digest)


def _hash_all(paths: Sequence[Path], *, progress: Progress, jobs: int) -> list[str | WeightsError]:
    """Returns the hash of each file, or why it cannot be read; tells progress from this thread."""
    counter = _Counter()
    total = sum(path.stat().st_size for path in paths) // _MEGA
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        tasks: list[Future[str | WeightsError]] = [pool.submit(_hash, p, counter) for p in paths]
        try:
            while wait(tasks, timeout=_POLL_S, return_when=FIRST_EXCEPTION).not_done:
                progress.step(min(counter.bytes // _MEGA, total), total, "megabytes")
        except BaseException:
            counter.stop.set()  # else the pool would wait for gigabytes
            raise
        if paths:
            progress.step(total, total, "megabytes")
    return [task.result() for task in tasks]


class _Counter:
    """Bytes that all threads have read, and the switch that ends them."""

    def __init__(self) -> None:
        self.bytes = 0
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        if self.stop.is_set():
            raise Cancelled("stopped while hashing")
        with self._lock:
            self.bytes += count


def _hash(path: Path, counter: _Counter) -> str | WeightsError:
    try:
        return file_sha256(path, counter.add)
    except WeightsError as error:
        return error


def _check_content(entry: FileEntry, path: Path) -> None:
    """Refuses a file that cannot be of its kind; reads a few bytes only.

    Raises:
        WeightsError: what it is instead.
    """
    check_header(path, PurePosixPath(entry.path).name)
    if entry.path.endswith(".index.json"):
        from xicon_infer.weights.checkpoint import open_checkpoint

        open_checkpoint(path)
    if path.suffix == ".torchscript":
        _check_torchscript(path)


def _check_torchscript(path: Path) -> None:
    """Reads the list of the archive; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise WeightsError(f"is no TorchScript archive, or not whole: {error}") from error
    if not any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError("is a zip file, but no TorchScript archive")


def _reason(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    return text.removeprefix(f"{path}:").strip() or type(error).__name__
