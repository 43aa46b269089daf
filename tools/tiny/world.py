"""A small drawn world: one character, one motion, one background, and the pose video of the motion.

    python -m tools.tiny.world --out sheet.png [--seed N --count 8 --split train]

A clip depends on its seed and split alone. Test clips show characters and motions that no training
clip shows: `character` keeps pairs of hues apart, `motion` parts of the real dance, and invented
motions come from other random streams.

Shape letters: F frames, H W pixels, P parts. Lengths are millimetres in camera space.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.tiny.character import (
    HAIR,
    RIGHT_LEG,
    RIGHT_SLEEVE,
    SHIRT,
    Character,
    build_solids,
    make_character,
    stature,
)
from tools.tiny.draw import SAMPLES, centre_of_parts, draw_solids
from tools.tiny.draw_background import draw_background, lay_backdrop, pan_path
from tools.tiny.draw_points import make_track
from tools.tiny.motion import Float64Array, Split, excerpt_dance, invent_motion, rest_pose
from xicon_infer.errors import InvalidRequest
from xicon_infer.pose.camera import default_intrinsics, project
from xicon_infer.pose.render import render_track
from xicon_infer.types import Float32Array, Track, UInt8Array

__all__ = ["SPLITS", "BoolArray", "Clip", "Split", "draw_sheet", "main", "make_clip"]

BoolArray = npt.NDArray[np.bool_]

SPLITS: tuple[Split, ...] = ("train", "test")
# A part counts as visible from this share of its outline on.
_VISIBLE_SHARE = 0.35
_COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (25, 25, 30),
    "grey": (128, 128, 128),
    "white": (240, 240, 240),
    "red": (215, 40, 45),
    "dark red": (120, 25, 35),
    "orange": (240, 140, 40),
    "yellow": (240, 220, 60),
    "olive": (120, 120, 40),
    "green": (60, 180, 70),
    "dark green": (30, 95, 50),
    "turquoise": (60, 205, 200),
    "blue": (50, 100, 220),
    "light blue": (140, 190, 240),
    "dark blue": (35, 45, 120),
    "purple": (140, 60, 200),
    "pink": (240, 140, 190),
    "magenta": (220, 50, 180),
    "brown": (120, 75, 40),
    "beige": (225, 205, 170),
}


@dataclass(frozen=True)
class Clip:
    """One example.

    frames: uint8 [F, H, W, 3], the true video of the character.
    pose: uint8 [F, H / 2, W / 2, 3], the pose video of the same motion.
    reference: uint8 [H, W, 3], the same character and background in another pose.
    track: what the pose video was drawn from.
    points: float32 [F, P, 2], pixel (x, y) of the middle of each part.
    visible: bool [F, P], in the picture and not hidden.
    colours: uint8 [P, 3], the flat colour of each part.
    prompt: a plain sentence about the character.
    """

    frames: UInt8Array
    pose: UInt8Array
    reference: UInt8Array
    track: Track
    points: Float32Array
    visible: BoolArray
    colours: UInt8Array
    prompt: str


def make_clip(seed: int, *, split: Split, num_frames: int, height: int, width: int) -> Clip:
    """Returns one example.

    Args:
        seed: 0 or more; another seed is another character, motion and background.
        split: "train" or "test".
        num_frames: F, 1 or more.
        height: H, pixels, a multiple of 32.
        width: W, likewise.

    Raises:
        InvalidRequest: if the split, the seed, the frame count or the size is not allowed.
    """
    if split not in SPLITS:
        raise InvalidRequest(f"split is {split!r}; allowed: {SPLITS}.", field="split")
    if seed < 0:
        raise InvalidRequest(f"seed is {seed}; 0 or more is needed.", field="seed")
    if num_frames < 1:
        raise InvalidRequest(
            f"num_frames is {num_frames}; 1 or more is needed.", field="num_frames"
        )
    looks, moves, places = np.random.default_rng([seed, SPLITS.index(split)]).spawn(3)
    character = make_character(looks, split)
    if moves.random() < 0.5:
        motion = invent_motion(moves, character.bones, num_frames)
    else:
        motion = excerpt_dance(moves, character.bones, num_frames, split)
    poses = np.concatenate([motion, _other_pose(moves, character, split)[None]])
    intrinsics = default_intrinsics(height, width).astype(np.float32)
    joints = _place(places, character, poses, intrinsics, (height, width))
    solids = build_solids(character, joints)
    background = draw_background(
        places, character.background, height=height * SAMPLES, width=width * SAMPLES
    )
    pan = pan_path(places, num_frames)
    # The reference, drawn last, shows the background as the first frame does.
    pan = np.concatenate([pan, pan[:1]])
    backdrop = lay_backdrop(background, pan, _shadows(joints, intrinsics))
    drawing = draw_solids(solids, character.colours, backdrop, intrinsics=intrinsics)
    points = centre_of_parts(solids, intrinsics)[:-1]
    inside = ((points >= 0) & (points < [width, height])).all(axis=-1)
    track = make_track(joints[:-1], intrinsics, (height, width))
    return Clip(
        frames=drawing.frames[:-1],
        pose=render_track([track], width=width, height=height),
        reference=drawing.frames[-1],
        track=track,
        points=points.astype(np.float32),
        visible=inside & (drawing.seen >= _VISIBLE_SHARE * drawing.whole)[:-1],
        colours=character.colours,
        prompt=_describe(character),
    )


def _other_pose(rng: np.random.Generator, character: Character, split: Split) -> Float64Array:
    """Returns the pose of the reference, [J, 3]: at rest, or a moment of another motion."""
    if rng.random() < 0.5:
        return rest_pose(character.bones)
    if rng.random() < 0.5:
        return excerpt_dance(rng, character.bones, 1, split)[0]
    return invent_motion(rng, character.bones, 1)[0]


def _place(
    rng: np.random.Generator,
    character: Character,
    poses: Float64Array,
    intrinsics: Float32Array,
    size: tuple[int, int],
) -> Float64Array:
    """Returns the poses [F + 1, J, 3] before the camera, large and mostly inside the picture."""
    height, width = size
    focal = float(intrinsics[0, 0])
    floor = height * rng.uniform(0.93, 0.975)
    middle = width * (0.5 + rng.uniform(-0.09, 0.09))
    depth = focal * stature(character) / (rng.uniform(0.65, 0.9) * height)
    # Head, hands and feet are thicker than their joints.
    head = poses[:, 15:16] - [0.0, 1.5 * character.head, 0.0]
    outline = np.concatenate([poses, head], axis=1)
    thick = 60.0
    away = np.array([-(poses[..., 0].min() + poses[..., 0].max()) / 2, 0.0, depth])
    for _ in range(4):
        spots = project(outline + away, intrinsics)
        per_mm = focal / away[2]
        left, right = spots[..., 0].min() - thick * per_mm, spots[..., 0].max() + thick * per_mm
        top, bottom = (
            spots[..., 1].min() - 0.5 * thick * per_mm,
            spots[..., 1].max() + thick * per_mm,
        )
        # Arms high up or far out take the whole figure further away, within reason.
        growth = max((bottom - top) / (floor - 2), (right - left) / (1.05 * width), 1.0)
        slack = max(width - (right - left), 0) / 2
        target = float(np.clip(middle, width / 2 - slack, width / 2 + slack))
        away[0] += (target - (left + right) / 2) / per_mm
        away[1] += (floor - bottom) / per_mm
        away[2] = min(away[2] * growth, 1.4 * depth)
    return poses + away


def _shadows(joints: Float64Array, intrinsics: Float32Array) -> Float64Array:
    """Returns the middle and half width of the shadow on the floor, [F, 3], samples."""
    feet = joints[:, [7, 8, 10, 11]]
    middle = feet.mean(axis=1)
    middle[:, 1] = np.percentile(feet[..., 1].max(axis=1), 80) + 30
    spread = np.ptp(feet[..., 0], axis=1) / 2 + 190
    scale = SAMPLES * float(intrinsics[0, 0]) / middle[:, 2]
    spots = project(middle, intrinsics) * SAMPLES
    return np.concatenate([spots, (spread * scale)[:, None]], axis=1)


def _describe(character: Character) -> str:
    """Returns a sentence about hair, clothes and background."""
    shirt, sleeve, legs, hair = (
        _colour_name(character.colours[part]) for part in (SHIRT, RIGHT_SLEEVE, RIGHT_LEG, HAIR)
    )
    behind = _colour_name(character.background[0])
    return (
        f"A cartoon figure with {hair} hair, {_with_article(shirt)} shirt with {sleeve} sleeves "
        f"and {legs} trousers dances in front of {_with_article(behind)} background."
    )


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _colour_name(colour: UInt8Array) -> str:
    names = list(_COLOURS)
    far = np.linalg.norm(
        np.array([_COLOURS[name] for name in names]) - colour.astype(float), axis=1
    )
    return names[int(far.argmin())]


def draw_sheet(clips: Sequence[Clip], *, moments: int = 7, zoom: int = 2) -> UInt8Array:
    """Returns a picture with one clip a row: reference, then pose and frame at some moments.

    Args:
        clips: of one size.
        moments: how many, evenly spread over the clip.
        zoom: pixels of the sheet per pixel of a frame.
    """
    rows = []
    for clip in clips:
        chosen = np.linspace(0, len(clip.frames) - 1, moments).round().astype(int)
        cells = [clip.reference]
        for moment in chosen:
            cells += [clip.pose[moment].repeat(2, axis=0).repeat(2, axis=1), clip.frames[moment]]
        rows.append(np.concatenate(cells, axis=1))
    sheet = np.concatenate(rows, axis=0)
    return sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes a contact sheet."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--height", type=int, default=160)
    parser.add_argument("--width", type=int, default=96)
    options = parser.parse_args(arguments)
    clips = [
        make_clip(
            seed,
            split=options.split,
            num_frames=options.frames,
            height=options.height,
            width=options.width,
        )
        for seed in range(options.seed, options.seed + options.count)
    ]
    Image.fromarray(draw_sheet(clips)).save(options.out)


if __name__ == "__main__":
    main()
