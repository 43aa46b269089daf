"""Which frames of a video are loaded: resample to a rate, then skip, thin out and cap.

Works on indices only and knows no file, so it can also run while the number of source frames is
still unknown. The float64 operations and their order are those of the reference loader, because
at a tie one rounding decides whether a frame is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from typing import Any, Literal

from xicon_infer.errors import InvalidRequest

FrameRule = Literal["none", "wan"]
"""What the number of loaded frames must be: anything, or 4 n + 1."""

_WAN_GROUP = 4
"""Frames per latent frame after the first one, which stands alone."""
_MAX_RATE = 1000.0
"""Frames per second; above this a typing error is certain, and resampling would not end."""


@dataclass(frozen=True)
class Selection:
    """Which frames of a video to load.

    force_rate: frames per second after resampling; None keeps the rate of the source.
    frame_load_cap: at most so many frames; 0 = all.
    skip_first_frames: frames left out at the start, counted after resampling.
    select_every_nth: 1 = every frame, 2 = every other one, counted after resampling.
    """

    force_rate: Fraction | None = None
    frame_load_cap: int = 0
    skip_first_frames: int = 0
    select_every_nth: int = 1

    def __post_init__(self) -> None:
        """Refuses values that select nothing or never end."""
        if self.force_rate is not None and not 0 < self.force_rate <= _MAX_RATE:
            allowed = f"above 0 and at most {_MAX_RATE:.0f}, or left out to keep the rate"
            raise _refusal("force_rate", self.force_rate, allowed)
        _check_counts(self.frame_load_cap, self.skip_first_frames, self.select_every_nth)

    def loaded_rate(self, source_fps: Fraction) -> Fraction:
        """Returns the exact frame rate of the loaded clip."""
        return Fraction(self.force_rate or source_fps) / self.select_every_nth

    def emissions(self, source_fps: float) -> Iterator[int]:
        """Returns `emissions` with these settings for a source of `source_fps`."""
        return emissions(
            source_fps,
            force_rate=float(self.force_rate or 0),
            frame_load_cap=self.frame_load_cap,
            skip_first_frames=self.skip_first_frames,
            select_every_nth=self.select_every_nth,
        )

    def audio_window(self, source_fps: float) -> tuple[float, float]:
        """Returns start and duration in seconds of the sound that belongs to the frames.

        A duration of 0 means to the end. As in the reference, a capped clip asks for the sound
        of `frame_load_cap` frames even where the source has fewer.

        Source: Kosinkadink/ComfyUI-VideoHelperSuite: videohelpersuite/load_video_nodes.py
        """
        target = _frame_time(source_fps, float(self.force_rate or 0))
        start = self.skip_first_frames * target
        return start, self.frame_load_cap * (target * self.select_every_nth)


def emissions(
    source_fps: float,
    *,
    force_rate: float = 0.0,
    frame_load_cap: int = 0,
    skip_first_frames: int = 0,
    select_every_nth: int = 1,
) -> Iterator[int]:
    """Yields for each source frame in turn how many times it is loaded (0 = dropped).

    Ends after the frame with which the cap is reached, else never: the caller stops when the
    source does, so that the number of source frames need not be known.

    Args:
        source_fps: frames per second of the source, above 0.
        force_rate: frames per second to resample to; 0 = that of the source.
        frame_load_cap: at most so many frames are loaded; 0 = no limit.
        skip_first_frames: resampled frames left out at the start.
        select_every_nth: of the resampled frames after those, every n-th is loaded.

    Returns:
        The counts, lazily.

    Raises:
        InvalidRequest: a rate is not above 0, or a count is out of range.

    Source: Kosinkadink/ComfyUI-VideoHelperSuite: videohelpersuite/load_video_nodes.py
    """
    _check_counts(frame_load_cap, skip_first_frames, select_every_nth)
    target = _frame_time(source_fps, force_rate)
    return _emissions(1 / source_fps, target, frame_load_cap, skip_first_frames, select_every_nth)


def select_frames(
    source_fps: float,
    source_frames: int | None,
    *,
    force_rate: float = 0.0,
    frame_load_cap: int = 0,
    skip_first_frames: int = 0,
    select_every_nth: int = 1,
    frame_rule: FrameRule = "none",
) -> Iterator[int]:
    """Yields the index of the source frame of every loaded frame.

    Args:
        source_fps: frames per second of the source, above 0.
        source_frames: number of source frames; None if unknown, and then without a cap the
            indices never end.
        force_rate: frames per second to resample to; 0 = that of the source.
        frame_load_cap: at most so many frames are loaded; 0 = no limit.
        skip_first_frames: resampled frames left out at the start.
        select_every_nth: of the resampled frames after those, every n-th is loaded.
        frame_rule: "wan" cuts the end so that 4 n + 1 frames are left.

    Returns:
        The indices, lazily, never falling.

    Raises:
        InvalidRequest: as `emissions`.

    Source: Kosinkadink/ComfyUI-VideoHelperSuite: videohelpersuite/load_video_nodes.py
    """
    counts = emissions(
        source_fps,
        force_rate=force_rate,
        frame_load_cap=frame_load_cap,
        skip_first_frames=skip_first_frames,
        select_every_nth=select_every_nth,
    )
    grabbed = count() if source_frames is None else range(source_frames)
    # The indices come first: at the end of the source no further count is asked for.
    pairs = zip(grabbed, counts, strict=False)
    indices = (index for index, times in pairs for _ in range(times))
    return _whole_groups(indices) if frame_rule == "wan" else indices


def loaded_fps(source_fps: float, *, force_rate: float = 0.0, select_every_nth: int = 1) -> float:
    """Returns the frame rate of the loaded frames, in float64 as the reference reports it."""
    return 1 / (_frame_time(source_fps, force_rate) * select_every_nth)


def _emissions(base: float, target: float, cap: int, skip: int, nth: int) -> Iterator[int]:
    offset, resampled, loaded = target, 0, 0
    while True:
        times = 0
        while offset >= target:
            offset -= target
            resampled += 1
            if resampled <= skip or (resampled - skip - 1) % nth:
                continue
            times += 1
            loaded += 1
            if loaded == cap:
                yield times
                return
        yield times
        offset += base


def _whole_groups(indices: Iterable[int]) -> Iterator[int]:
    """Yields the first index, then only complete groups of four."""
    rest = iter(indices)
    yield from islice(rest, 1)
    while len(group := list(islice(rest, _WAN_GROUP))) == _WAN_GROUP:
        yield from group


def _frame_time(source_fps: float, force_rate: float) -> float:
    if not source_fps > 0:
        raise _refusal("source_fps", source_fps, "above 0")
    if not 0 <= force_rate <= _MAX_RATE:
        raise _refusal("force_rate", force_rate, f"0 (keep the rate) to {_MAX_RATE:.0f}")
    return 1 / (force_rate or source_fps)


def _check_counts(cap: int, skip: int, nth: int) -> None:
    if cap < 0:
        raise _refusal("frame_load_cap", cap, "0 (no limit) or above")
    if skip < 0:
        raise _refusal("skip_first_frames", skip, "0 or above")
    if nth < 1:
        raise _refusal("select_every_nth", nth, "1 (every frame) or above")


def _refusal(name: str, value: Any, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' must be {allowed}, got {value}", field=name)
