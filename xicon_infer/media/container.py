"""Opening video files safely, and turning their frames into upright RGB pictures.

Everything here is one pass and holds one frame. Every open names the only protocol and the only
formats allowed: without that, a playlist called .mp4 makes the library fetch what it lists.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av import CodecContext
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation
from av.video.stream import VideoStream

from xicon_infer.errors import MediaError
from xicon_infer.media.source import (
    VIDEO_KINDS,
    MediaLimits,
    display_name,
    read_head,
    refuse,
    sniff,
)
from xicon_infer.types import UInt8Array

_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi",
}
_UNSPECIFIED_MATRIX = 2
"""In the numbering of ITU-T H.273."""
_ALLOWED = "MP4, MOV, MKV, WebM, AVI, GIF"


@dataclass(frozen=True)
class Turn:
    """How a decoded picture is brought upright: transpose, then flip each axis."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    known: bool = True


@dataclass
class Tally:
    """Counts, while one file is read, frames decoded, lost and decoded in part only."""

    decoded: int = 0
    lost: int = 0
    partial: int = 0
    ended_early: bool = False


@contextmanager
def open_video(path: Path | str, *, limits: MediaLimits, field: str) -> Iterator[InputContainer]:
    """Yields the opened file; its only side effect is reading that one file.

    Raises:
        MediaError: it is missing, not a video, too large or damaged.
    """
    kind = sniff(read_head(path, max_bytes=limits.max_video_bytes, field=field))
    if kind and kind not in VIDEO_KINDS:
        refuse(path, kind, allowed=_ALLOWED, field=field)
    try:
        # "file:" keeps names such as "concat:a" or "a:b" from being read as a protocol.
        name = "file:" + os.fspath(Path(path).absolute())
        container = av.open(name, options=_OPEN_OPTIONS, metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        if not kind:
            refuse(path, kind, allowed=_ALLOWED, field=field)
        raise damaged(path, field) from error
    with container:
        try:
            yield container
        except av.FFmpegError as error:
            raise damaged(path, field) from error


def damaged(path: Path | str, field: str) -> MediaError:
    """Returns the error for a video of which no frame can be read."""
    return MediaError(
        f"'{field}': {display_name(path)} is damaged or cut off, no frame can be read; "
        "send it again, or convert it to MP4 (H.264)",
        field=field,
        code="MEDIA_CORRUPT",
    )


def too_long(path: Path | str, what: str, field: str) -> MediaError:
    """Returns the error for a video that costs more than the limits allow."""
    return MediaError(
        f"'{field}': {display_name(path)} {what}; shorten the video",
        field=field,
        code="VIDEO_TOO_LONG",
    )


def video_stream(
    container: InputContainer,
    path: Path | str,
    *,
    limits: MediaLimits,
    field: str,
    several_at_once: bool = False,
) -> VideoStream:
    """Returns the first stream of moving pictures, its header checked against the limits.

    Cover pictures are no video. Decoding several frames at once is faster, but at a damaged
    place near the end it loses the good frames that were under way.

    Raises:
        MediaError: UNSUPPORTED_MEDIA (no video, or unknown codec), MEDIA_TOO_LARGE or
            VIDEO_TOO_LONG.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    codec = streams[0].codec_context if streams else None
    if not len(container.streams):
        raise damaged(path, field)
    if codec is None:
        what = "its codec is not supported" if streams else "it has no video stream"
        raise MediaError(
            f"'{field}': {display_name(path)} cannot be used: {what}; convert it to MP4 (H.264)",
            field=field,
            code="UNSUPPORTED_MEDIA",
        )
    check_side(codec.width, codec.height, path, limits=limits, field=field)
    seconds = (container.duration or 0) / av.time_base
    if seconds > limits.max_duration_s:
        allowed = f"at most {limits.max_duration_s:g} s are allowed"
        raise too_long(path, f"lasts {seconds:.1f} s, {allowed}", field)
    # Also refuses a stream that grows after its header; the decoder would allocate first.
    codec.options = {"max_pixels": str(limits.max_side_px**2)}
    codec.thread_type = "AUTO" if several_at_once else "SLICE"
    return streams[0]


def check_side(
    width: int, height: int, path: Path | str, *, limits: MediaLimits, field: str
) -> None:
    """Raises MediaError MEDIA_TOO_LARGE if a side is longer than the limit."""
    if max(width, height) > limits.max_side_px:
        raise MediaError(
            f"'{field}': {display_name(path)} has {width}x{height} pixels, at most "
            f"{limits.max_side_px} on a side are allowed; make it smaller",
            field=field,
            code="MEDIA_TOO_LARGE",
        )


def decode(container: InputContainer, stream: VideoStream, tally: Tally) -> Iterator[VideoFrame]:
    """Yields every frame that can be decoded, in the order of showing; counts the rest."""
    packets, decoder = container.demux(stream), _decoder(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            tally.ended_early = True
            packet = None
        try:
            # Without a packet the decoder gives what it still holds.
            frames = decoder.decode(packet)
        except av.error.EOFError:
            return
        except av.FFmpegError:
            tally.lost += 1
            frames = []
        for frame in frames:
            tally.decoded += 1
            tally.partial += frame.is_corrupt
            yield frame
        if packet is None:
            return


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """Returns the decoder of a stream; the usual ones drop the transparency of WebM."""
    usual = stream.codec_context
    tags = {name.lower(): value for name, value in stream.metadata.items()}
    other = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(usual.name)
    if other is None or tags.get("alpha_mode") != "1":
        return usual
    decoder = CodecContext.create(other, "r")
    decoder.options = usual.options
    return cast("VideoCodecContext", decoder)


def picture(frame: VideoFrame, turn: Turn, width: int, height: int) -> UInt8Array:
    """Returns a decoded frame as upright RGB, transparency laid over white.

    Colour matrix and range are taken from the frame (BT.601 where it states none). With these
    scaler flags the pixels equal those of OpenCV, the loader of the original graphs.

    Args:
        frame: a decoded frame.
        turn: as `turn_of`.
        width: of the picture before turning; other sizes are scaled to it.
        height: likewise.

    Returns:
        uint8 [H, W, 3].
    """
    see_through = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    pixels = _converted(frame, width, height, "rgba" if see_through else "rgb24").to_ndarray()
    if see_through:
        alpha = pixels[..., 3:].astype(np.uint16)
        mixed = pixels[..., :3] * alpha + np.uint16(255) * (255 - alpha)
        pixels = ((mixed + 127) // 255).astype(np.uint8)
    if turn.transpose:
        pixels = pixels.transpose(1, 0, 2)
    pixels = pixels[:: -1 if turn.flip_y else 1, :: -1 if turn.flip_x else 1]
    return np.ascontiguousarray(pixels)


def _converted(frame: VideoFrame, width: int, height: int, pixel_format: str) -> VideoFrame:
    options: dict[str, Any] = {
        "width": width,
        "height": height,
        "format": pixel_format,
        "interpolation": Interpolation.BICUBIC,
    }
    try:
        return frame.reformat(**options)
    except av.FFmpegError:
        # Some files carry colour numbers that no standard has; they mean nothing.
        frame.colorspace, frame.color_range = _UNSPECIFIED_MATRIX, ColorRange.UNSPECIFIED
        return frame.reformat(**options)


def turn_of(frame: VideoFrame) -> Turn:
    """Returns how to bring a frame upright, from its display matrix.

    Phones record lying and store a matrix. Angles other than quarter turns are not `known`.

    Source: FFmpeg/FFmpeg: libavutil/display.h
    """
    side_data: Any = frame.side_data  # its published types are too narrow
    data = bytes(side_data.get("DISPLAYMATRIX") or b"")
    if len(data) != 36:
        return Turn()
    (a, b), (c, d) = np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2] / 65536.0
    # A pixel (x, y) is shown at (a x + c y, b x + d y).
    if max(abs(b), abs(c)) < 0.01 and min(abs(a), abs(d)) > 0.01:
        return Turn(False, bool(a < 0), bool(d < 0))
    if max(abs(a), abs(d)) < 0.01 and min(abs(b), abs(c)) > 0.01:
        return Turn(True, bool(c < 0), bool(b < 0))
    return Turn(known=False)


def check_time(started: float, path: Path | str, *, limits: MediaLimits, field: str) -> None:
    """Raises MediaError VIDEO_TOO_LONG if reading, begun at `started`, takes too long."""
    if time.monotonic() - started > limits.max_seconds:
        allowed = f"{limits.max_seconds:g} s"
        raise too_long(path, f"takes more than {allowed} to read", field)
