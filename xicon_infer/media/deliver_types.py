"""What goes into a delivery and what comes out: files, plan, answer. Names and keys are made here.

Nothing printed from these types shows a path, a link or a key: they end up in logs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from xicon_infer.errors import Cancelled, MediaError
from xicon_infer.media.deliver_bucket import BucketConfig

Want = Literal["auto", "s3", "base64", "volume"]
Oversize = Literal["reencode", "fail"]

BLOCK_BYTES = 1024**2
"""Of a file at a time; between two blocks a cancelled job stops."""
_FORMATS = {"video/mp4": "video/h264-mp4"}
"""How the older workers call a format; every other one goes by its MIME type."""
_SUFFIXES = {"video/mp4": ".mp4", "video/webm": ".webm", "image/gif": ".gif"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_MAX_ID_CHARACTERS = 128
_SHORT_ID_CHARACTERS = 8
_DEFAULT_PREFIX = "xicon"


@dataclass(frozen=True)
class OutputFile:
    """A finished video and what is in it; fps frames per second, duration_s seconds.

    path: in a folder of the job that may be written to. mime: "video/mp4", "video/webm" or
    "image/gif".
    """

    role: Literal["result", "pose"]
    path: Path = field(repr=False)
    mime: str
    width: int
    height: int
    fps: Fraction | float
    frames: int
    duration_s: float


@dataclass(frozen=True)
class DeliveryPlan:
    """Where the files of one job may go.

    bucket: None for none. volume: the folder for results on the network volume, None for none;
    volume_root: what its paths are told relative to, None for the folder itself. inline_limit:
    most bytes of the JSON of the whole answer. want: what the request asks for. upload_url: takes
    the result by one PUT. oversize: what to do with a result too large for the answer.
    url_expires_s: how long a link lives, None for the bucket's setting. filename_prefix: first
    part of the file name, "" for "xicon". keep: a folder that outlives the job, for a result that
    could not be delivered; None for none.
    """

    bucket: BucketConfig | None
    volume: Path | None = field(repr=False)
    inline_limit: int
    job_id: str
    mode: str
    seed: int
    want: Want = "auto"
    upload_url: str | None = field(default=None, repr=False)
    oversize: Oversize = "reencode"
    url_expires_s: int | None = None
    filename_prefix: str = ""
    volume_root: Path | None = field(default=None, repr=False)
    keep: Path | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Delivered:
    """What the answer says: its `videos`, its `warnings`, and `errors` that were not fatal."""

    videos: list[dict[str, Any]] = field(repr=False)
    warnings: list[dict[str, Any]]
    errors: list[str]


class DeliveryError(MediaError):
    """A finished video could not be handed over by any way.

    hint: what to do, and where the video is. warnings: what went wrong on the way.
    """

    default_code = "UPLOAD_FAILED"

    def __init__(
        self, message: str, *, code: str, hint: str, warnings: list[dict[str, Any]]
    ) -> None:
        super().__init__(f"{message}; {hint}", field="output", code=code)
        self.hint = hint
        self.warnings = warnings


def warning(code: str, message: str, at: str = "output") -> dict[str, Any]:
    """Returns one entry of an answer's `warnings`; `at` is the request field concerned."""
    return {"code": code, "message": message, "field": at}


def job_folder(job_id: str) -> str:
    """Returns a job's id as one part of a key or path: [A-Za-z0-9._-], at most 128, no dot first.

    Differs from the plain reduction: without the leading dots no id can become ".." or a hidden
    folder.
    """
    return _UNSAFE.sub("", job_id).lstrip(".")[:_MAX_ID_CHARACTERS] or "job"


def file_name(plan: DeliveryPlan, file: OutputFile) -> str:
    """Returns the name that a file is delivered under, made of safe characters only."""
    prefix = _UNSAFE.sub("", plan.filename_prefix).lstrip(".") or _DEFAULT_PREFIX
    mode = _UNSAFE.sub("", plan.mode)
    name = f"{prefix}_{mode}_{job_folder(plan.job_id)[:_SHORT_ID_CHARACTERS]}_{plan.seed}"
    role = "" if file.role == "result" else f"_{file.role}"
    return name + role + _SUFFIXES.get(file.mime, "")


def entry(file: OutputFile, name: str, stop: Callable[[], None]) -> dict[str, Any]:
    """Returns the entry of a file in an answer's `videos`; `type` and `data` are still empty.

    Raises:
        OSError: the file cannot be read.
        Cancelled: `stop` raised it.
    """
    fps = float(file.fps)
    return {
        "filename": name,
        "type": "",
        "data": "",
        "format": _FORMATS.get(file.mime, file.mime),
        "role": file.role,
        "width": file.width,
        "height": file.height,
        "fps": int(fps) if fps.is_integer() else round(fps, 6),
        "frames": file.frames,
        "duration_s": round(file.duration_s, 3),
        "size_bytes": file.path.stat().st_size,
        "sha256": _sha256(file.path, stop),
    }


def _sha256(path: Path, stop: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            stop()
            digest.update(block)
    return digest.hexdigest()


def stopper(cancelled: Callable[[], bool]) -> Callable[[], None]:
    """Returns a function that raises Cancelled once the job is cancelled."""

    def stop() -> None:
        if cancelled():
            raise Cancelled("the job was cancelled while its video was delivered")

    return stop
