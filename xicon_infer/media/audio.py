"""Reading the sound that belongs to a clip.

Differs from the reference: the sound is placed against the first video frame, not against the
start of the file, so that lips stay right where the two streams begin at different times; sound
that begins later is preceded by silence; more than two channels are mixed down to stereo.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer

from xicon_infer.types import Audio, Float32Array

_MAX_S = 600
"""Sound beyond this belongs to no video that is allowed; a first timestamp beyond it is damage."""
_GAP_S = 0.03
"""A longer hole in the sound is filled with silence, so that what follows stays in time."""


def read_audio(
    container: InputContainer, *, zero_s: Fraction, start_s: float, duration_s: float
) -> Audio | None:
    """Returns a stretch of the first audio stream, or None if the file has no sound in it.

    Args:
        container: a freshly opened file.
        zero_s: the time in the file that counts as 0, that of the first video frame.
        start_s: where the stretch begins, in seconds from there.
        duration_s: its length; 0 = to the end. Less comes back where the sound ends before.

    Returns:
        float32 samples, mono or stereo, at the rate of the source.

    Source: Kosinkadink/ComfyUI-VideoHelperSuite: videohelpersuite/utils.py get_audio
    """
    stream = next(iter(container.streams.audio), None)
    rate = stream.codec_context.sample_rate if stream and stream.codec_context else 0
    if stream is None or not rate:
        return None
    wanted = round(min(duration_s or _MAX_S, _MAX_S) * rate)
    blocks: list[Float32Array] = []
    # Sample of the stretch at which the next block begins; negative = before the stretch.
    position = 0
    for time_s, block in _decode(container, stream, rate):
        offset = time_s - zero_s - Fraction(start_s)
        begins = round(offset * rate) if abs(offset) < _MAX_S else position
        if not blocks:
            position = min(begins, 0)
        if begins - position > (_GAP_S * rate if blocks else 0):
            blocks.append(np.zeros((len(block), begins - position), np.float32))
            position = begins
        blocks.append(block[:, max(-position, 0) :])
        position += block.shape[1]
        if position >= wanted:
            break
    if not blocks:
        return None
    samples = np.concatenate(blocks, axis=1)[:, :wanted]
    return Audio(samples, rate) if samples.size else None


def _decode(
    container: InputContainer, stream: AudioStream, rate: int
) -> Iterator[tuple[Fraction, Float32Array]]:
    """Yields blocks float32 [C, n], each with its time in the file; ends where damage begins."""
    layout = "mono" if stream.codec_context.channels == 1 else "stereo"
    resampler = AudioResampler(format="fltp", layout=layout, rate=rate)
    for frame in _frames(container, stream):
        time_s = Fraction(frame.pts or 0) * (frame.time_base or Fraction(1, rate))
        try:
            parts = resampler.resample(frame)
        except ValueError:  # the layout changes on the way
            return
        for part in parts:
            yield time_s, part.to_ndarray().astype(np.float32, copy=False)


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Yields what can be decoded; a lost packet leaves a gap in the times."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames: list[Any] = packet.decode()
        except av.FFmpegError:
            # Where the file itself ends early, there is no next packet either.
            continue
        yield from frames
