"""SteadyDancer in numbers, before anything is loaded: its sizes, and what every step evaluates.

The recipe asks here which branches a step has, and so does the plan of a job: both count the same.
PyTorch is not imported.

Source: MCG-NJU/SteadyDancer: wan/image2video_dancer.py, generate_dancer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.image import resized_size
from xicon_infer.sizes import area_size
from xicon_infer.types import Fit

SIZE_MULTIPLE = 16
"""Width and height: 8 (VAE) x 2 (patch)."""

AREAS: Mapping[str, int] = MappingProxyType(
    {
        "1024*576": 1024 * 576,
        "832*480": 832 * 480,
        "1280*720": 1280 * 720,
        "1024*800": 1024 * 800,
    }
)
"""The authors' presets. They name an area; the shape is that of the reference."""

Branch = Literal["prompt", "no_prompt", "no_pose"]
"""A forward pass: prompt and pose; negative prompt and pose; prompt and negative pose."""


@dataclass(frozen=True)
class Guidance:
    """What pulls the result, and in which steps.

    guidance_scale: towards the prompt, 1 is off. condition_guide_scale: towards the pose, 0 is
    off. st_cond_cfg, end_cond_cfg: the second acts where st < i / N < end, both ends left out.
    pose_start, pose_end: the pose acts at all where start <= i / N <= end, both ends included.
    """

    guidance_scale: float = 5.0
    condition_guide_scale: float = 1.0
    st_cond_cfg: float = 0.1
    end_cond_cfg: float = 0.4
    pose_start: float = 0.0
    pose_end: float = 1.0

    @property
    def by_prompt(self) -> bool:
        """Returns True if the negative prompt is used."""
        return not math.isclose(self.guidance_scale, 1.0)

    @property
    def by_pose(self) -> bool:
        """Returns True if the negative pose is asked for; a run of few steps may not reach it."""
        return not math.isclose(self.condition_guide_scale, 0.0, abs_tol=1e-9)

    def poses(self, step: int, num_steps: int) -> bool:
        """Returns True if the pose acts in a step."""
        return self.pose_start <= step / num_steps <= self.pose_end

    def branches(self, step: int, num_steps: int) -> tuple[Branch, ...]:
        """Returns the forward passes of a step, in the authors' order.

        Where the pose does not act, both poses give the same and the third pass is left out.
        """
        found: list[Branch] = ["prompt"]
        if self.by_prompt:
            found.append("no_prompt")
        inside = self.st_cond_cfg < step / num_steps < self.end_cond_cfg
        if self.by_pose and inside and self.poses(step, num_steps):
            found.append("no_pose")
        return tuple(found)

    def needs_negative_pose(self, num_steps: int) -> bool:
        """Returns True if some step of a run uses the negative pose."""
        return any("no_pose" in self.branches(step, num_steps) for step in range(num_steps))


def passes_per_step(guidance: Guidance, num_steps: int) -> list[int]:
    """Returns the forward passes of every step, for one window.

    40 steps with the defaults make 91: two each, and a third in steps 5 to 15.
    """
    return [len(guidance.branches(step, num_steps)) for step in range(num_steps)]


def generation_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Returns (width, height) of a video of about that many pixels, shaped like the reference.

    Multiples of 16, rounded down, in float64: a reference of 832 x 480 at the area 832 * 480
    gives 832 x 464, because a root comes out as 479.99.

    Args:
        width: of the reference, pixels.
        height: of the reference, pixels.
        area: pixels wanted; `AREAS` has the authors' presets.

    Raises:
        InvalidRequest: a number is below 1, or a side would be below 16 pixels.
    """
    if min(width, height, area) < 1:
        raise InvalidRequest(
            f"'area' must be at least 1, got {area} for a reference of {width}x{height}",
            field="area",
            code="OUT_OF_RANGE",
        )
    columns, rows = area_size(area, (width, height), SIZE_MULTIPLE)
    if columns * rows > area:  # a side was raised to the smallest that is possible
        raise InvalidRequest(
            f"'area' {area} gives a reference of {width}x{height} a video of {columns}x{rows}; "
            f"both sides must be at least {SIZE_MULTIPLE}, use a larger area",
            field="area",
            code="OUT_OF_RANGE",
        )
    return columns, rows


def output_size(
    width: int, height: int, *, target: tuple[int, int], area: int | None, fit: Fit
) -> tuple[int, int]:
    """Returns (width, height) of the video made from a reference of that size.

    Args:
        width: of the reference, pixels.
        height: of the reference, pixels.
        target: (width, height) asked for, multiples of 16; not looked at with an area.
        area: pixels wanted, or None; then the reference decides the shape, see `generation_size`.
        fit: how the reference is brought to the target; "resize" may end smaller.
    """
    if area is not None:
        return generation_size(width, height, area)
    return resized_size(
        width,
        height,
        target_width=target[0],
        target_height=target[1],
        fit=fit,
        divisible_by=SIZE_MULTIPLE,
    )
