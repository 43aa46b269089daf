"""A video inside the answer, and what to do where it is too large for that.

What counts is the JSON of the whole answer: the platform throws away one that is too long, and
says nothing. Base64 takes four bytes for three and needs no escapes in JSON, so its share is
known without making it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xicon_infer.media.container import open_video
from xicon_infer.media.deliver_types import DeliveryPlan, OutputFile, warning
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.video import iter_frames, probe, read_sound
from xicon_infer.media.write import write_video
from xicon_infer.types import UInt8Array

REENCODE_CRFS = (19, 23, 28, 32)
"""Tried in this order until the answer is small enough; six more halve the size."""
_BITS_PER_PIXEL = 0.08
"""Of a usual video at CRF 19, per frame; only for a warning ahead of time."""
_OWN_FILE = MediaLimits(
    max_video_bytes=2**62, max_side_px=2**14, max_duration_s=1e9, max_frames=2**40, max_seconds=1e9
)
_CONTAINER_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")
"""Written by the library itself."""


def json_bytes(value: Any) -> int:
    """Returns the length of a value as JSON in UTF-8, as the platform's SDK sends it."""
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def base64_bytes(size: int) -> int:
    """Returns the length of so many bytes in base64."""
    return 4 * -(-size // 3)


def read_base64(path: Path) -> str:
    """Returns the content of a file in base64.

    Raises:
        OSError: it cannot be read.
    """
    return base64.b64encode(path.read_bytes()).decode("ascii")


def size_warning(
    plan: DeliveryPlan, *, width: int, height: int, frames: int
) -> dict[str, Any] | None:
    """Returns the warning LIKELY_TOO_LARGE for a video still to be made, or None.

    Args:
        plan: where it may go; with a bucket or an `upload_url` there is nothing to warn of.
        width: of the result in pixels.
        height: of the result in pixels.
        frames: of the result.
    """
    if plan.bucket or plan.upload_url:
        return None
    size = int(width * height * frames * _BITS_PER_PIXEL / 8)
    if base64_bytes(size) <= plan.inline_limit:
        return None
    return warning(
        "LIKELY_TOO_LARGE",
        f"the video will have about {size / 1e6:.1f} MB, too much for an answer of at most "
        f"{plan.inline_limit / 1e6:.1f} MB; configure a bucket, or ask for fewer frames",
    )


def reencode(
    file: OutputFile, target: Path, *, crf: int, stop: Callable[[], None] = lambda: None
) -> None:
    """Writes a finished MP4 once more, smaller: same pictures, rate, sound and tags.

    Only one picture is in memory at a time.

    Args:
        file: the video.
        target: the file to write.
        crf: of x264, 0 to 51; larger is smaller.
        stop: asked before each frame; raises to end.

    Raises:
        MediaError: the video cannot be read, or the target not written.
        Cancelled: `stop` raised it; there is no target then.
    """
    info = probe(file.path, limits=_OWN_FILE, field="output")
    sound = read_sound(file.path, limits=_OWN_FILE, field="output") if info.has_audio else None
    frames = iter_frames(file.path, limits=_OWN_FILE, field="output")
    write_video(
        target,
        _stopping(frames, stop),
        fps=info.fps,
        audio=sound,
        crf=crf,
        metadata=_tags(file.path),
    )


def _stopping(frames: Iterator[UInt8Array], stop: Callable[[], None]) -> Iterator[UInt8Array]:
    for frame in frames:
        stop()
        yield frame


def _tags(path: Path) -> dict[str, str] | None:
    with open_video(path, limits=_OWN_FILE, field="output") as container:
        tags: dict[str, str] = dict(container.metadata)
    return {name: text for name, text in tags.items() if name not in _CONTAINER_TAGS} or None
