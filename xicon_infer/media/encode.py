"""Encoding pictures and sound to H.264 and AAC in an MP4 file, as they come.

Knows nothing of names, renames or error texts: see `write`. Sound is encoded in step with the
pictures, so that a player finds both close together in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from xicon_infer.types import Audio, Float32Array, UInt8Array

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_OTHER_RATE = 48000
"""Sound at a rate that AAC does not have is resampled to this."""
_BT709 = 1
"""Primaries and transfer of HD television in the numbering of ITU-T H.273."""
_BLOCK = 1024
"""Samples given to the encoder at a time."""


@dataclass(frozen=True)
class Encoding:
    """What was encoded: number of frames, and their size in pixels."""

    num_frames: int
    width: int
    height: int


@dataclass(frozen=True)
class _Track:
    """A sound stream and the samples float32 [C, n] that go into it."""

    stream: AudioStream
    samples: Float32Array
    rate: int


def encode_video(
    path: Path,
    pictures: Iterable[UInt8Array],
    *,
    rate: Fraction,
    audio: Audio | None,
    crf: int,
    metadata: dict[str, str] | None,
) -> Encoding:
    """Encodes pictures of one even size and returns what was encoded.

    Args:
        path: the file to write.
        pictures: uint8 [H, W, 3], at least one.
        rate: frames per second.
        audio: sound, padded with silence or cut to the pictures; or None.
        crf: x264 quality, 0 to 51.
        metadata: tags to store, or None.

    Returns:
        The number of frames and their size.

    Raises:
        av.FFmpegError: the libraries refuse.
    """
    with _output(path, metadata) as container:
        video = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        track = _add_track(container, audio) if audio is not None else None
        count = sample = 0
        for picture in pictures:
            if not count:
                _describe(video, picture)
            container.mux(video.encode(_to_yuv(picture, count, rate)))
            count += 1
            if track:
                sample = _encode_sound(container, track, sample, int(count * track.rate / rate))
        container.mux(video.encode(None))
        if track:
            _encode_sound(container, track, sample, round(count * track.rate / rate))
            container.mux(track.stream.encode(None))
        return Encoding(count, video.codec_context.width, video.codec_context.height)


@contextmanager
def _output(path: Path, metadata: dict[str, str] | None) -> Iterator[OutputContainer]:
    flags = "+faststart+use_metadata_tags" if metadata else "+faststart"
    name = "file:" + os.fspath(path.absolute())
    container = av.open(name, "w", format="mp4", options={"movflags": flags})
    container.metadata.update(metadata or {})
    try:
        yield container
        container.close()
    except BaseException:
        # Closing an unfinished file fails too, and must not hide what really happened.
        with suppress(av.FFmpegError, OSError, ValueError):
            container.close()
        raise


def _describe(video: VideoStream, picture: UInt8Array) -> None:
    """Sets size and colour tags, which a player needs to show the colours as meant."""
    codec = video.codec_context
    codec.height, codec.width, _ = picture.shape
    codec.pix_fmt = "yuv420p"
    codec.color_range = ColorRange.MPEG
    codec.colorspace = Colorspace.ITU709
    codec.color_primaries = codec.color_trc = _BT709


def _to_yuv(picture: UInt8Array, index: int, rate: Fraction) -> VideoFrame:
    rgb = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = rgb.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC,
    )
    frame.pts = index
    frame.time_base = 1 / rate
    return frame


def _add_track(container: OutputContainer, audio: Audio) -> _Track:
    samples = np.clip(np.nan_to_num(audio.samples.astype(np.float32)), -1, 1)
    rate = audio.sample_rate
    if rate not in _AAC_RATES:
        samples, rate = _resampled(samples, rate), _OTHER_RATE
    layout = "mono" if len(samples) == 1 else "stereo"
    stream = container.add_stream("aac", rate=rate, layout=layout)
    return _Track(stream, samples, rate)


def _resampled(samples: Float32Array, rate: int) -> Float32Array:
    layout = "mono" if len(samples) == 1 else "stereo"
    resampler = AudioResampler(format="fltp", layout=layout, rate=_OTHER_RATE)
    frame = _sound_frame(samples, layout, rate, 0)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray() for part in parts], axis=1)


def _encode_sound(container: OutputContainer, track: _Track, first: int, until: int) -> int:
    """Encodes the samples from `first` on, silence after their end; returns where it stopped."""
    layout = track.stream.layout.name
    for start in range(first, until, _BLOCK):
        stop = min(start + _BLOCK, until)
        block = np.zeros((len(track.samples), stop - start), np.float32)
        part = track.samples[:, start:stop]
        block[:, : part.shape[1]] = part
        container.mux(track.stream.encode(_sound_frame(block, layout, track.rate, start)))
    return max(first, until)


def _sound_frame(samples: Float32Array, layout: str, rate: int, first: int) -> AudioFrame:
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate = rate
    frame.pts = first
    frame.time_base = Fraction(1, rate)
    return frame
