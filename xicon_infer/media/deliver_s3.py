"""A file into an S3-compatible bucket, whole or not at all, and a link to it.

An object appears only when its last byte is there: S3 promises that for a single PUT and for a
completed multipart upload. What this adds is that nothing is left behind when it does not come to
that. boto3's own transfer layer is not used: it cannot stop in the middle of a part, and hides
the id of an upload that it failed to end.

Source: aws: S3 API reference (multipart upload)
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from xicon_infer.errors import MediaError
from xicon_infer.media.deliver_bucket import MAX_EXPIRES_S, BucketConfig, public_url
from xicon_infer.media.deliver_client import describe, faults, open_client

logger = logging.getLogger(__name__)

RETRY_WAITS_S = (2.0, 6.0)
"""Before the second and the third try of a whole upload."""
_POLL_S = 0.1
"""How soon a cancelled job is noticed."""
_HEALTH_KEY = "_health/xicon-check"
"""Always the same, so that a bucket whose keys may not delete keeps one file, not one per start."""


@dataclass(frozen=True)
class Upload:
    """A file to upload: where it is, its key, MIME type, size in bytes and SHA-256 in hex."""

    path: Path
    key: str
    mime: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Link:
    """Where an uploaded file can be fetched; expires_at in UTC, None if the link stays valid."""

    url: str
    expires_at: str | None


class _Stopped(BaseException):
    """The upload is to end.

    Not an Exception, because botocore would take one for a fault of the network and try again.
    """


class _Slice:
    """A part of an open file as a file; reading it raises `_Stopped` once `ended` is set."""

    def __init__(self, file: BinaryIO, start: int, length: int, ended: threading.Event) -> None:
        self._file, self._start, self._length, self._ended = file, start, length, ended
        self.seek(0)

    def __len__(self) -> int:
        return self._length

    def tell(self) -> int:
        """Returns the place within the part."""
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place within the part and returns it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        self._file.seek(self._start + base + offset)
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        """Returns so many bytes of the part, or what is left of it."""
        if self._ended.is_set():
            raise _Stopped
        left = max(0, self._length - self.tell())
        return self._file.read(left if size is None or size < 0 else min(size, left))


def upload(
    config: BucketConfig,
    source: Upload,
    *,
    expires_s: int | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], None] = lambda: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Link:
    """Puts a file into the bucket and returns a link to it.

    Args:
        config: the bucket.
        source: the file.
        expires_s: how long the link lives, 60 to 604800 seconds; None for the bucket's setting.
        step: told (bytes sent, bytes) after each part; may raise to end the upload.
        stop: asked ten times a second; raises to end the upload.
        sleep: waits so many seconds.

    Returns:
        The link. The object is complete.

    Raises:
        MediaError: UPLOAD_FAILED, after three tries. Nothing is left in the bucket, as far as it
            can still be reached.
        Cancelled: `stop` or `step` raised it; nothing is left in the bucket.
    """
    try:
        with open_client(config) as client:
            for number, wait_s in enumerate(RETRY_WAITS_S, start=1):
                stop()
                try:
                    _send(client, config, source, step=step, stop=stop)
                    return _link(client, config, source.key, expires_s)
                except faults() as error:
                    logger.warning("upload: try %d failed: %s", number, describe(error))
                sleep(wait_s)
            stop()
            _send(client, config, source, step=step, stop=stop)
            return _link(client, config, source.key, expires_s)
    except faults() as error:
        raise MediaError(
            f"the upload to the bucket failed: {describe(error)}; check the bucket's settings",
            field="output",
            code="UPLOAD_FAILED",
        ) from None


def check_bucket(config: BucketConfig) -> list[str]:
    """Puts a tiny file into the bucket and deletes it; returns what to warn of.

    Raises:
        MediaError: UPLOAD_FAILED, saying what is wrong: nothing can be put there.
    """
    key = join_key(config.prefix, _HEALTH_KEY)
    try:
        with open_client(config) as client:
            place = {"Bucket": config.bucket, "Key": key}
            _etag(client.put_object(**place, Body=b"ok", **_options(config)))
            try:
                client.delete_object(**place)
            except faults() as error:
                return [f"the bucket's keys may not delete ({describe(error)}); this is not needed"]
    except faults() as error:
        raise MediaError(
            f"the bucket {config.bucket!r} cannot be written to: {describe(error)}; check "
            "BUCKET_ENDPOINT_URL, BUCKET_NAME, BUCKET_REGION and the keys",
            field="BUCKET_ENDPOINT_URL",
            code="UPLOAD_FAILED",
        ) from None
    return []


def join_key(*parts: str) -> str:
    """Returns a key of the parts that are not empty."""
    return "/".join(part for part in parts if part)


def _options(config: BucketConfig) -> dict[str, str]:
    return {"ACL": config.acl} if config.acl else {}


def _send(
    client: Any,
    config: BucketConfig,
    source: Upload,
    *,
    step: Callable[[int, int], None],
    stop: Callable[[], None],
) -> None:
    name = source.key.rsplit("/", 1)[-1]
    options = {
        "Bucket": config.bucket,
        "Key": source.key,
        "ContentType": source.mime,
        "ContentDisposition": f'inline; filename="{name}"',
        "Metadata": {"sha256": source.sha256},
        **_options(config),
    }
    if source.size > config.part_bytes:
        _send_parts(client, config, source, options, step=step, stop=stop)
    else:
        put = partial(client.put_object, **options)
        (answer,) = _in_threads([(source.size, put)], config, source, step=step, stop=stop)
        _etag(answer)


def _etag(answer: dict[str, Any]) -> str:
    """Returns what the storage calls the bytes that it took.

    A web server that answers 200 to everything gives none: that is the KeyError of `faults`.
    """
    return str(answer["ETag"])


def _send_parts(
    client: Any,
    config: BucketConfig,
    source: Upload,
    options: dict[str, Any],
    *,
    step: Callable[[int, int], None],
    stop: Callable[[], None],
) -> None:
    place = {"Bucket": config.bucket, "Key": source.key}
    with ExitStack() as undo:
        undo.callback(_clear, client, place)
        begun = client.create_multipart_upload(**options)
        upload_id = begun["UploadId"]
        starts = range(0, source.size, config.part_bytes)
        tasks = [
            (
                min(config.part_bytes, source.size - start),
                partial(client.upload_part, **place, UploadId=upload_id, PartNumber=number),
            )
            for number, start in enumerate(starts, start=1)
        ]
        undo.callback(_abort, client, place, upload_id)
        answers = _in_threads(tasks, config, source, step=step, stop=stop)
        parts = [
            {"PartNumber": number, "ETag": _etag(answer)}
            for number, answer in enumerate(answers, start=1)
        ]
        _etag(
            client.complete_multipart_upload(
                **place, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        )
        # A request that was repeated may have begun a second upload, whose id nobody knows.
        retried = begun.get("ResponseMetadata", {}).get("RetryAttempts")
        undo.pop_all()
    if retried:
        _clear(client, place)


def _in_threads(
    tasks: Sequence[tuple[int, Callable[..., dict[str, Any]]]],
    config: BucketConfig,
    source: Upload,
    *,
    step: Callable[[int, int], None],
    stop: Callable[[], None],
) -> list[dict[str, Any]]:
    """Sends consecutive parts of a file, a few at a time, and returns the answers in order.

    Args:
        tasks: length of each part in bytes, and what sends it, given its `Body`.
        config: how many threads.
        source: the file.
        step: told (bytes sent, bytes).
        stop: raises to end; then this returns only when no part is under way any more.
    """
    ended = threading.Event()
    done = start = 0
    with ThreadPoolExecutor(min(config.threads, len(tasks))) as pool:
        futures: dict[Future[dict[str, Any]], int] = {}
        for length, send in tasks:
            task = partial(_send_slice, send, source.path, start, length, ended)
            futures[pool.submit(task)] = length
            start += length
        pending = set(futures)
        try:
            while pending:
                stop()
                finished, pending = wait(pending, _POLL_S, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done += futures[future]
                    step(done, source.size)
        except BaseException:
            ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _send_slice(
    send: Callable[..., dict[str, Any]],
    path: Path,
    start: int,
    length: int,
    ended: threading.Event,
) -> dict[str, Any]:
    with path.open("rb") as file:
        return send(Body=_Slice(file, start, length, ended))


def _abort(client: Any, place: dict[str, str], upload_id: str) -> None:
    with contextlib.suppress(*faults()):
        client.abort_multipart_upload(**place, UploadId=upload_id)


def _clear(client: Any, place: dict[str, str]) -> None:
    """Ends every unfinished upload of the key; the key is the job's, so they are all its own."""
    with contextlib.suppress(*faults()):
        answer = client.list_multipart_uploads(Bucket=place["Bucket"], Prefix=place["Key"])
        for found in answer.get("Uploads", []):
            if found["Key"] == place["Key"]:
                _abort(client, place, found["UploadId"])


def _link(client: Any, config: BucketConfig, key: str, expires_s: int | None) -> Link:
    if config.public_base_url:
        return Link(public_url(config, key), None)
    seconds = min(expires_s or config.url_expires_s, MAX_EXPIRES_S)
    until = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    place = {"Bucket": config.bucket, "Key": key}
    url = client.generate_presigned_url("get_object", Params=place, ExpiresIn=seconds)
    return Link(url, until.isoformat(timespec="seconds").replace("+00:00", "Z"))
