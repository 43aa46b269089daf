"""What a video file turned out to be like: sentences for the user, and the error for nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from av.video.frame import VideoFrame

from xicon_infer.errors import MediaError
from xicon_infer.media.container import Tally, turn_of
from xicon_infer.media.selection import Selection
from xicon_infer.media.source import display_name
from xicon_infer.media.timing import Timing

_HDR_TRANSFERS = (16, 18)
"""PQ and HLG in the numbering of ITU-T H.273."""


def nothing_left(path: Path, timing: Timing, selection: Selection, field: str) -> MediaError:
    """Returns the error for a selection that leaves no frame."""
    available = timing.duration_s * float(selection.force_rate or timing.fps)
    return MediaError(
        f"'{field}': {display_name(path)} has about {available:.0f} frames at the "
        f"chosen rate and {selection.skip_first_frames} are to be skipped, so none is left; "
        "skip fewer",
        field=field,
        code="UNSUPPORTED_MEDIA",
    )


def tell_rate(timing: Timing, field: str, tell: Callable[[str], None]) -> None:
    """Says that a variable frame rate was made constant."""
    if timing.variable:
        tell(
            f"'{field}' has a variable frame rate; frames were repeated or dropped to make it "
            f"{float(timing.fps):.3f} frames per second"
        )


def tell_damage(timing: Timing, tally: Tally, field: str, tell: Callable[[str], None]) -> None:
    """Says what of a file could not be read."""
    bad = tally.lost + tally.partial
    if bad:
        tell(f"'{field}' is damaged: {bad} pictures could not be read, or only in part")
    if tally.ended_early or not timing.complete:
        tell(f"'{field}' is cut off; what could be read of it was used")


def tell_oddities(
    frame: VideoFrame, pixel_aspect: Fraction | None, field: str, tell: Callable[[str], None]
) -> None:
    """Says what of a first frame was taken differently from how it is marked."""
    if not turn_of(frame).known:
        tell(f"'{field}' is marked as turned by an odd angle; it was used as stored")
    if pixel_aspect and pixel_aspect != 1:
        tell(f"'{field}' has pixels of shape {pixel_aspect}; they were taken as square")
    if frame.color_trc in _HDR_TRANSFERS:
        tell(f"'{field}' is HDR and was read without tone mapping; colours may look pale")
