"""The pose pictures a model is shown: a pose video brought to size, or a track drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from xicon_infer.errors import InvalidRequest
from xicon_infer.media.image import resize_frames
from xicon_infer.ops.pixels import half_size
from xicon_infer.pose.render import RenderOptions, iter_render_track
from xicon_infer.types import Clip, Fit, Progress, Track, UInt8Array

CHUNK = 16
"""Pictures resized at once."""


@dataclass(frozen=True)
class PoseOptions:
    """How the pose is brought to the size of the result.

    fit: "crop" or "pad", for a pose video also "stretch". render: where a track is drawn, at
    full size and then halved (the authors) or directly at half size (the graph). draw_face,
    draw_hands: of a track.
    """

    fit: Fit = "crop"
    render: Literal["full_then_half", "half"] = "full_then_half"
    draw_face: bool = True
    draw_hands: bool = True


def draw_pose(
    pose: Clip | list[Track],
    num_frames: int,
    *,
    size: tuple[int, int],
    options: PoseOptions,
    progress: Progress,
    device: torch.device | str = "cpu",
) -> UInt8Array:
    """Returns the pose pictures at half size, uint8 [F, H / 2, W / 2, 3].

    A pose video is brought to the full size and averaged over 2 x 2 pixels, as the authors of
    SCAIL do. A longer pose is cut, a shorter one keeps its last picture.

    Args:
        pose: a pose video of any size, or one track per person.
        num_frames: F, at least 1.
        size: (W, H) of the result, pixels.
        options: how to draw.
        progress: told of finished frames.
        device: where the bones of a track are rendered.

    Raises:
        InvalidRequest: the fit is not possible for this kind of pose.
        PoseError: there is nobody to draw.
    """
    width, height = size
    out = np.empty((num_frames, height // 2, width // 2, 3), np.uint8)
    done = 0
    for chunk in _pose_chunks(pose, size, options, device):
        part = chunk[: num_frames - done]
        out[done : done + len(part)] = part
        done += len(part)
        progress.step(done, num_frames, "frame")
        if done == num_frames:
            break
    out[done:] = out[done - 1]
    return out


def _pose_chunks(
    pose: Clip | list[Track],
    size: tuple[int, int],
    options: PoseOptions,
    device: torch.device | str,
) -> Iterator[UInt8Array]:
    width, height = size
    allowed = ("crop", "pad", "stretch") if isinstance(pose, Clip) else ("crop", "pad")
    if options.fit not in allowed:
        kind = "a pose video" if isinstance(pose, Clip) else "a track"
        raise InvalidRequest(
            f"'pose_fit' must be one of {', '.join(allowed)} for {kind}, got {options.fit!r}",
            field="pose_fit",
        )
    if isinstance(pose, Clip):
        for start in range(0, len(pose.frames), CHUNK):
            part = pose.frames[start : start + CHUNK]
            resized = resize_frames(
                part, width=width, height=height, fit=options.fit, pad_color=(0, 0, 0)
            )
            yield half_size(resized)
        return
    render = RenderOptions(
        mode=options.render,
        fit="crop" if options.fit == "crop" else "pad",
        draw_face=options.draw_face,
        draw_hands=options.draw_hands,
        persons=len(pose),
    )
    yield from iter_render_track(pose, width=width, height=height, options=render, device=device)
