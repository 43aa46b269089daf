"""A track becomes the pose video that drives the character: capsules with the flat figure on top.

Pictures stream in chunks, because a full-size video is far larger than the halved one that the
model sees. By default the figure is drawn at full size and halved afterwards, as the model authors
do in training; "half" draws at half size at once, as the original graph does.

Differs from the references: one affine maps the driving frame to the canvas for capsules and
points alike; short gaps are closed; where a person is missing, the overlay is off too.

Shape letters: F frames, P persons, H and W the size of the generated video.

Source: zai-org/SCAIL-Pose: NLFPoseExtract/nlf_render.py (render_nlf_as_images,
render_multi_nlf_as_images); specification 4.2, 4.3, 5.6 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.ops.pixels import half_size
from xicon_infer.pose.camera import (
    CanvasFit,
    Float64Array,
    fit_affine,
    map_intrinsics,
    map_points,
)
from xicon_infer.pose.cylinders import depth_range, render_bodies
from xicon_infer.pose.draw import composite, draw_overlay
from xicon_infer.pose.keypoints import KP_SCORE_THR, Figure, to_node_figure
from xicon_infer.pose.skeleton import Palette
from xicon_infer.pose.track import (
    MAX_GAP_S,
    check_same_video,
    drop_unusable,
    fill_gaps,
    hide_unreliable,
)
from xicon_infer.pose.trust import hide_loose_parts
from xicon_infer.types import Float32Array, Progress, Track, UInt8Array

RenderMode = Literal["full_then_half", "half", "full"]
MODES: tuple[RenderMode, ...] = ("full_then_half", "half", "full")
FITS: tuple[CanvasFit, ...] = ("crop", "pad")

SIZE_MULTIPLE = 32
"""Width and height of the video must divide by this: the halved pose by the model's 16."""

# The order of the model authors: with two persons the first is pale.
_PALETTES: dict[int, tuple[Palette, ...]] = {1: ("single",), 2: ("pale", "saturated")}


@dataclass(frozen=True)
class RenderOptions:
    """How a track is drawn.

    mode: "full_then_half" draws at (H, W) and averages 2 x 2 pixels; "half" draws at
        (H / 2, W / 2); "full" draws at (H, W) and leaves it so (previews).
    fit: how the driving frame lies on the canvas: "crop" covers it, "pad" leaves bars.
    draw_face, draw_hands: whether those parts of the flat figure are drawn; the head always is.
    kp_score_thr: hand and face points with a lower score are not drawn, 0 to 1; 0 draws all.
    persons: 1 draws the first track; 2 draws the first two in two palettes.
    max_gap_s: longest gap to close, seconds; 0 closes none.
    chunk: frames drawn at once.

    Raises:
        InvalidRequest: if a value is not allowed.
    """

    mode: RenderMode = "full_then_half"
    fit: CanvasFit = "crop"
    draw_face: bool = True
    draw_hands: bool = True
    kp_score_thr: float = KP_SCORE_THR
    persons: int = 1
    max_gap_s: float = MAX_GAP_S
    chunk: int = 16

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        checks = {
            "mode": (self.mode in MODES, MODES),
            "fit": (self.fit in FITS, FITS),
            "kp_score_thr": (0 <= self.kp_score_thr <= 1, "0 to 1"),
            "persons": (self.persons in _PALETTES, "1 or 2"),
            "max_gap_s": (0 <= self.max_gap_s < float("inf"), "0 or more seconds"),
            "chunk": (self.chunk >= 1, "1 or more frames"),
        }
        for name, (allowed, expected) in checks.items():
            if not allowed:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)!r}; allowed: {expected}.", field=name
                )


@dataclass(frozen=True)
class _Plan:
    """Everything a frame needs: joints [F, P, 24, 3], camera [3, 3] and points of the canvas."""

    joints: Float32Array
    intrinsics: Float64Array
    figures: list[Figure]
    canvas: tuple[int, int]
    depths: tuple[float, float]


def render_track(
    tracks: Sequence[Track],
    *,
    width: int,
    height: int,
    options: RenderOptions | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> UInt8Array:
    """Returns the whole pose video.

    Args:
        tracks: one per person, of one video.
        width: W of the generated video, pixels, a multiple of 32.
        height: H, likewise.
        options: how to draw; the defaults if None.
        device: where the capsules are computed.
        progress: told of finished frames.

    Returns:
        uint8 [F, H / 2, W / 2, 3] RGB; [F, H, W, 3] in mode "full".

    Raises:
        InvalidRequest: if the size, the options or the set of tracks are not allowed.
        PoseError: if there is nobody to draw in any frame.
    """
    options = options or RenderOptions()
    plan = _make_plan(tracks, (height, width), options)
    shrink = 2 if options.mode == "full_then_half" else 1
    frames = len(plan.joints)
    video = np.zeros((frames, plan.canvas[0] // shrink, plan.canvas[1] // shrink, 3), np.uint8)
    done = 0
    for part in _draw_plan(plan, options, device):
        video[done : done + len(part)] = part
        done += len(part)
        if progress is not None:
            progress.step(done, frames, "frame")
    return video


def iter_render_track(
    tracks: Sequence[Track],
    *,
    width: int,
    height: int,
    options: RenderOptions | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[UInt8Array]:
    """Returns the pose video in chunks of `options.chunk` frames; arguments as `render_track`.

    What is wrong with the arguments is said at once, not at the first chunk.
    """
    options = options or RenderOptions()
    return _draw_plan(_make_plan(tracks, (height, width), options), options, device)


def _make_plan(tracks: Sequence[Track], size: tuple[int, int], options: RenderOptions) -> _Plan:
    for name, value in zip(("height", "width"), size, strict=True):
        if value <= 0 or value % SIZE_MULTIPLE:
            raise InvalidRequest(
                f"{name} is {value}; a positive multiple of {SIZE_MULTIPLE} is needed.", field=name
            )
    check_same_video(tracks)
    if len(tracks) < options.persons:
        raise InvalidRequest(
            f"persons is {options.persons}, but there are {len(tracks)} tracks; "
            f"use persons={len(tracks)} or give more tracks.",
            field="persons",
        )
    shrink = 2 if options.mode == "half" else 1
    canvas = (size[0] // shrink, size[1] // shrink)
    ready = [_prepare(track, options) for track in tracks[: options.persons]]
    joints = np.stack([track.body.joints for track in ready], axis=1)
    depths = depth_range(joints)
    if depths is None:
        raise PoseError(
            "The track holds no person in any frame; use a driving video that shows one."
        )
    affine = fit_affine(tracks[0].pose.size, canvas, options.fit)
    figures = [
        to_node_figure(
            map_points(track.pose.keypoints, affine),
            track.pose.scores,
            kp_score_thr=options.kp_score_thr,
        )
        for track in ready
    ]
    intrinsics = map_intrinsics(tracks[0].body.intrinsics, affine)
    return _Plan(joints, intrinsics, figures, canvas, depths)


def _prepare(track: Track, options: RenderOptions) -> Track:
    """Returns the track as it will be drawn: gaps closed, guesses and absent persons hidden."""
    track = fill_gaps(drop_unusable(track), options.max_gap_s)
    if options.kp_score_thr > 0:
        track = hide_loose_parts(track, options.kp_score_thr)
        track = hide_unreliable(track, options.kp_score_thr)
    return track


def _draw_plan(
    plan: _Plan, options: RenderOptions, device: torch.device | str
) -> Iterator[UInt8Array]:
    for first in range(0, len(plan.joints), options.chunk):
        frames = _draw_frames(plan, first, options, device)
        yield half_size(frames) if options.mode == "full_then_half" else frames


def _draw_frames(
    plan: _Plan, first: int, options: RenderOptions, device: torch.device | str
) -> UInt8Array:
    height, width = plan.canvas
    joints = plan.joints[first : first + options.chunk]
    rgba = render_bodies(
        joints,
        plan.intrinsics,
        height=height,
        width=width,
        palettes=_PALETTES[options.persons],
        depths=plan.depths,
        chunk=options.chunk,
        device=device,
    )
    frames = np.ascontiguousarray(rgba[..., :3])
    for index, frame in enumerate(frames):
        present = [
            figure for figure, body in zip(plan.figures, joints[index], strict=True) if body.any()
        ]
        overlay = draw_overlay(
            present,
            first + index,
            height=height,
            width=width,
            draw_face=options.draw_face,
            draw_hands=options.draw_hands,
        )
        composite(frame, overlay)
    return frames
