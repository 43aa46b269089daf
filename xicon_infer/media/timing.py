"""When the frames of a video are shown, and which of them a constant timeline shows.

Read from the packets alone, before anything is decoded: the rate that a file states is often
wrong for recordings of phones and screens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from xicon_infer.media.container import damaged, too_long
from xicon_infer.media.source import MediaLimits

_FALLBACK_FPS = Fraction(25)
"""For one frame, or a file that states no usable rate and has no timestamps."""
_SANE_FPS = (Fraction(1, 100), Fraction(1000))
_PACKETS_PER_FRAME_LIMIT = 10
"""A 240 fps recording has this many times the frames of the limit, and may still be thinned."""
_MISSING_S = 0.15
"""A file this much shorter than its header says was cut off; less is rounding."""


@dataclass(frozen=True)
class Timing:
    """When the frames of a stream are shown, read from the packets without decoding.

    fps: of the constant timeline: as stated by the file, or the average where the rate varies.
    num_frames: frames that are shown. first_s: time of the first one in the file.
    time_base: seconds that one unit of a timestamp stands for.
    variable: True if some frames must be repeated or dropped to stand on the timeline.
    complete: False if the file ends before what its header promises.
    """

    fps: Fraction
    num_frames: int
    duration_s: float
    first_s: Fraction
    time_base: Fraction
    variable: bool
    complete: bool


def read_timing(
    container: InputContainer,
    stream: VideoStream,
    path: Path | str,
    *,
    limits: MediaLimits,
    field: str,
) -> Timing:
    """Returns the timing of a stream; reads all of its packets, so open the file anew after it.

    Raises:
        MediaError: MEDIA_CORRUPT (no packet) or VIDEO_TOO_LONG.
    """
    base = stream.time_base or Fraction(1, 1000)
    stamps, untimed, hidden = [], 0, 0
    complete = True
    packets = container.demux(stream)
    try:
        for packet in packets:
            if packet.size == 0:
                continue
            if packet.is_discard:
                hidden += 1
            elif packet.pts is None:
                untimed += 1
            else:
                stamps.append(packet.pts)
            if len(stamps) + untimed + hidden > _PACKETS_PER_FRAME_LIMIT * limits.max_frames:
                raise too_long(path, "has too many frames", field)
    except av.FFmpegError:
        complete = False
    shown = len(stamps) + untimed
    if not shown:
        raise damaged(path, field)
    stamps.sort()
    # Timestamps that only some packets have say nothing about the rhythm.
    times = [(stamp - stamps[0]) * base for stamp in stamps] if not untimed else []
    fps, variable = _rhythm(times, stated_rate(stream))
    duration = (times[-1] if times else Fraction(shown - 1) / fps) + 1 / fps
    if duration > limits.max_duration_s + 1:
        raise too_long(path, f"lasts {float(duration):.1f} s", field)
    return Timing(
        fps=fps,
        num_frames=shown,
        duration_s=float(duration),
        first_s=stamps[0] * base if stamps else Fraction(0),
        time_base=base,
        variable=variable,
        complete=complete
        and shown + hidden >= _listed_frames(container, stream)
        and float(duration) + _MISSING_S > _promised_s(container, stream),
    )


def on_timeline(frames: Iterator[VideoFrame], timing: Timing) -> Iterator[VideoFrame]:
    """Yields frames of a varying rate as often as each is shown on the constant timeline.

    A frame that is shown for less than half a slot may be left out.
    """
    waiting: VideoFrame | None = None
    waiting_slot = 0
    for frame in frames:
        slot = waiting_slot + 1
        if frame.pts is not None:
            time_s = frame.pts * timing.time_base - timing.first_s
            slot = max(waiting_slot, round_half_up(time_s * timing.fps))
        if waiting is not None:
            for _ in range(slot - waiting_slot):
                yield waiting
        waiting, waiting_slot = frame, slot
    if waiting is not None:
        yield waiting


def round_half_up(value: Fraction) -> int:
    """Returns the nearest integer; a half is rounded up."""
    return (2 * value + 1).__floor__() // 2


def _listed_frames(container: InputContainer, stream: VideoStream) -> int:
    """Returns how many frames the index of a file lists; 0 if it has none.

    An AVI keeps its index at the end, where it is cut off with the rest, but counts in its header.
    The header count of an MP4 knows nothing of edit lists, which its index does.
    """
    return int(stream.frames) if "avi" in container.format.name else len(stream.index_entries)


def _promised_s(container: InputContainer, stream: VideoStream) -> float:
    """Returns the length of the video by the header of a Matroska file, 0 if it says none.

    Other formats list their frames, so there it is the list that is compared.
    """
    if "matroska" not in container.format.name:
        return 0.0
    tagged = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in tagged)
    except ValueError:
        # Without the tag only the whole file has a length, and sound may be the longer part.
        return 0.0 if container.streams.audio else (container.duration or 0) / av.time_base
    return hours * 3600 + minutes * 60 + seconds


def stated_rate(stream: VideoStream) -> Fraction | None:
    """Returns the rate in the file's header, or None if it states none that can be.

    Of two nearly equal rates the nominal one (30000/1001) is preferred to the measured average.
    """
    average, nominal = stream.average_rate, stream.guessed_rate
    low, high = _SANE_FPS
    average = average if average and low <= average <= high else None
    nominal = nominal if nominal and low <= nominal <= high else None
    if average is None or nominal is None:
        return average or nominal
    return nominal if abs(nominal / average - 1) < Fraction(1, 1000) else average


def _rhythm(times: list[Fraction], stated: Fraction | None) -> tuple[Fraction, bool]:
    """Returns the rate of a constant timeline, and whether the times miss its slots.

    Times that round to 0, 1, 2, ... at their average rate count as constant: rounding to
    milliseconds, as in Matroska files, must not make a video variable.
    """
    if len(times) < 2 or times[-1] <= 0:
        return stated or _FALLBACK_FPS, False
    average = (len(times) - 1) / times[-1]
    if any(round_half_up(time * average) != index for index, time in enumerate(times)):
        low, high = _SANE_FPS
        return min(max(average.limit_denominator(1001), low), high), True
    if stated and abs(stated / average - 1) < Fraction(1, 100):
        return stated, False
    # Two frames half an hour apart have a rate that would be rounded to nothing.
    return max(average.limit_denominator(1001), _SANE_FPS[0]), False
