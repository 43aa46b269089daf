"""Hands finished videos over: to the bucket, inside the answer, onto the volume, or by PUT.

A video has cost minutes of a GPU, so one way that fails is followed by the next one, and each
step down is told in a warning. Only when all have failed does this raise, and even then the video
is kept. The order of the ways is the one decision of this module: see `_ORDER`.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xicon_infer.errors import InvalidRequest, MediaError
from xicon_infer.media import deliver_inline as inline
from xicon_infer.media.deliver_bucket import BucketConfig
from xicon_infer.media.deliver_put import FIELD as UPLOAD_FIELD
from xicon_infer.media.deliver_put import Put, PutFailed, plain_url, putter
from xicon_infer.media.deliver_s3 import RETRY_WAITS_S, Upload, check_bucket, join_key, upload
from xicon_infer.media.deliver_types import (
    Delivered,
    DeliveryError,
    DeliveryPlan,
    OutputFile,
    entry,
    file_name,
    job_folder,
    stopper,
    warning,
)
from xicon_infer.media.deliver_volume import store, told_path
from xicon_infer.types import Progress, SilentProgress

__all__ = [
    "BucketConfig",
    "Delivered",
    "DeliveryError",
    "DeliveryPlan",
    "OutputFile",
    "check_bucket",
    "deliver",
]

logger = logging.getLogger(__name__)

_ORDER = {
    "auto": ("put", "bucket", "answer", "volume", "smaller"),
    "s3": ("put", "bucket", "answer", "volume", "smaller"),
    "base64": ("put", "answer", "volume", "smaller", "bucket"),
    "volume": ("put", "volume", "bucket", "answer", "smaller"),
}
_ENTRY_BYTES = 4096
"""Of the answer, left for each file still to come: its entry with a signed link, its warnings."""
_MAX_KEPT = 10
"""Results that could not be delivered, kept on the worker; then the oldest one goes."""


@dataclass
class _Job:
    """One delivery under way: what it was given, and what it has to say so far."""

    plan: DeliveryPlan
    answer_overhead: Callable[[list[dict[str, Any]]], int]
    progress: Progress
    stop: Callable[[], None]
    sleep: Callable[[float], None]
    put: Put
    videos: list[dict[str, Any]] = field(default_factory=list)
    inline_bytes: int = 0
    reserved_bytes: int = 0
    warnings: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def step(self, done: int, total: int) -> None:
        """Reports bytes sent."""
        self.progress.step(done, total, "byte")

    def warn(self, code: str, message: str, at: str = "output") -> None:
        """Adds a warning to the answer and to the log."""
        logger.warning("%s: %s", code, message)
        self.warnings.append(warning(code, message, at))


def deliver(
    files: Iterable[OutputFile],
    plan: DeliveryPlan,
    *,
    answer_overhead: Callable[[list[dict[str, Any]]], int],
    progress: Progress | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
    put: Put | None = None,
) -> Delivered:
    """Hands over the files of a job and returns what the answer says about them.

    Args:
        files: the result, and perhaps a pose video, for which nothing fails: if it cannot be
            delivered, `errors` says so.
        plan: where they may go.
        answer_overhead: returns the bytes of the JSON of the whole answer, given its `videos`.
            They come without inline data, whose bytes are added here, as are those of the
            warnings and errors that this returns.
        progress: told how many bytes of an upload are sent.
        cancelled: asked often; True ends the delivery.
        sleep: waits so many seconds between tries.
        put: sends a file to `upload_url`; None for https to public hosts only.

    Returns:
        The entries, the result first, and what went otherwise than wanted.

    Raises:
        DeliveryError: UPLOAD_FAILED or OUTPUT_TOO_LARGE: no way was left for the result.
        Cancelled: nothing unfinished is left anywhere.
    """
    job = _Job(
        plan=plan,
        answer_overhead=answer_overhead,
        progress=progress or SilentProgress(),
        stop=stopper(cancelled),
        sleep=sleep,
        put=put or putter(),
    )
    waiting = sorted(files, key=lambda file: file.role != "result")
    while waiting:
        file = waiting.pop(0)
        job.reserved_bytes = len(waiting) * _ENTRY_BYTES
        _deliver_or_tell(job, file)
    return Delivered(job.videos, job.warnings, job.errors)


def _deliver_or_tell(job: _Job, file: OutputFile) -> None:
    """Delivers a file; what goes wrong with any but the result is only told."""
    try:
        job.videos.append(_deliver_one(job, file))
    except DeliveryError as error:
        if file.role == "result":
            raise
        job.errors.append(f"the {file.role} video could not be delivered: {error.message}")


def _deliver_one(job: _Job, file: OutputFile) -> dict[str, Any]:
    """Returns the entry of a file, delivered by the first way that works."""
    ways: dict[str, Callable[[_Job, OutputFile, dict[str, Any]], dict[str, Any] | None]] = {
        "put": _by_put,
        "bucket": _to_bucket,
        "answer": _into_answer,
        "volume": _to_volume,
        "smaller": _smaller,
    }
    found = entry(file, file_name(job.plan, file), job.stop)
    before = len(job.warnings)
    for way in _ORDER[job.plan.want]:
        job.stop()
        if done := ways[way](job, file, found):
            return done
    raise _nothing_left(job, file, found, job.warnings[before:])


def _by_put(job: _Job, file: OutputFile, found: dict[str, Any]) -> dict[str, Any] | None:
    """Sends the result to the client's address; it takes one file only."""
    url = job.plan.upload_url
    if not url or file.role != "result":
        return None
    fault = _put_once(job, url, file)
    for wait_s in RETRY_WAITS_S:
        if isinstance(fault, PutFailed) and fault.again:
            job.sleep(wait_s)
            job.stop()
            fault = _put_once(job, url, file)
    if fault:
        job.warn("S3_UPLOAD_FAILED", fault.message, UPLOAD_FIELD)
        return None
    return {**found, "type": "s3_url", "data": plain_url(url)}


def _put_once(job: _Job, url: str, file: OutputFile) -> PutFailed | InvalidRequest | None:
    try:
        job.put(url, file.path, mime=file.mime, stop=job.stop)
    except (PutFailed, InvalidRequest) as error:
        return error
    return None


def _to_bucket(job: _Job, file: OutputFile, found: dict[str, Any]) -> dict[str, Any] | None:
    plan = job.plan
    if plan.bucket is None:
        if plan.want == "s3":
            job.warn("S3_UPLOAD_FAILED", "no bucket is configured on this worker", "output.return")
        return None
    key = join_key(plan.bucket.prefix, job_folder(plan.job_id), found["filename"])
    source = Upload(file.path, key, file.mime, found["size_bytes"], found["sha256"])
    try:
        link = upload(
            plan.bucket,
            source,
            expires_s=plan.url_expires_s,
            step=job.step,
            stop=job.stop,
            sleep=job.sleep,
        )
    except MediaError as error:
        job.warn("S3_UPLOAD_FAILED", error.message)
        return None
    expires = {"expires_at": link.expires_at} if link.expires_at else {}
    return {**found, "type": "s3_url", "data": link.url, **expires}


def _into_answer(job: _Job, file: OutputFile, found: dict[str, Any]) -> dict[str, Any] | None:
    size = _answer_bytes(job, found)
    if size > job.plan.inline_limit:
        if job.plan.want == "base64":
            what = f"the answer would have {size} bytes, the limit is {job.plan.inline_limit}"
            job.warn("INLINE_TOO_LARGE", what, "output.return")
        return None
    job.inline_bytes += inline.base64_bytes(found["size_bytes"])
    return {**found, "type": "base64", "data": inline.read_base64(file.path)}


def _answer_bytes(job: _Job, found: dict[str, Any]) -> int:
    """Returns the bytes of the whole answer with one more video inside it."""
    bare = [{**video, "data": ""} if video["type"] == "base64" else video for video in job.videos]
    said = inline.json_bytes([job.warnings, job.errors])
    rest = job.answer_overhead([*bare, {**found, "type": "base64"}])
    inside = job.inline_bytes + inline.base64_bytes(found["size_bytes"])
    return rest + said + inside + job.reserved_bytes


def _to_volume(job: _Job, file: OutputFile, found: dict[str, Any]) -> dict[str, Any] | None:
    folder = job.plan.volume
    if folder is None:
        if job.plan.want == "volume":
            job.warn("VOLUME_FAILED", "there is no network volume on this worker", "output.return")
        return None
    target = folder / job_folder(job.plan.job_id) / found["filename"]
    try:
        store(file.path, target, stop=job.stop)
    except MediaError as error:
        job.warn("VOLUME_FAILED", f"the network volume cannot be written to ({error.code})")
        return None
    root = job.plan.volume_root
    inside = root if root is not None and target.is_relative_to(root) else folder
    return {**found, "type": "path", "data": told_path(target, inside)}


def _smaller(job: _Job, file: OutputFile, found: dict[str, Any]) -> dict[str, Any] | None:
    """Puts the video into the answer after all, at the best quality that fits."""
    if job.plan.oversize != "reencode" or file.mime != "video/mp4":
        return None
    if _answer_bytes(job, {**found, "size_bytes": 0}) > job.plan.inline_limit:
        return None  # nothing is small enough
    try:
        with tempfile.TemporaryDirectory(dir=file.path.parent) as folder:
            return _smallest_that_fits(job, file, found, Path(folder))
    except (MediaError, OSError) as error:
        logger.warning("the video could not be encoded again: %s", type(error).__name__)
        return None


def _smallest_that_fits(
    job: _Job, file: OutputFile, found: dict[str, Any], folder: Path
) -> dict[str, Any] | None:
    for crf in inline.REENCODE_CRFS:
        smaller = replace(file, path=folder / f"crf{crf}.mp4")
        inline.reencode(file, smaller.path, crf=crf, stop=job.stop)
        again = entry(smaller, found["filename"], job.stop)
        said = warning(
            "OUTPUT_REENCODED",
            f"the video was encoded again at CRF {crf} to fit into the answer; "
            "configure a bucket to get the original",
            "output.oversize",
        )
        job.warnings.append(said)
        if _answer_bytes(job, again) <= job.plan.inline_limit:
            return _into_answer(job, smaller, again)
        job.warnings.remove(said)
    return None


def _nothing_left(
    job: _Job, file: OutputFile, found: dict[str, Any], warnings: list[dict[str, Any]]
) -> DeliveryError:
    """Returns the error for a video that no way is left for, after keeping it."""
    uploads = [said for said in warnings if said["code"] == "S3_UPLOAD_FAILED"]
    advice = "configure a bucket (BUCKET_ENDPOINT_URL) or a network volume"
    hint = f"{advice}, or ask for fewer frames or a smaller picture"
    if file.role == "result" and _keep(job, file, found["filename"]):
        hint = f"the video is kept on the worker as {found['filename']!r} while it lives; {hint}"
    if uploads:
        message, code = f"{uploads[-1]['message']}, and no other way was left", "UPLOAD_FAILED"
    else:
        size, limit = found["size_bytes"] / 1e6, job.plan.inline_limit / 1e6
        message = f"the video of {size:.1f} MB does not fit into an answer of {limit:.1f} MB"
        code = "OUTPUT_TOO_LARGE"
    return DeliveryError(message, code=code, hint=hint, warnings=warnings)


def _keep(job: _Job, file: OutputFile, name: str) -> bool:
    """Copies a file to where it outlives the job, in place of the oldest one if there are many."""
    if job.plan.keep is None:
        return False
    folder = job.plan.keep / job_folder(job.plan.job_id)
    try:
        job.plan.keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        store(file.path, folder / name, stop=job.stop)
        _forget_oldest(job.plan.keep)
    except (MediaError, OSError) as error:
        logger.warning("the video could not be kept: %s", type(error).__name__)
        return False
    return True


def _forget_oldest(folder: Path) -> None:
    kept = sorted(folder.glob("*/*"), key=lambda path: path.stat().st_mtime)
    for path in kept[:-_MAX_KEPT]:
        path.unlink()
        with contextlib.suppress(OSError):  # holds another file of its job
            path.parent.rmdir()
