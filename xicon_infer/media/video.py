"""Videos in: what a file is, and the chosen frames of it as a `Clip`.

A file is read as a stream: only the chosen frames are kept, already at their final size, in one
array that is allocated once. The source is never in memory as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame

from xicon_infer.errors import MediaError
from xicon_infer.media.audio import read_audio
from xicon_infer.media.container import (
    Tally,
    check_side,
    check_time,
    damaged,
    decode,
    open_video,
    picture,
    too_long,
    turn_of,
    video_stream,
)
from xicon_infer.media.findings import nothing_left, tell_damage, tell_oddities, tell_rate
from xicon_infer.media.image import Sizing, fit_frame, resized_size
from xicon_infer.media.selection import Selection
from xicon_infer.media.source import DEFAULT_LIMITS, MediaLimits
from xicon_infer.media.timing import Timing, on_timeline, read_timing
from xicon_infer.types import Audio, Clip, UInt8Array

ALL_FRAMES = Selection()

_FIRST_CAPACITY = 64
"""Frames to allocate where the length of the file is not known; grows by half when full."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds; width and height are those of the upright picture.

    num_frames is None where the file ends early, and then duration_s is of the readable part.
    """

    width: int
    height: int
    fps: Fraction
    num_frames: int | None
    duration_s: float
    has_audio: bool
    variable_frame_rate: bool
    codec: str
    pixel_format: str


@dataclass(frozen=True)
class _Opened:
    """What is known of a file before its frames are read."""

    path: Path
    timing: Timing
    limits: MediaLimits
    field: str


def probe(
    path: Path | str, *, limits: MediaLimits = DEFAULT_LIMITS, field: str = "video"
) -> VideoInfo:
    """Returns what a video file holds; decodes its first frame only.

    Args:
        path: an MP4, MOV, MKV, WebM, AVI or GIF file, recognised by its content.
        limits: what the file may cost.
        field: the request field that named the file, for messages.

    Returns:
        The facts.

    Raises:
        MediaError: MEDIA_NOT_FOUND, UNSUPPORTED_MEDIA, MEDIA_TOO_LARGE, VIDEO_TOO_LONG or
            MEDIA_CORRUPT.
    """
    timing = _timing(path, limits, field)
    with open_video(path, limits=limits, field=field) as container:
        stream = video_stream(container, path, limits=limits, field=field)
        frame = next(decode(container, stream, Tally()), None)
        if frame is None:
            raise damaged(path, field)
        turned = turn_of(frame).transpose
        return VideoInfo(
            width=frame.height if turned else frame.width,
            height=frame.width if turned else frame.height,
            fps=timing.fps,
            num_frames=timing.num_frames if timing.complete else None,
            duration_s=timing.duration_s,
            has_audio=bool(container.streams.audio),
            variable_frame_rate=timing.variable,
            codec=stream.codec_context.name,
            pixel_format=frame.format.name,
        )


def read_clip(
    path: Path | str,
    *,
    selection: Selection = ALL_FRAMES,
    size: Sizing | None = None,
    with_audio: bool = True,
    limits: MediaLimits = DEFAULT_LIMITS,
    warn: Callable[[str], None] | None = None,
    step: Callable[[int, int], None] | None = None,
    field: str = "video",
) -> Clip:
    """Returns the chosen frames of a video, upright, at the wanted size, with their sound.

    Args:
        path: an MP4, MOV, MKV, WebM, AVI or GIF file, recognised by its content.
        selection: which frames; they are counted on a constant timeline, on which the frames of
            a variable-rate file are repeated or dropped by their timestamps.
        size: what each frame is brought to; None keeps the size of the source.
        with_audio: False leaves the sound out.
        limits: what the file may cost.
        warn: told in a sentence about everything that was repaired or left out.
        step: told (frames kept, frames expected) after each frame; may raise to stop.
        field: the request field that named the file, for messages.

    Returns:
        frames uint8 [F, H, W, 3], F >= 1; the rate after resampling; sound or None.

    Raises:
        MediaError: as `probe`, and UNSUPPORTED_MEDIA where the selection leaves no frame.

    Source: Kosinkadink/ComfyUI-VideoHelperSuite: videohelpersuite/load_video_nodes.py
    """
    tell = _once(warn)
    source = _Opened(Path(path), _timing(path, limits, field), limits, field)
    tell_rate(source.timing, field, tell)
    frames = _read_frames(source, selection, size, tell, step)
    audio = _read_sound(source, selection, tell) if with_audio else None
    return Clip(frames, selection.loaded_rate(source.timing.fps), audio)


def iter_frames(
    path: Path | str,
    *,
    selection: Selection = ALL_FRAMES,
    size: Sizing | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    warn: Callable[[str], None] | None = None,
    field: str = "video",
) -> Iterator[UInt8Array]:
    """Yields the chosen frames of a video one by one, upright, at the wanted size.

    For videos too long to keep. Unlike `read_clip` it reads a damaged file only once, and may
    lose good frames near the damage.

    Args:
        path: as `read_clip`.
        selection: as `read_clip`.
        size: as `read_clip`.
        limits: what the file may cost.
        warn: told about everything that was repaired or left out.
        field: the request field that named the file, for messages.

    Yields:
        uint8 [H, W, 3]; a repeated frame is the same array.
    """
    source = _Opened(Path(path), _timing(path, limits, field), limits, field)
    tell, tally, count = _once(warn), Tally(), 0
    tell_rate(source.timing, field, tell)
    for frame in _selected(source, selection, size, tally, tell, True):
        count += 1
        yield frame
    if not count:
        raise (
            nothing_left(source.path, source.timing, selection, source.field)
            if tally.decoded
            else damaged(path, field)
        )
    tell_damage(source.timing, tally, source.field, tell)


def read_sound(
    path: Path | str,
    *,
    selection: Selection = ALL_FRAMES,
    limits: MediaLimits = DEFAULT_LIMITS,
    warn: Callable[[str], None] | None = None,
    field: str = "video",
) -> Audio | None:
    """Returns the sound that belongs to the chosen frames of a video, or None if it has none.

    Args:
        path: as `read_clip`; no picture is decoded.
        selection: which frames; as `read_clip`.
        limits: what the file may cost.
        warn: told if there is a sound track with nothing to use in it.
        field: the request field that named the file, for messages.

    Raises:
        MediaError: as `probe`.
    """
    source = _Opened(Path(path), _timing(path, limits, field), limits, field)
    return _read_sound(source, selection, warn or (lambda message: None))


def _once(warn: Callable[[str], None] | None) -> Callable[[str], None]:
    """Returns `warn` such that nothing is said twice where a file is read twice."""
    told: set[str] = set()

    def tell(message: str) -> None:
        if warn and message not in told:
            told.add(message)
            warn(message)

    return tell


def _timing(path: Path | str, limits: MediaLimits, field: str) -> Timing:
    with open_video(path, limits=limits, field=field) as container:
        stream = video_stream(container, path, limits=limits, field=field)
        return read_timing(container, stream, path, limits=limits, field=field)


def _read_frames(
    source: _Opened,
    selection: Selection,
    size: Sizing | None,
    tell: Callable[[str], None],
    step: Callable[[int, int], None] | None,
) -> UInt8Array:
    for several_at_once in (True, False):
        tally = Tally()
        pictures = _selected(source, selection, size, tally, tell, several_at_once)
        kept = _collect(pictures, source, selection, step)
        # Read again with more care where something was lost.
        if not tally.lost:
            break
    if not len(kept):
        raise _no_frame(source, selection, tally)
    tell_damage(source.timing, tally, source.field, tell)
    return kept


def _no_frame(source: _Opened, selection: Selection, tally: Tally) -> MediaError:
    if tally.decoded:
        return nothing_left(source.path, source.timing, selection, source.field)
    return damaged(source.path, source.field)


def _collect(
    pictures: Iterator[UInt8Array],
    source: _Opened,
    selection: Selection,
    step: Callable[[int, int], None] | None,
) -> UInt8Array:
    """Returns the pictures as one array [F, H, W, 3]; empty if there are none."""
    expected = _expected_frames(source.timing, selection)
    kept = np.empty((0, 0, 0, 3), np.uint8)
    count = 0
    for shot in pictures:
        if count == len(kept):
            kept = _grown(kept, count, expected, shot, source)
        kept[count] = shot
        count += 1
        if step:
            step(count, max(count, expected))
    kept.resize((count, *kept.shape[1:]), refcheck=False)
    return kept


def _selected(
    source: _Opened,
    selection: Selection,
    size: Sizing | None,
    tally: Tally,
    tell: Callable[[str], None],
    several_at_once: bool,
) -> Iterator[UInt8Array]:
    """Yields the pictures that the selection takes; a repeated frame is converted once."""
    path, limits, field = source.path, source.limits, source.field
    with open_video(path, limits=limits, field=field) as container:
        stream = video_stream(
            container, path, limits=limits, field=field, several_at_once=several_at_once
        )
        frames = _guarded(source, decode(container, stream, tally))
        if source.timing.variable:
            frames = on_timeline(frames, source.timing)
        convert: Callable[[VideoFrame], UInt8Array] | None = None
        last: VideoFrame | None = None
        counts = selection.emissions(float(source.timing.fps))
        # The counts come first: once the cap is reached nothing more is decoded.
        for times, frame in zip(counts, frames, strict=False):
            if convert is None:
                convert = _converter(frame, size, field)
                tell_oddities(frame, stream.sample_aspect_ratio, field, tell)
            if times and frame is not last:
                shot, last = convert(frame), frame
            for _ in range(times):
                yield shot


def _guarded(source: _Opened, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Yields the frames while they, their number and the time taken stay within the limits."""
    path, limits, field = source.path, source.limits, source.field
    started = time.monotonic()
    for number, frame in enumerate(frames, start=1):
        if number > limits.max_frames:
            raise too_long(path, f"needs more than {limits.max_frames} frames to be read", field)
        check_time(started, path, limits=limits, field=field)
        check_side(frame.width, frame.height, path, limits=limits, field=field)
        yield frame


def _converter(
    first: VideoFrame, size: Sizing | None, field: str
) -> Callable[[VideoFrame], UInt8Array]:
    """Returns the function from a decoded frame to its final picture.

    The first frame decides the turn and the size before resizing for all of them, so that a
    stream that changes its size on the way still gives one array.
    """
    turn = turn_of(first)
    width, height = first.width, first.height
    if size is not None:
        resized_size(
            height if turn.transpose else width,
            width if turn.transpose else height,
            target_width=size.width,
            target_height=size.height,
            fit=size.fit,
            divisible_by=size.divisible_by,
            field=field,
        )

    def convert(frame: VideoFrame) -> UInt8Array:
        shot = picture(frame, turn, width, height)
        return fit_frame(shot, size) if size else shot

    return convert


def _expected_frames(timing: Timing, selection: Selection) -> int:
    """Returns about how many frames the selection gives; a cap is never exceeded."""
    seconds = timing.duration_s
    rate = float(selection.force_rate or timing.fps)
    frames = int(seconds * rate) + 2 - selection.skip_first_frames
    expected = max(1, -(-frames // selection.select_every_nth))
    return min(expected, selection.frame_load_cap or expected)


def _grown(
    kept: UInt8Array, count: int, expected: int, frame: UInt8Array, source: _Opened
) -> UInt8Array:
    """Returns the array with room for more frames of the size of `frame`.

    Growing in place lets the system move pages instead of copying them.
    """
    limits, field = source.limits, source.field
    most = min(limits.max_frames, limits.max_clip_bytes // frame.nbytes)
    if count >= most:
        what = f"gives more than {most} frames of {frame.shape[1]}x{frame.shape[0]}"
        raise too_long(source.path, f"{what}, which is the limit", field)
    room = min(most, count + count // 2 if count else max(expected, _FIRST_CAPACITY))
    shape = (max(room, count + 1), *frame.shape)
    if not count:
        return np.empty(shape, np.uint8)
    kept.resize(shape, refcheck=False)
    return kept


def _read_sound(source: _Opened, selection: Selection, tell: Callable[[str], None]) -> Audio | None:
    start_s, duration_s = selection.audio_window(float(source.timing.fps))
    with open_video(source.path, limits=source.limits, field=source.field) as container:
        if not container.streams.audio:
            return None
        try:
            audio = read_audio(
                container,
                zero_s=source.timing.first_s,
                start_s=start_s,
                duration_s=duration_s,
            )
        except (av.FFmpegError, ValueError):
            audio = None
    if audio is None:
        tell(f"'{source.field}' has a sound track with nothing to use in it; it was left out")
    return audio
