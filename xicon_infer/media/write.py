"""Files out: MP4 videos, PNG pictures and JSON, each complete or not there at all.

Whatever is written goes to a temporary name in the same folder and gets its own name by one
rename at the end, so a reader never meets half a file and a stopped job leaves none behind.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from xicon_infer.errors import MediaError
from xicon_infer.media.container import open_video, video_stream
from xicon_infer.media.encode import Encoding, encode_video
from xicon_infer.media.source import MediaLimits, display_name, reason
from xicon_infer.media.timing import read_timing
from xicon_infer.types import Audio, UInt8Array

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_RATE_PART = 65535
"""Largest numerator and denominator of a frame rate; 60000/1001 fits, and so does the header."""
_OWN_FILE = MediaLimits(
    max_video_bytes=2**62, max_side_px=2**14, max_duration_s=1e9, max_frames=2**40
)
"""What this package wrote itself is only checked, not limited."""


@contextmanager
def atomic_path(path: Path | str, *, field: str = "output") -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary file is removed and what was at
    `path` before is untouched.

    Args:
        path: the final file; its folder must exist.
        field: the option that named the file, for messages.

    Returns:
        A path with the same suffix in the same folder.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE, for any OSError in the block or in the rename.
    """
    target = Path(path)
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix[:16]}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        # Made at once, so that a place that cannot be written to is known before any work.
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, ValueError) as error:
        raise write_error(error, target, field) from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink()


def write_error(error: BaseException, path: Path | str, field: str) -> MediaError:
    """Returns the error for a file that could not be written."""
    full = getattr(error, "errno", None) in _DISK_FULL
    advice = "free some space" if full else "check the folder and its permissions"
    return MediaError(
        f"'{field}': {display_name(path)} cannot be written: {reason(error)}; {advice}",
        field=field,
        code="DISK_FULL" if full else "MEDIA_WRITE",
    )


def write_json(path: Path | str, value: Any, *, field: str = "output") -> None:
    """Writes a value as indented UTF-8 JSON.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE, also for what JSON cannot hold, such as NaN.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise write_error(error, path, field) from error
    with atomic_path(path, field=field) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_png(path: Path | str, image: UInt8Array, *, field: str = "output") -> None:
    """Writes a picture uint8 [H, W, 3] as PNG.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE.
    """
    with atomic_path(path, field=field) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def write_video(
    path: Path | str,
    frames: Iterable[UInt8Array],
    *,
    fps: Fraction,
    audio: Audio | None = None,
    crf: int = 19,
    trim_to_audio: bool = False,
    metadata: dict[str, str] | None = None,
    field: str = "output",
) -> int:
    """Writes an H.264 MP4 that plays everywhere, and returns its number of frames.

    yuv420p, BT.709 in limited range and tagged so, constant rate, index at the front. Odd sides
    are made even by repeating the last row or column. Sound is AAC, filled up with silence or cut
    to the length of the pictures.

    Args:
        path: the file to write; replaced if it is there.
        frames: pictures uint8 [H, W, 3], or blocks of them [F, H, W, 3], all of one size; a
            generator is consumed as it is encoded.
        fps: frames per second, exact.
        audio: the sound, or None.
        crf: quality of x264, 0 (lossless) to 51; lower is better and larger.
        trim_to_audio: True ends the video with the sound, if that is shorter.
        metadata: tags to store, name to text.
        field: the option that named the file, for messages.

    Returns:
        The number of frames written.

    Raises:
        MediaError: DISK_FULL or MEDIA_WRITE, also for frames that cannot be encoded.

    Source: Kosinkadink/ComfyUI-VideoHelperSuite: video_formats/h264-mp4.json and
        videohelpersuite/nodes.py VideoCombine
    """
    rate = Fraction(fps).limit_denominator(_MAX_RATE_PART)
    if not 0 < rate <= _MAX_RATE_PART:
        raise _refusal(path, f"the frame rate must be above 0, got {fps}", field)
    pictures = _even(_single_pictures(frames), path, field)
    if audio is not None:
        _check_audio(audio, path, field)
        if trim_to_audio:
            seconds = Fraction(audio.samples.shape[1], audio.sample_rate)
            pictures = islice(pictures, max(1, math.ceil(seconds * rate)))
    with atomic_path(path, field=field) as temporary:
        try:
            encoding = encode_video(
                temporary, pictures, rate=rate, audio=audio, crf=crf, metadata=metadata
            )
        except av.FFmpegError as error:
            raise write_error(error, path, field) from error
        _verify(temporary, encoding, rate, path, field)
    return encoding.num_frames


def _single_pictures(frames: Iterable[UInt8Array]) -> Iterator[UInt8Array]:
    for item in frames:
        if item.ndim == 4:
            yield from item
        else:
            yield item


def _even(pictures: Iterable[UInt8Array], path: Path | str, field: str) -> Iterator[UInt8Array]:
    """Yields the pictures checked, odd sides made even (4:2:0 colour needs pairs of pixels)."""
    shape = None
    for picture in pictures:
        shape = shape or picture.shape
        plain = picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        if not plain or picture.shape != shape or not picture.size:
            what = f"frames must be uint8 {list(shape)}, got {picture.dtype} {list(picture.shape)}"
            raise _refusal(path, what, field)
        height, width, _ = shape
        border = ((0, height % 2), (0, width % 2), (0, 0))
        yield np.pad(picture, border, mode="edge") if height % 2 or width % 2 else picture
    if shape is None:
        raise _refusal(path, "there are no frames", field)


def _check_audio(audio: Audio, path: Path | str, field: str) -> None:
    samples = audio.samples
    if samples.ndim != 2 or samples.shape[0] not in (1, 2) or audio.sample_rate < 1:
        what = f"sound must be [1 or 2, n], got {list(samples.shape)} at {audio.sample_rate} Hz"
        raise _refusal(path, what, field)


def _refusal(path: Path | str, what: str, field: str) -> MediaError:
    return MediaError(
        f"'{field}': {display_name(path)} cannot be written: {what}",
        field=field,
        code="MEDIA_WRITE",
    )


def _verify(
    temporary: Path, encoding: Encoding, rate: Fraction, path: Path | str, field: str
) -> None:
    """Raises MediaError MEDIA_WRITE if the file read back is not what was encoded."""
    try:
        with open_video(temporary, limits=_OWN_FILE, field=field) as container:
            stream = video_stream(container, temporary, limits=_OWN_FILE, field=field)
            size = stream.codec_context.width, stream.codec_context.height
            timing = read_timing(container, stream, temporary, limits=_OWN_FILE, field=field)
    except MediaError as error:
        raise _refusal(path, "the written file cannot be read back", field) from error
    # One frame alone has no rate to be read from the times.
    found = (timing.num_frames, *size, rate if timing.num_frames == 1 else timing.fps)
    if found != (encoding.num_frames, encoding.width, encoding.height, rate):
        found_text = "{} frames of {}x{} at {} fps".format(*found)
        raise _refusal(path, f"the written file came out wrong, with {found_text}", field)
