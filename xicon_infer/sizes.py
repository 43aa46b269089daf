"""The size of a video: as asked for, or after the picture that it starts with.

Rules, for a wanted size of width x height:
- "exact": that size; the picture is fitted to it.
- "area": as many pixels, in the aspect of the picture (how Wan2.1 and SteadyDancer were run).
- "bucket": of the sizes the models were trained on, in the class of the wanted area, the one
  nearest in aspect.

Source: Wan-Video/Wan2.1: wan/configs/__init__.py (sizes), wan/image2video.py (area).
"""

from __future__ import annotations

import math
from typing import Literal

Sizing = Literal["exact", "area", "bucket"]
SIZINGS: tuple[Sizing, ...] = ("exact", "area", "bucket")

SMALL_AREA = 832 * 480
"""Pixels of the smaller class ("480p"); above the middle between both it is the larger one."""
LARGE_AREA = 1280 * 720

BUCKETS = {
    SMALL_AREA: ((832, 480), (480, 832)),
    LARGE_AREA: ((1280, 720), (720, 1280), (1024, 1024)),
}
"""(W, H) by class."""


def choose_size(
    sizing: Sizing, width: int, height: int, picture: tuple[int, int] | None, multiple: int
) -> tuple[int, int]:
    """Returns (W, H) of the video in pixels.

    Args:
        sizing: the rule.
        width: wanted, pixels.
        height: wanted, pixels.
        picture: (W, H) of the picture it starts with; None leaves the size as it is.
        multiple: both sides must divide by it.
    """
    if sizing == "exact" or picture is None:
        return width, height
    if sizing == "area":
        return area_size(width * height, picture, multiple)
    aspect = math.log(picture[0] / picture[1])
    nearest = min(
        BUCKETS[area_class(width * height)], key=lambda wh: abs(math.log(wh[0] / wh[1]) - aspect)
    )
    return nearest[0] // multiple * multiple, nearest[1] // multiple * multiple


def area_size(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Returns (W, H) of about `area` pixels in the aspect of a picture, rounded down.

    Args:
        area: pixels.
        picture: (W, H).
        multiple: both sides are multiples of it, and at least one time it.

    Source: Wan-Video/Wan2.1: wan/image2video.py; in the order of operations there, so that an
    exact 832 x 480 gives 832 x 464 as there.
    """
    width, height = picture
    aspect = height / width
    columns, rows = (
        int(math.sqrt(value) // multiple) * multiple for value in (area / aspect, area * aspect)
    )
    return max(multiple, columns), max(multiple, rows)


def area_class(area: int) -> int:
    """Returns `SMALL_AREA` or `LARGE_AREA`, whichever is nearer by ratio."""
    return LARGE_AREA if area * area > SMALL_AREA * LARGE_AREA else SMALL_AREA
