"""Invented characters: proportions, hair and colours, and the solid shapes they are made of.

Every part has one flat colour, far from every other part's and from the background's under any
shade the lamp gives, so that a part can be found by its colour. Characters whose shirt and trousers
have certain pairs of hues belong to the test alone.

Gloves and shoes are large, as in cartoons: at 96x160 pixels a true hand is half a latent wide.

Lengths are millimetres; colours are RGB, 0 to 1 while chosen, 0 to 255 afterwards.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tools.tiny.motion import REST_MM, Float64Array, Split
from xicon_infer.types import UInt8Array

Hair = Literal["short", "long", "bun", "tail", "curls"]
HAIRS: tuple[Hair, ...] = ("short", "long", "bun", "tail", "curls")

PARTS = (
    "face",
    "hair",
    "shirt",
    "right sleeve",
    "left sleeve",
    "right glove",
    "left glove",
    "right trouser leg",
    "left trouser leg",
    "right shoe",
    "left shoe",
)
FACE, HAIR, SHIRT = 0, 1, 2
RIGHT_SLEEVE, LEFT_SLEEVE, RIGHT_GLOVE, LEFT_GLOVE = 3, 4, 5, 6
RIGHT_LEG, LEFT_LEG, RIGHT_SHOE, LEFT_SHOE = 7, 8, 9, 10
WHITE, DARK = -2, -1
"""Eyes, and pupils and mouth: drawn on the face, no parts of their own."""
FEATURES: UInt8Array = np.array([(246, 246, 248), (28, 24, 34)], np.uint8)
"""The colours of `WHITE` and `DARK`."""

# Share of the flat colour on the darkest and brightest side of a shape.
SHADE = (0.74, 1.0)
# Least distance of two colours of one picture, of at most sqrt(3).
_APART = 0.27
_TRIES = 120
_HUES = 6

_SKINS = (
    (0.99, 0.86, 0.74),
    (0.95, 0.76, 0.60),
    (0.82, 0.60, 0.44),
    (0.60, 0.40, 0.27),
    (0.42, 0.27, 0.19),
)
_HAIRS = (
    (0.10, 0.09, 0.10),
    (0.30, 0.18, 0.11),
    (0.55, 0.33, 0.15),
    (0.93, 0.78, 0.40),
    (0.75, 0.30, 0.12),
    (0.92, 0.92, 0.95),
    (0.95, 0.45, 0.70),
    (0.25, 0.55, 0.85),
)


@dataclass(frozen=True)
class Character:
    """One figure.

    bones: float64 [24, 3], each joint from its parent, standing.
    girth: how thick limbs and body are, 1 is usual.
    head: radius of the head.
    hair: its style.
    colours: uint8 [P, 3], of `PARTS`.
    background: uint8 [2, 3], upper and lower colour behind it.
    """

    bones: Float64Array
    girth: float
    head: float
    hair: Hair
    colours: UInt8Array
    background: UInt8Array


@dataclass(frozen=True)
class Solids:
    """Round cones between two spheres, in camera space.

    start, end: float64 [F, S, 3].
    radii: float64 [S, 2], at either end.
    parts: int64 [S]; `WHITE` or `DARK` where a shape is no part.
    """

    start: Float64Array
    end: Float64Array
    radii: Float64Array
    parts: npt.NDArray[np.int64]


def make_character(rng: np.random.Generator, split: Split) -> Character:
    """Returns a character of the split.

    Args:
        rng: decides everything.
        split: decides which pairs of shirt and trousers are allowed.
    """
    bones = REST_MM * rng.uniform(0.93, 1.07)
    bones[[4, 5, 7, 8]] *= rng.uniform(0.86, 1.08)
    bones[[18, 19, 20, 21]] *= rng.uniform(0.88, 1.06)
    bones[[13, 14, 16, 17], 0] *= rng.uniform(0.9, 1.2)
    colours, background = _choose_colours(rng, split)
    return Character(
        bones=bones,
        girth=rng.uniform(0.85, 1.25),
        head=rng.uniform(112, 155),
        hair=HAIRS[rng.integers(len(HAIRS))],
        colours=colours,
        background=background,
    )


def is_held_out(colours: UInt8Array) -> bool:
    """Returns whether a character of these part colours [P, 3] belongs to the test."""
    shirt, legs = (_hue_number(colours[part]) for part in (SHIRT, RIGHT_LEG))
    return (shirt + legs) % _HUES == 0


def shade_distance(first: Float64Array, second: Float64Array) -> Float64Array:
    """Returns how far apart colours [..., 3], 0 to 1, stay when one of them is shaded."""
    nearest = np.full(np.broadcast_shapes(first.shape, second.shape)[:-1], np.inf)
    for one, other in ((first, second), (second, first)):
        shade = (one * other).sum(-1) / np.maximum((other * other).sum(-1), 1e-6)
        shaded = np.clip(shade, *SHADE)[..., None] * other
        nearest = np.minimum(nearest, np.linalg.norm(one - shaded, axis=-1))
    return nearest


def stature(character: Character) -> float:
    """Returns the height from the soles to the top of the head."""
    spine = -character.bones[[3, 6, 9, 12, 15], 1].sum()
    leg = character.bones[[1, 4, 7, 10], 1].sum()
    return float(spine + leg + 1.4 * character.head)


def head_frame(joints: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Returns unit vectors left, up and forward of the head, each [F, 3], from joints [F, J, 3]."""
    up = _unit(joints[:, 15] - joints[:, 12])
    # The head looks half where the shoulders and half where the hips do.
    across = _unit(joints[:, 16] - joints[:, 17]) + _unit(joints[:, 1] - joints[:, 2])
    left = _unit(across - (across * up).sum(-1, keepdims=True) * up)
    return left, up, np.cross(left, up)


def build_solids(character: Character, joints: Float64Array) -> Solids:
    """Returns the shapes of the character in every pose.

    Args:
        character: whose shapes.
        joints: [F, J, 3], camera space.
    """
    thick = character.girth
    shapes: list[tuple[Float64Array, Float64Array, float, float, int]] = []

    def add(first: int, last: int, radius: float, end_radius: float, part: int) -> None:
        shapes.append((joints[:, first], joints[:, last], radius, end_radius, part))

    # A little short of hips and shoulders, where legs and sleeves begin.
    waist = joints[:, 0] + 0.4 * (joints[:, 3] - joints[:, 0])
    shapes.append((waist, joints[:, 9], 92 * thick, 116 * thick, SHIRT))
    inward = 0.12 * (joints[:, 17] - joints[:, 16])
    shapes.append((joints[:, 16] + inward, joints[:, 17] - inward, 64 * thick, 64 * thick, SHIRT))
    add(1, 2, 78 * thick, 78 * thick, SHIRT)
    add(12, 15, 46, 46, FACE)
    for hip, knee, ankle, foot, leg, shoe in (
        (2, 5, 8, 11, RIGHT_LEG, RIGHT_SHOE),
        (1, 4, 7, 10, LEFT_LEG, LEFT_SHOE),
    ):
        add(hip, knee, 84 * thick, 66 * thick, leg)
        add(knee, ankle, 66 * thick, 54 * thick, leg)
        toe = joints[:, ankle] + 1.15 * (joints[:, foot] - joints[:, ankle])
        shapes.append((joints[:, ankle], toe, 84.0, 70.0, shoe))
    for shoulder, elbow, wrist, hand, sleeve, glove in (
        (17, 19, 21, 23, RIGHT_SLEEVE, RIGHT_GLOVE),
        (16, 18, 20, 22, LEFT_SLEEVE, LEFT_GLOVE),
    ):
        add(shoulder, elbow, 72 * thick, 62 * thick, sleeve)
        add(elbow, wrist, 62 * thick, 56 * thick, sleeve)
        tip = joints[:, hand] + 0.5 * (joints[:, hand] - joints[:, wrist])
        shapes.append((joints[:, wrist], tip, 72.0, 88.0, glove))
    shapes += _head_shapes(character, joints)
    start, end = (np.stack([shape[end] for shape in shapes], axis=1) for end in (0, 1))
    radii = np.array([shape[2:4] for shape in shapes], np.float64)
    return Solids(start, end, radii, np.array([shape[4] for shape in shapes]))


def _head_shapes(
    character: Character, joints: Float64Array
) -> list[tuple[Float64Array, Float64Array, float, float, int]]:
    """Returns face, eyes and hair."""
    radius = character.head
    left, up, forward = head_frame(joints)
    middle = joints[:, 15] + 0.35 * radius * up

    def at(leftwards: float, upwards: float, forwards: float) -> Float64Array:
        return middle + radius * (leftwards * left + upwards * up + forwards * forward)

    face = middle
    shapes = [(face, face, radius, radius, FACE)]
    for side in (-1, 1):
        white, pupil = at(0.37 * side, 0.06, 0.8), at(0.37 * side, 0.03, 0.94)
        shapes.append((white, at(0.37 * side, 0.2, 0.78), 0.24 * radius, 0.24 * radius, WHITE))
        shapes.append((pupil, at(0.37 * side, 0.12, 0.92), 0.14 * radius, 0.14 * radius, DARK))
    shapes.append((at(-0.2, -0.5, 0.83), at(0.2, -0.5, 0.83), 0.09 * radius, 0.09 * radius, DARK))
    cap = at(0, 0.36, -0.24)
    shapes.append((cap, cap, 1.02 * radius, 1.02 * radius, HAIR))
    extra: dict[Hair, list[tuple[Float64Array, Float64Array, float, float]]] = {
        "short": [],
        "long": [(at(0, 0.1, -0.45), at(0, -1.25, -0.6), 0.9, 0.62)],
        "bun": [(at(0, 1.3, -0.35), at(0, 1.3, -0.35), 0.5, 0.5)],
        "tail": [(at(0, 0.5, -1.1), at(0, -1.1, -1.35), 0.42, 0.26)],
        "curls": [
            (at(side * 0.75, 0.45, -0.25), at(side * 0.8, -0.2, -0.4), 0.62, 0.55)
            for side in (-1, 1)
        ],
    }
    for start, end, first, last in extra[character.hair]:
        shapes.append((start, end, first * radius, last * radius, HAIR))
    return shapes


def _choose_colours(rng: np.random.Generator, split: Split) -> tuple[UInt8Array, UInt8Array]:
    """Returns part colours [P, 3] and background colours [2, 3], all far apart."""
    while True:
        background = _background_colours(rng)
        chosen = list(background)
        apart = _APART
        for part in range(len(PARTS)):
            options = np.array([_candidate(rng, part, chosen) for _ in range(_TRIES)])
            taken = np.array(chosen)
            near = shade_distance(options[:, None], taken[None]).min(axis=1)
            free = np.flatnonzero(near >= apart)
            if not free.size:
                break
            chosen.append(options[free[0]])
        else:
            colours = (np.array(chosen) * 255).round().astype(np.uint8)
            if is_held_out(colours[2:]) == (split == "test"):
                return colours[2:], colours[:2]


def _candidate(rng: np.random.Generator, part: int, chosen: list[Float64Array]) -> Float64Array:
    """Returns a colour that suits the part; what is left is akin to what is right."""
    if part == FACE:
        return _jittered(rng, _SKINS[rng.integers(len(_SKINS))], 0.03)
    if part == HAIR:
        return _jittered(rng, _HAIRS[rng.integers(len(_HAIRS))], 0.05)
    if part in (LEFT_SLEEVE, LEFT_LEG, LEFT_SHOE, LEFT_GLOVE) and rng.random() < 0.7:
        hue = colorsys.rgb_to_hsv(*chosen[2 + part - 1])[0] + rng.uniform(-0.09, 0.09)
    else:
        hue = rng.random()
    if rng.random() < 0.12:
        return np.full(3, rng.uniform(0.05, 1.0))
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.35, 1.0), rng.uniform(0.35, 1.0)))


def _background_colours(rng: np.random.Generator) -> Float64Array:
    """Returns two muted colours [2, 3], akin, mostly bright."""
    hue = rng.random()
    bright = rng.uniform(0.72, 0.95) if rng.random() < 0.75 else rng.uniform(0.28, 0.45)
    saturation = rng.uniform(0.05, 0.32)
    return np.array(
        [
            colorsys.hsv_to_rgb(
                (hue + rng.uniform(-0.1, 0.1)) % 1,
                saturation * rng.uniform(0.7, 1.2),
                min(bright * rng.uniform(0.88, 1.08), 1.0),
            )
            for _ in range(2)
        ]
    )


def _jittered(rng: np.random.Generator, colour: tuple[float, ...], by: float) -> Float64Array:
    return np.clip(np.array(colour) + rng.uniform(-by, by, 3), 0.02, 1.0)


def _hue_number(colour: UInt8Array) -> int:
    hue = colorsys.rgb_to_hsv(*(float(channel) / 255 for channel in colour))[0]
    return int(hue * _HUES) % _HUES


def _unit(vectors: Float64Array) -> Float64Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)
