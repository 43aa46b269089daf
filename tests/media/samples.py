"""Small media files, made when a test runs."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from xicon_infer.types import Audio, UInt8Array


def ramp(num_frames: int, height: int = 48, width: int = 64) -> UInt8Array:
    """Returns flat grey frames [F, H, W, 3] that tell their number: 16 + 6 i."""
    levels = (16 + 6 * np.arange(num_frames)) % 240
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = levels[:, None, None, None]
    return frames


def numbers(frames: UInt8Array) -> list[int]:
    """Returns the numbers of the frames of a `ramp` after a lossy round trip."""
    return [round((float(frame.mean()) - 16) / 6) for frame in frames]


def corners(height: int = 48, width: int = 64) -> UInt8Array:
    """Returns one picture with red, green, blue and white corners, clockwise from top left."""
    picture = np.zeros((height, width, 3), np.uint8)
    middle_y, middle_x = height // 2, width // 2
    picture[:middle_y, :middle_x] = 255, 0, 0
    picture[:middle_y, middle_x:] = 0, 255, 0
    picture[middle_y:, middle_x:] = 0, 0, 255
    picture[middle_y:, :middle_x] = 255, 255, 255
    return picture


def corner_names(picture: UInt8Array) -> str:
    """Returns the colours of the corners, clockwise from top left: "RGBW" if upright."""
    height, width = picture.shape[:2]
    points = [(0.25, 0.25), (0.25, 0.75), (0.75, 0.75), (0.75, 0.25)]
    values = [picture[int(y * height), int(x * width)] > 128 for y, x in points]
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    return "".join(names.get(tuple(int(v) for v in value), "?") for value in values)


def make_video(
    path: Path,
    frames: UInt8Array,
    *,
    fps: Fraction | int = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    stamps: Sequence[int] | None = None,
    turn: float | None = None,
    audio: Audio | None = None,
    audio_start_s: float = 0.0,
    streams: int = 1,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes frames [F, H, W, 3 or 4] with PyAV; `stamps` are times in milliseconds."""
    source = "rgba" if frames.shape[-1] == 4 else "rgb24"
    with av.open(str(path), "w") as container:
        videos = []
        for _ in range(streams):
            video = container.add_stream(codec, rate=Fraction(fps), options=options or {})
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pix_fmt
            videos.append(video)
        sound = container.add_stream("aac", rate=audio.sample_rate) if audio else None
        if sound:
            sound.layout = "mono" if len(audio.samples) == 1 else "stereo"
        for number, video in enumerate(videos):
            if stamps is not None:
                video.codec_context.time_base = Fraction(1, 1000)
            for index, pixels in enumerate(frames):
                # Further streams are black.
                shown = pixels if number == 0 else np.zeros_like(pixels)
                frame = VideoFrame.from_ndarray(np.ascontiguousarray(shown), format=source)
                frame.pts = stamps[index] if stamps is not None else index
                frame.time_base = Fraction(1, 1000) if stamps is not None else 1 / Fraction(fps)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if sound:
            _mux_sound(container, sound, audio, audio_start_s)
    if turn is not None:
        _set_turn(path, turn)
    return path


def _set_turn(path: Path, degrees: float) -> None:
    """Writes the display matrix of an MP4, as a phone does: degrees counter-clockwise."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    values = [cosine, -sine, 0, sine, cosine, 0]
    matrix = struct.pack(">6i", *(round(value * 65536) for value in values))
    content = bytearray(path.read_bytes())
    place = content.find(b"tkhd") + 44
    content[place : place + 24] = matrix
    path.write_bytes(content)


def _mux_sound(container, sound, audio, start_s):
    for first in range(0, audio.samples.shape[1], 1024):
        block = np.ascontiguousarray(audio.samples[:, first : first + 1024])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=sound.layout.name)
        frame.sample_rate = audio.sample_rate
        frame.pts = first + round(start_s * audio.sample_rate)
        frame.time_base = Fraction(1, audio.sample_rate)
        container.mux(sound.encode(frame))
    container.mux(sound.encode(None))


def tone(seconds: float, *, rate: int = 16000, channels: int = 1, begin_s: float = 0.0) -> Audio:
    """Returns a 440 Hz tone, silent before `begin_s`."""
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time) * (time >= begin_s)
    return Audio(np.tile(wave.astype(np.float32), (channels, 1)), rate)


def loud_from(audio: Audio) -> float:
    """Returns the time in seconds at which the sound begins."""
    return float(np.argmax(np.abs(audio.samples).max(axis=0) > 0.1)) / audio.sample_rate


def save_picture(path: Path, pixels: UInt8Array, **options: object) -> Path:
    """Writes a picture with Pillow, in the format its suffix names."""
    Image.fromarray(pixels).save(path, **options)
    return path
