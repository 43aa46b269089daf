"""The files of a job: fetched before it, delivered after it, by the settings of the worker."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from xicon_infer.media.deliver import BucketConfig, Delivered, DeliveryPlan, OutputFile, deliver
from xicon_infer.media.deliver_bucket import bucket_of, request_bucket
from xicon_infer.media.deliver_inline import size_warning
from xicon_infer.media.fetch import fetch_all
from xicon_infer.media.fetch_types import FetchLimits, MediaSource, Wanted
from xicon_infer.media.selection import Selection
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.video import probe, read_clip
from xicon_infer.request import Request, RequestWarning
from xicon_infer.settings import Settings
from xicon_infer.types import Progress, Result
from xicon_infer.worker_context import Inputs

MAX_SIDE_PX = 4096
KEPT_FOLDER = "undelivered"
"""Below the folder of the jobs: finished videos that nobody could be given."""


@dataclass(frozen=True)
class Files:
    """Fetches and delivers for one worker.

    bucket: that of the worker, None for none. inputs: files that a workflow may name.
    """

    settings: Settings
    bucket: BucketConfig | None
    inputs: Inputs

    def fetch(self, request: Request, folder: Path, progress: Progress) -> dict[str, Path]:
        """Returns role -> local file; the driving video of the worker stays where it is.

        Raises:
            InvalidRequest: a source that is not allowed. MediaError: one that cannot be had.
        """
        found: dict[str, Path] = {}
        wanted: list[Wanted] = []
        for role, media in request.media.items():
            if media.kind == "default":
                assert self.settings.default_video is not None
                found[role] = self.settings.default_video
                continue
            value = media.value or ""
            if media.kind == "path" and value in self.inputs.files:
                value = str(self.inputs.files[value])
            kind: Literal["image", "video"] = "image" if role == "image" else "video"
            wanted.append(Wanted(MediaSource(media.kind, value), kind, role))
        fetched = fetch_all(wanted, folder, fetch_limits(self.settings), progress=progress)
        return found | {one.field: file.path for one, file in zip(wanted, fetched, strict=True)}

    def deliver(
        self,
        request: Request,
        result: Result,
        *,
        overhead: Callable[[list[dict[str, Any]]], int],
        progress: Progress,
        cancelled: Callable[[], bool],
    ) -> Delivered:
        """Hands the videos over; see `media.deliver`.

        Raises:
            MediaError: there was no way to.
        """
        plan = self.plan(request, result.seed)
        files = output_files(result)
        return deliver(
            files, plan, answer_overhead=overhead, progress=progress, cancelled=cancelled
        )

    def size_warning(self, request: Request, result: Result) -> RequestWarning | None:
        """Returns LIKELY_TOO_LARGE where a result of that size seldom fits into an answer."""
        plan = self.plan(request, result.seed)
        size = {"width": result.width, "height": result.height, "frames": result.num_frames}
        said = size_warning(plan, **size)
        return RequestWarning(**said) if said else None

    def plan(self, request: Request, seed: int) -> DeliveryPlan:
        """Returns where the files of a request may go."""
        wanted, settings = request.output, self.settings
        bucket = request_bucket(request.s3, settings) if request.s3 else self.bucket
        return DeliveryPlan(
            bucket=bucket,
            volume=settings.output_dir if _is_writable_parent(settings) else None,
            inline_limit=settings.inline_limit(request.id),
            job_id=request.id,
            mode=request.mode,
            seed=seed,
            want=wanted["return"],
            upload_url=wanted["upload_url"],
            oversize=wanted["oversize"],
            url_expires_s=wanted["url_expires_s"],
            filename_prefix=wanted["filename_prefix"] or "",
            volume_root=settings.network_volume_path,
            keep=settings.tmp / KEPT_FOLDER,
        )


def files_of(settings: Settings, inputs: Inputs) -> Files:
    """Returns what fetches and delivers for a worker.

    Raises:
        InvalidSettings: the bucket is described wrongly.
    """
    return Files(settings, bucket_of(settings), inputs)


def fetch_limits(settings: Settings) -> FetchLimits:
    """Returns what a fetch may do, by the settings."""
    media = MediaLimits(
        max_image_bytes=settings.max_image_bytes,
        max_video_bytes=settings.max_video_bytes,
        max_duration_s=settings.max_video_seconds,
        max_side_px=MAX_SIDE_PX,
    )
    return FetchLimits(
        media=media,
        video_s=settings.fetch_timeout_s,
        image_s=min(FetchLimits.image_s, settings.fetch_timeout_s),
        input_roots=settings.input_roots,
        allowed_ports=settings.allowed_ports,
        url_allowlist=settings.url_allowlist,
        require_https=settings.require_https,
        allow_private_urls=settings.allow_private_urls,
    )


def first_frame(result: Result) -> dict[str, Any]:
    """Returns the first frame of a result as a picture of the answer, PNG in base64."""
    one = Selection(frame_load_cap=1)
    frame = read_clip(result.path, selection=one, with_audio=False).frames[0]
    with io.BytesIO() as buffer:
        Image.fromarray(frame).save(buffer, "PNG")
        data = buffer.getvalue()
    return {
        "filename": f"{result.path.stem}.png",
        "type": "base64",
        "data": base64.b64encode(data).decode(),
        "format": "image/png",
        "role": "first_frame",
        "width": result.width,
        "height": result.height,
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def output_files(result: Result) -> list[OutputFile]:
    """Returns the videos of a result, the film first."""
    seconds = float(result.num_frames / result.fps)
    film = OutputFile(
        "result",
        result.path,
        result.mime_type,
        result.width,
        result.height,
        result.fps,
        result.num_frames,
        seconds,
    )
    pose = result.outputs.get("pose")
    return [film] if pose is None else [film, _pose_file(pose)]


def _pose_file(path: Path) -> OutputFile:
    info = probe(path)
    rate = Fraction(info.fps)
    return OutputFile(
        "pose",
        path,
        "video/mp4",
        info.width,
        info.height,
        rate,
        info.num_frames or 0,
        info.duration_s,
    )


def _is_writable_parent(settings: Settings) -> bool:
    """Returns True if results may go to a folder: the volume is there, or the folder itself is."""
    return settings.output_dir.is_dir() or settings.network_volume_path.is_dir()
