"""Fetching of model files into one folder, several at once, each whole or not there.

huggingface_hub says what is published and with which token; the bytes are fetched by
`download_url`. Differs from hf_hub_download, which since version 2 deletes what an interrupted
run left and so cannot resume. A file goes where ComfyUI keeps it (`FileEntry.target`), one of the
places where `locate` looks. Progress is told, and the pull stopped, from the thread that called.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xicon_infer.errors import InvalidRequest, WeightsError
from xicon_infer.types import Progress
from xicon_infer.weights.download_http import Stop, Transfer
from xicon_infer.weights.download_threads import run_together
from xicon_infer.weights.download_url import (
    Source,
    State,
    disk_error,
    fetch,
    kept_bytes,
    update_digest,
)
from xicon_infer.weights.header import check_header
from xicon_infer.weights.hub import RemoteFile, is_offline, remote_file
from xicon_infer.weights.manifest import FileEntry
from xicon_infer.weights.places import copies

MAX_JOBS = 32
_MB = 1_000_000


@dataclass(frozen=True)
class Pulled:
    """A file that is there.

    state: "present" if it was before, "resumed" if an earlier run had fetched a part of it.
    seconds: spent on it.
    """

    entry: FileEntry
    path: Path
    size_bytes: int
    seconds: float
    state: State


@dataclass(frozen=True)
class _Wanted:
    """A file to fetch: what the manifest says, what is published, and where it goes."""

    entry: FileEntry
    source: Source
    target: Path


class _Tally:
    """Bytes that are there, counted by every thread and told by one."""

    def __init__(self, total: int) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._total = total

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes

    def tell(self, progress: Progress) -> None:
        done = self._done // _MB
        progress.step(done, max(done, -(-self._total // _MB)), "MB")


def pull(
    entries: Sequence[FileEntry],
    folder: Path,
    *,
    progress: Progress,
    jobs: int = 4,
    offline: bool = False,
    verify: bool = True,
    recheck: bool = False,
    transfer: Transfer | None = None,
) -> list[Pulled]:
    """Makes files present in a folder and returns where they are, in the order of `entries`.

    A file that fails does not stop the others. Interrupted, it keeps what has arrived, and the
    next call goes on from there. Two processes may pull into one folder.

    Args:
        entries: the files; one that is named twice is fetched once.
        folder: where to put them; made if it is not there.
        progress: told the megabytes of all files together; stops the pull by raising.
        jobs: files fetched at the same time, 1 to 32.
        offline: True fetches nothing and fails if something is missing; HF_HUB_OFFLINE does too.
        verify: False leaves out the comparison of sha256 after fetching.
        recheck: True also hashes the files that are present, where a hash is listed, and fetches
            them again if it differs. Their size is always compared.
        transfer: time limits, attempts and the hub's address; the defaults if None.

    Raises:
        InvalidRequest: `jobs` is out of range.
        WeightsError: names every file that is not there now, why, and what to do; or, before
            anything is fetched, that the disk is too small.
        Cancelled: raised by `progress`.
    """
    if not 1 <= jobs <= MAX_JOBS:
        raise InvalidRequest(f"'jobs': got {jobs}, allowed is 1 to {MAX_JOBS}", field="jobs")
    entries = list({target_path(entry, folder): entry for entry in entries}.values())
    transfer = transfer or Transfer()
    with progress.stage("download"):
        present = _find_present(entries, folder, recheck=recheck, progress=progress)
        missing = [entry for entry in entries if entry.id not in present]
        if not missing:
            return [present[entry.id] for entry in entries]
        if offline or is_offline():
            raise _offline_error(missing, folder)
        return _pull_missing(
            entries,
            present,
            folder,
            progress=progress,
            jobs=jobs,
            verify=verify,
            transfer=transfer,
        )


def target_path(entry: FileEntry, folder: Path) -> Path:
    """Returns where a file is put."""
    return folder / entry.target


def file_sha256(path: Path, after: Callable[[int], None] | None = None) -> str:
    """Returns the sha256 of a file, as 64 hexadecimal digits.

    Args:
        path: the file.
        after: told the bytes of each block that was read; what it raises ends the reading.

    Raises:
        WeightsError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            update_digest(digest, file, after or (lambda _: None))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _find_present(
    entries: Sequence[FileEntry], folder: Path, *, recheck: bool, progress: Progress
) -> dict[str, Pulled]:
    """Returns what need not be fetched, by id."""
    present: dict[str, Pulled] = {}
    for entry in entries:
        start = time.perf_counter()
        path = _right_copy(entry, folder, recheck=recheck, progress=progress)
        if path is not None:
            seconds = time.perf_counter() - start
            present[entry.id] = Pulled(entry, path, path.stat().st_size, seconds, "present")
    return present


def _right_copy(
    entry: FileEntry, folder: Path, *, recheck: bool, progress: Progress
) -> Path | None:
    """Returns the first copy in a folder that is what the manifest lists, or None."""
    for found in copies([entry], [folder]):
        listed = found.published
        size = found.path.stat().st_size
        if listed.size_bytes not in (None, size):
            progress.warn(
                f"{found.path} has {size} bytes, {listed.size_bytes} are listed: not counted as "
                "present; delete it if it stays"
            )
        elif recheck and listed.sha256 and _hash(found.path, progress) != listed.sha256:
            progress.warn(
                f"{found.path} has another sha256 than is listed: not counted as present; delete "
                "it if it stays"
            )
        else:
            return found.path
    return None


def _hash(path: Path, progress: Progress) -> str:
    """Returns the sha256 of a file, telling how far it is."""
    tally = _Tally(path.stat().st_size)

    def after(num_bytes: int) -> None:
        tally.add(num_bytes)
        tally.tell(progress)

    return file_sha256(path, after)


def _offline_error(missing: Sequence[FileEntry], folder: Path) -> WeightsError:
    names = ", ".join(f"{entry.id} ({entry.address})" for entry in missing)
    return WeightsError(
        f"offline: {len(missing)} files are not in {folder}: {names}. Copy them there, or pull "
        "without 'offline' and HF_HUB_OFFLINE."
    )


def _pull_missing(
    entries: Sequence[FileEntry],
    present: dict[str, Pulled],
    folder: Path,
    *,
    progress: Progress,
    jobs: int,
    verify: bool,
    transfer: Transfer,
) -> list[Pulled]:
    missing = [entry for entry in entries if entry.id not in present]
    stop = Stop()
    asked = run_together(
        [_asking(entry, transfer, stop) for entry in missing],
        jobs=jobs,
        stop=stop,
        tick=lambda: progress.step(0, 1, "MB"),
    )
    failures: dict[str, WeightsError] = {}
    wanted: list[_Wanted] = []
    for entry, remote in zip(missing, asked, strict=True):
        outcome = (
            remote
            if isinstance(remote, WeightsError)
            else _want(entry, remote, folder, verify=verify)
        )
        if isinstance(outcome, WeightsError):
            failures[entry.id] = outcome
        else:
            wanted.append(outcome)
    _warn_unknown(wanted, progress)
    _check_space(wanted, folder, transfer)
    tally = _Tally(sum(item.source.size_bytes or 0 for item in wanted))
    fetched = run_together(
        [_fetching(item, tally, verify=verify, transfer=transfer, stop=stop) for item in wanted],
        jobs=jobs,
        stop=stop,
        tick=lambda: tally.tell(progress),
    )
    tally.tell(progress)
    there = dict(present)
    for item, result in zip(wanted, fetched, strict=True):
        if isinstance(result, WeightsError):
            failures[item.entry.id] = result
        else:
            there[item.entry.id] = result
    if failures:
        raise _summary(failures, len(entries))
    return [there[entry.id] for entry in entries]


def _asking(entry: FileEntry, transfer: Transfer, stop: Stop) -> Callable[[], RemoteFile]:
    return lambda: remote_file(entry, transfer=transfer, stop=stop)


def _want(
    entry: FileEntry, remote: RemoteFile, folder: Path, *, verify: bool
) -> _Wanted | WeightsError:
    """Returns what to fetch, or why what is published cannot be the file that is listed."""
    sha256 = entry.sha256 if verify else None
    for what, listed, published in (
        ("size", entry.size_bytes, remote.size_bytes),
        ("sha256", sha256, remote.sha256),
    ):
        if listed is not None and published is not None and listed != published:
            return WeightsError(
                f"published is a file with the {what} {published}, listed is {listed}. Nothing was "
                "fetched. Lock the weights again if you trust the new file.",
                code="MODEL_MISMATCH",
            )
    source = Source(
        url=remote.url,
        headers=remote.headers,
        size_bytes=entry.size_bytes or remote.size_bytes,
        sha256=(sha256 or remote.sha256) if verify else None,
        etag=remote.etag,
        fixed=remote.revision is not None,
    )
    return _Wanted(entry, source, target_path(entry, folder))


def _warn_unknown(wanted: Iterable[_Wanted], progress: Progress) -> None:
    unknown = [item.entry.id for item in wanted if not item.source.sha256]
    if unknown:
        progress.warn(
            f"the sha256 of {', '.join(unknown)} is not compared: only size and header are checked"
        )


def _check_space(wanted: Iterable[_Wanted], folder: Path, transfer: Transfer) -> None:
    need = sum(
        max(0, (item.source.size_bytes or 0) - kept_bytes(item.source, item.target))
        for item in wanted
    )
    try:
        free = transfer.free_bytes(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    if need > free:
        raise WeightsError(
            f"{folder}: {_amount(need)} are needed, {_amount(free)} are free. Nothing was fetched. "
            "Free some space, or pull into a folder on another disk.",
            code="DISK_FULL",
        )


def _fetching(
    item: _Wanted, tally: _Tally, *, verify: bool, transfer: Transfer, stop: Stop
) -> Callable[[], Pulled]:
    entry, target, source = item.entry, item.target, item.source
    before = _stamp(target)

    def arrived() -> bool:
        return _stamp(target) not in (None, before)

    def check(path: Path) -> None:
        size = path.stat().st_size
        if entry.size_bytes not in (None, size):
            raise WeightsError(
                f"what arrived has {size} bytes, {entry.size_bytes} are listed. It was deleted. "
                "Pull again; if that does not help, look for a newer list of weights.",
                code="MODEL_MISMATCH",
            )
        if entry.sha256 is None or not verify:
            check_header(path, target.name)

    def work() -> Pulled:
        start = time.perf_counter()
        state = fetch(
            source,
            target,
            transfer=transfer,
            stop=stop,
            arrived=arrived,
            check=check,
            gained=tally.add,
        )
        seconds = time.perf_counter() - start
        return Pulled(entry, target, target.stat().st_size, seconds, state)

    return work


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Returns what changes when somebody else puts another file there, or None if none is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _amount(num_bytes: int) -> str:
    if num_bytes < 1_000 * _MB:
        return f"{num_bytes / _MB:.1f} MB"
    return f"{num_bytes / _MB / 1_000:.2f} GB"


def _summary(failures: dict[str, WeightsError], total: int) -> WeightsError:
    """Returns one error for all files that failed, its code theirs if they agree."""
    codes = {error.code for error in failures.values()}
    lines = [
        f"  {name}: {error.message.removeprefix(f'{name}: ')}" for name, error in failures.items()
    ]
    return WeightsError(
        "\n".join([f"{len(failures)} of {total} files are not there:", *lines]),
        code=codes.pop() if len(codes) == 1 else None,
    )
