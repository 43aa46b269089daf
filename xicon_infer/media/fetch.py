"""Media in: a URL, base64 text or a path becomes a checked file in the folder of a job.

Nothing that is sent is believed: not the address, its name, its length, its type, nor that it
ends. Messages name the request field, never an address, a path or a query.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from xicon_infer.media.fetch_base64 import decode_base64
from xicon_infer.media.fetch_content import SUFFIXES, check_content, kind_of
from xicon_infer.media.fetch_http import download
from xicon_infer.media.fetch_network import REAL, Network
from xicon_infer.media.fetch_path import copy_path
from xicon_infer.media.fetch_sink import Intake, Tally, open_sink
from xicon_infer.media.fetch_types import Fetched, FetchLimits, MediaSource, Role, Wanted
from xicon_infer.types import Progress

_POLL_S = 0.1
_STOP_S = 0.8
"""How long stopped threads are waited for; one that still waits for a name ends by itself."""
_WORDS = ("image", "end_image", "video", "pose_video", "negative_pose")
"""What files may be called; a field of another name gives that of its role."""


def fetch(
    source: MediaSource,
    role: Role,
    field: str,
    folder: Path,
    limits: FetchLimits,
    *,
    progress: Progress,
    network: Network = REAL,
) -> Fetched:
    """Returns one file, fetched and looked into; see `fetch_all`."""
    wanted = [Wanted(source, role, field)]
    return fetch_all(wanted, folder, limits, progress=progress, network=network)[0]


def fetch_all(
    wanted: Sequence[Wanted],
    folder: Path,
    limits: FetchLimits,
    *,
    progress: Progress,
    network: Network = REAL,
) -> list[Fetched]:
    """Returns several files, fetched at the same time; the first failure ends the others.

    Args:
        wanted: the files.
        folder: where to put them, as `fetch_folder.job_folder` makes it. Names in it are fixed
            words with the suffix of what was found, for example image.png.
        limits: what may be fetched, and what it may cost.
        progress: told the kilobytes of all files; stops the fetch at once by raising. Called
            from the calling thread only.
        network: the outside world.

    Returns:
        The files in the order of `wanted`.

    Raises:
        InvalidRequest: URL_INVALID, URL_SCHEME, URL_BLOCKED or PATH_NOT_ALLOWED.
        MediaError: FETCH_FAILED, FETCH_TIMEOUT, INVALID_BASE64, MEDIA_NOT_FOUND,
            MEDIA_TOO_LARGE, VIDEO_TOO_LONG, UNSUPPORTED_MEDIA, MEDIA_CORRUPT, DISK_FULL or
            MEDIA_WRITE.
        Cancelled: raised by `progress`.
    """
    tally = Tally(folder, limits, network)
    stop = threading.Event()
    answers: queue.SimpleQueue[tuple[int, Fetched | BaseException]] = queue.SimpleQueue()
    words = _words(wanted)

    def work(number: int, one: Wanted) -> None:
        deadline = network.now() + limits.total_s(one.role)
        intake = Intake(one.field, one.role, limits, network, stop, tally, deadline)
        try:
            answers.put((number, _fetch_one(one.source, folder / words[number], intake)))
        except BaseException as error:  # noqa: BLE001  raised again in the calling thread
            answers.put((number, error))

    threads = [
        threading.Thread(target=work, args=(number, one), name=f"fetch-{number}", daemon=True)
        for number, one in enumerate(wanted)
    ]
    try:
        for thread in threads:
            thread.start()
        done = _collect(answers, len(threads), tally, progress)
    except BaseException:
        stop.set()
        deadline = network.now() + _STOP_S
        for thread in threads:
            thread.join(max(0.0, deadline - network.now()))
        raise
    return [done[number] for number in range(len(threads))]


def _collect(
    answers: queue.SimpleQueue[tuple[int, Fetched | BaseException]],
    count: int,
    tally: Tally,
    progress: Progress,
) -> dict[int, Fetched]:
    """Returns the files by number, or raises the first error that a thread met."""
    done: dict[int, Fetched] = {}
    while len(done) < count:
        kilobytes = tally.done // 1000
        progress.step(kilobytes, max(kilobytes, -(-tally.announced // 1000)), "kB")
        with suppress(queue.Empty):
            number, answer = answers.get(timeout=_POLL_S)
            if isinstance(answer, BaseException):
                raise answer
            done[number] = answer
    return done


def _words(wanted: Sequence[Wanted]) -> list[str]:
    """Returns what each file is called, without its suffix; no two alike."""
    words: list[str] = []
    for one in wanted:
        word = one.field if one.field in _WORDS else one.role
        words.append(f"{word}{len(words)}" if word in words else word)
    return words


def _fetch_one(source: MediaSource, name: Path, intake: Intake) -> Fetched:
    """Returns one file, called `name` with the suffix of its kind."""
    started = intake.network.now()
    tries = 1
    with open_sink(name.parent, intake) as sink:
        if source.kind == "url":
            tries = download(source.value, sink, intake)
        elif source.kind == "base64":
            decode_base64(source.value, sink, intake)
        else:
            copy_path(source.value, sink, intake)
        kind = kind_of(sink.path, name.name, source.kind, intake)
        path = name.with_suffix(SUFFIXES[kind])
        sink.path.rename(path)
        try:
            check_content(path, kind, intake)
        except BaseException:
            path.unlink()
            raise
    seconds = intake.network.now() - started
    return Fetched(path, sink.size, kind, sink.sha256, seconds, tries)
