"""Draws `character.png`: an invented dancer to try the project with. No real person is shown.

    python examples/make_character.py [FILE]

The figure stands upright and faces the camera, with face, hands and feet in full view, because
that is what pose estimation and the video models read best. Every part is a flat shape that is
"inflated": its distance to the outline becomes a height, and the height is lit. Everything is
computed, nothing is random, so the picture is the same on every run.

Coordinates are pixels of an 832 x 1216 picture; `SCALE` draws it larger and shrinks it at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float32]
Point = tuple[float, float]
Color = tuple[int, int, int]

WIDTH, HEIGHT = 832, 1216
SCALE = 2
AXIS = WIDTH / 2
"""The figure is mirrored at this column."""

SKIN: Color = (244, 186, 148)
HAIR: Color = (92, 42, 48)
HOODIE: Color = (244, 178, 62)
CUFF: Color = (222, 142, 40)
TROUSERS: Color = (58, 74, 128)
TURN_UP: Color = (110, 130, 186)
SHOE: Color = (246, 244, 240)
SOLE: Color = (214, 92, 84)
WHITE: Color = (252, 250, 248)
IRIS: Color = (62, 120, 112)
PUPIL: Color = (30, 30, 40)
LIPS: Color = (196, 84, 84)
BACKDROP_TOP: Color = (236, 232, 228)
BACKDROP_FOOT: Color = (206, 200, 198)

# Towards the lamp: left of the camera, above it.
LIGHT = np.array([-0.45, -0.60, 0.66], np.float32)


def main(arguments: Sequence[str]) -> None:
    """Writes the picture to the file named, else beside this script."""
    path = Path(arguments[0]) if arguments else Path(__file__).with_name("character.png")
    Image.fromarray(draw_character()).save(path, optimize=True)
    print(path)


def draw_character() -> npt.NDArray[np.uint8]:
    """Returns the picture, uint8 [1216, 832, 3] RGB."""
    picture = backdrop()
    draw_hair_behind(picture)
    draw_legs(picture)
    draw_arms(picture)
    draw_torso(picture)
    draw_face(picture)
    draw_fringe(picture)
    small = cv2.resize(picture[..., :3], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    return np.asarray(np.clip(small + 0.5, 0, 255), np.uint8)


def backdrop() -> Array:
    """Returns a paper backdrop with the figure's shadow on the floor.

    [H, W, 4]: RGB, 0 to 255, and where the figure is, 0 to 1 (nowhere yet).
    """
    row = np.linspace(0, 1, HEIGHT * SCALE, dtype=np.float32)[:, None, None]
    # Wall above, floor below, joined by a soft bend.
    bend = 1 / (1 + np.exp(-(row - 0.8) * 14))
    top, foot = np.array(BACKDROP_TOP, np.float32), np.array(BACKDROP_FOOT, np.float32)
    picture = np.repeat(top + (foot - top) * bend, WIDTH * SCALE, axis=1).astype(np.float32)
    for centre, axes, blur, strength in (
        ((430, 1112), (190, 22), 26, 0.30),
        ((362, 1108), (58, 13), 9, 0.35),
        ((474, 1108), (58, 13), 9, 0.35),
    ):
        shadow = soften(ellipse(centre, axes), blur)
        picture *= 1 - strength * shadow[..., None]
    return np.dstack([picture, np.zeros(picture.shape[:2], np.float32)])


def draw_hair_behind(picture: Array) -> None:
    """Paints the hair that hangs behind neck and shoulders."""
    half = [(416, 92), (470, 100), (506, 140), (514, 200), (512, 262), (498, 306), (462, 312)]
    paint(picture, polygon(mirrored([*half, (416, 300)])), darker(HAIR, 0.78), puff=40)


def draw_legs(picture: Array) -> None:
    """Paints shoes, then trousers in one piece."""
    hips = [(416, 570), (470, 574), (490, 610), (486, 668), (452, 690), (428, 700)]
    trousers = polygon(mirrored([*hips, (416, 706)]))
    leg = [(382, 600), (377, 700), (370, 815), (367, 920), (366, 992)]
    for flip in (False, True):
        draw_shoe(picture, flip)
        trousers = np.maximum(trousers, stroke(leg, [48, 46, 36, 31, 29], flip=flip))
    paint(picture, trousers, TROUSERS, puff=38)
    fold(picture, [(416, 650), (417, 690), (416, 728)], strength=0.3)
    for flip in (False, True):
        fold(picture, [(346, 818), (368, 830), (396, 822)], flip=flip)
        fold(picture, [(344, 940), (366, 948), (390, 940)], flip=flip)
        shade(picture, band((366, 1000), (0, 1), 30, 10, flip=flip), 6, 0.30)
        paint(picture, band((366, 1006), (0, 1), 33, 16, flip=flip), TURN_UP, puff=16)


def draw_shoe(picture: Array, flip: bool) -> None:
    """Paints a sneaker seen from the front, its toe turned a little outwards."""
    paint(picture, stroke([(366, 1010), (364, 1050)], [18, 17], flip=flip), SKIN, puff=16)
    sole = [(312, 1096), (318, 1082), (398, 1082), (404, 1096), (394, 1112), (322, 1112)]
    paint(picture, polygon(sole, flip=flip), SOLE, puff=9)
    upper = [(344, 1034), (384, 1034), (390, 1056), (400, 1078), (399, 1098), (357, 1104)]
    upper += [(316, 1098), (318, 1078), (338, 1056)]
    paint(picture, polygon(upper, flip=flip), SHOE, puff=22)
    tongue = [(352, 1030), (378, 1030), (380, 1052), (372, 1076), (352, 1076), (346, 1052)]
    paint(picture, polygon(tongue, flip=flip), darker(SHOE, 0.94), puff=9)
    for y, half in ((1044, 15), (1055, 16), (1066, 15)):
        lace = stroke([(363 - half, y), (363 + half, y)], [2.2, 2.2], flip=flip)
        paint(picture, lace, SOLE, puff=3)
    cap = [(322, 1096), (330, 1083), (357, 1078), (386, 1083), (394, 1096), (358, 1104)]
    paint(picture, polygon(cap, flip=flip), WHITE, puff=12)


def draw_arms(picture: Array) -> None:
    """Paints hands, then sleeves over the wrists."""
    for flip in (False, True):
        draw_hand(picture, flip)
        sleeve = [(344, 350), (308, 430), (287, 492), (263, 556), (250, 594)]
        paint(picture, stroke(sleeve, [36, 33, 30, 27, 24], flip=flip), HOODIE, puff=30)
        shade(picture, band((246, 603), (-0.34, 0.94), 22, 10, flip=flip), 5, 0.28)
        paint(picture, band((243, 609), (-0.34, 0.94), 22, 13, flip=flip), CUFF, puff=14)
        fold(picture, [(262, 482), (284, 494), (304, 490)], flip=flip)
        fold(picture, [(246, 562), (262, 570), (282, 566)], flip=flip)


def draw_hand(picture: Array, flip: bool) -> None:
    """Paints an open hand with five fingers, hanging from the wrist at (236, 624)."""
    fingers: list[tuple[list[Point], list[float]]] = [
        ([(222, 650), (209, 680), (202, 702)], [7.0, 6.2, 5.0]),
        ([(230, 656), (223, 694), (220, 720)], [7.0, 6.4, 5.2]),
        ([(240, 656), (240, 694), (240, 719)], [7.0, 6.4, 5.2]),
        ([(249, 650), (256, 682), (259, 703)], [6.8, 6.0, 4.8]),
        ([(250, 632), (268, 648), (277, 668)], [8.5, 7.2, 5.4]),
    ]
    palm = [(226, 612), (250, 612), (256, 640), (252, 660), (236, 666), (219, 660), (217, 640)]
    hand = polygon(palm, flip=flip)
    for points, radii in fingers:
        hand = np.maximum(hand, stroke(points, radii, flip=flip))
    paint(picture, hand, SKIN, puff=9)


def draw_torso(picture: Array) -> None:
    """Paints neck, hoodie, hood, pocket and strings."""
    hood = [(416, 268), (458, 272), (484, 298), (480, 326), (446, 340)]
    paint(picture, polygon(mirrored([*hood, (416, 344)])), darker(CUFF, 0.82), puff=30)
    paint(picture, stroke([(416, 250), (416, 318)], [25, 27]), SKIN, puff=24)
    shade(picture, ellipse((416, 288), (34, 20)), blur=9, strength=0.36)
    half = [(416, 312), (446, 308), (486, 320), (514, 352), (506, 430), (497, 500), (502, 596)]
    paint(picture, polygon(mirrored([*half, (416, 606)])), HOODIE, puff=64)
    hem = [(416, 584), (498, 578), (503, 592), (500, 612), (416, 622)]
    paint(picture, polygon(mirrored(hem)), CUFF, puff=14)
    shade(picture, stroke([(334, 626), (416, 632), (498, 626)], [5, 5, 5]), blur=6, strength=0.3)
    for flip in (False, True):
        shade(picture, stroke([(338, 392), (332, 470), (330, 560)], [4, 5, 5], flip=flip), 7, 0.28)
        collar = [(418, 366), (388, 352), (356, 328), (344, 302), (362, 294), (388, 314)]
        shade(picture, polygon([*collar, (418, 342)], flip=flip), 5, 0.25)
        paint(picture, polygon([*collar, (418, 342)], flip=flip), HOODIE, puff=15)
        string = stroke([(401, 358), (398, 388), (399, 414)], [2.4, 2.2, 2.6], flip=flip)
        paint(picture, string, WHITE, puff=3)
    pocket = [(372, 506), (460, 506), (484, 560), (478, 574), (354, 574), (348, 560)]
    shade(picture, polygon(pocket), blur=5, strength=0.22)
    paint(picture, polygon(pocket), HOODIE, puff=26)
    draw_star(picture, (416, 456), 30)


def draw_star(picture: Array, centre: Point, radius: float) -> None:
    """Paints the five-pointed star on the chest."""
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, radius, radius * 0.48)[:, None]
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach + centre
    paint(picture, polygon(points.tolist(), smooth=False), WHITE, puff=10, rim=0.5)


def draw_face(picture: Array) -> None:
    """Paints the shape of the face, then cheeks, eyes, brows, nose and mouth."""
    half = [(416, 118), (458, 132), (480, 172), (479, 218), (464, 256), (438, 282)]
    paint(picture, polygon(mirrored([*half, (416, 289)])), SKIN, puff=34, rim=0.15)
    for flip in (False, True):
        tint(picture, soften(ellipse((375, 242), (15, 10), flip=flip), 7), (232, 110, 100), 0.45)
        white = [(370, 213), (380, 202), (394, 201), (402, 213), (394, 221), (379, 221)]
        eye = polygon(white, flip=flip)
        tint(picture, eye, WHITE, 1.0)
        tint(picture, eye * ellipse((387, 211), (10, 11), flip=flip), IRIS, 1.0)
        tint(picture, eye * ellipse((387, 211), (5, 6), flip=flip), PUPIL, 1.0)
        tint(
            picture,
            eye * soften(stroke([(368, 203), (404, 202)], [5, 5], flip=flip), 3),
            PUPIL,
            0.3,
        )
        lid = [(366, 213), (372, 205), (386, 199.5), (398, 203), (404, 212)]
        tint(picture, stroke(lid, [1.6, 2.4, 2.8, 2.4, 1.6], flip=flip), PUPIL, 0.95)
        brow = [(365, 190), (378, 182), (392, 182), (401, 186)]
        tint(picture, stroke(brow, [1.6, 2.8, 3.0, 2.2], flip=flip), HAIR, 0.95)
        tint(picture, ellipse((411, 243), (2.4, 1.8), flip=flip), darker(SKIN, 0.62), 0.8)
    # The glints are on the lamp's side in both eyes.
    for x in (383.5, 441.5):
        tint(picture, ellipse((x, 206.5), (2.8, 2.8)), WHITE, 1.0)
    shade(picture, stroke([(420, 206), (424, 228), (423, 240)], [2, 3, 5]), blur=4, strength=0.16)
    tint(picture, soften(ellipse((414, 232), (4, 6)), 3), WHITE, 0.35)
    draw_mouth(picture)


def draw_mouth(picture: Array) -> None:
    """Paints an open smile."""
    mouth = [(396, 256), (406, 259), (416, 260), (426, 259), (436, 256), (430, 268), (416, 274)]
    inside = polygon([*mouth, (402, 268)])
    tint(picture, inside, (122, 44, 52), 1.0)
    tint(picture, inside * ellipse((416, 258), (17, 5.5)), WHITE, 1.0)
    tint(picture, inside * ellipse((416, 275), (11, 6)), (226, 112, 112), 1.0)
    line = stroke([(393, 254), (404, 259), (416, 260.5), (428, 259), (439, 254)], [1.4] * 5)
    tint(picture, line, LIPS, 0.9)


def draw_fringe(picture: Array) -> None:
    """Paints the hair in front: a parted fringe, side locks and two buns."""
    for flip in (False, True):
        bun = ellipse((352, 100), (36, 34), flip=flip)
        paint(picture, bun, HAIR, puff=30, gloss=0.30)
    shade(picture, polygon(mirrored([(416, 140), (470, 160), (482, 200), (476, 172)])), 5, 0.10)
    for flip in (False, True):
        lock = [(352, 150), (364, 172), (362, 214), (358, 256), (350, 286), (334, 292), (328, 250)]
        paint(picture, polygon([*lock, (328, 190)], flip=flip), HAIR, puff=18, gloss=0.22)
    left = [(432, 96), (400, 84), (360, 98), (334, 140), (328, 196), (352, 184), (384, 166)]
    right = [(424, 96), (452, 86), (484, 106), (502, 146), (504, 196), (482, 182), (456, 164)]
    paint(picture, polygon([*right, (436, 136)]), HAIR, puff=34, gloss=0.30)
    paint(picture, polygon([*left, (414, 144), (434, 120)]), HAIR, puff=34, gloss=0.30)
    strands = [[(424, 104), (392, 122), (352, 158)], [(418, 96), (380, 104), (346, 136)]]
    strands += [[(440, 104), (466, 124), (490, 158)], [(446, 96), (476, 114), (496, 146)]]
    for points in strands:
        fold(picture, points, strength=0.22)


def paint(
    picture: Array, mask: Array, color: Color, *, puff: float, rim: float = 1.0, gloss: float = 0.06
) -> None:
    """Paints an inflated shape.

    Args:
        picture: [H, W, 4], changed in place.
        mask: [H, W], 0 to 1.
        color: of the surface in plain light.
        puff: how far from its outline the surface is round, pixels.
        rim: how much the outline is darkened.
        gloss: strength of the highlight.
    """
    left, top, width, height = cv2.boundingRect((mask > 0).astype(np.uint8))
    part = (slice(max(top - 4, 0), top + height + 4), slice(max(left - 4, 0), left + width + 4))
    area = mask[part]
    normal = inflate(area, puff * SCALE)
    facing = np.clip(normal @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
    light = 0.62 + 0.54 * facing
    edge = 1 - normal[..., 2]
    light -= 0.30 * rim * edge * edge
    base = np.array(color, np.float32) * light[..., None]
    # Shadows turn a little towards violet, which looks warmer than black.
    base += np.array([10, 2, 14], np.float32) * np.clip(1 - light, 0, 1)[..., None]
    base += 255 * gloss * (facing**24)[..., None]
    blend(picture[part], area, np.clip(base, 0, 255))


def inflate(mask: Array, puff: float) -> Array:
    """Returns unit normals [H, W, 3] of the rounded shape."""
    distance = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    rise = np.clip(distance / puff, 0, 1)
    height = puff * np.sqrt(np.clip(1 - (1 - rise) ** 2, 0, 1))
    # Smoothing hides the ridges where two outlines are equally near.
    height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), max(puff * 0.22, 1.0))
    across = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3) / 8
    down = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3) / 8
    normal = np.dstack([-across, -down, np.ones_like(height)])
    return np.asarray(normal / np.linalg.norm(normal, axis=2, keepdims=True), np.float32)


def shade(picture: Array, mask: Array, blur: float, strength: float) -> None:
    """Darkens the figure softly under a mask; the backdrop stays as it is."""
    picture[..., :3] *= 1 - (strength * soften(mask, blur) * picture[..., 3])[..., None]


def fold(
    picture: Array, points: Sequence[Point], *, flip: bool = False, strength: float = 0.16
) -> None:
    """Paints a crease in cloth or hair: a thin soft shadow that fades at both ends."""
    shade(picture, stroke(points, [1.0, 3.0, 1.0], flip=flip), 2.2, strength)


def tint(picture: Array, mask: Array, color: Color, strength: float) -> None:
    """Paints a flat shape without shading."""
    blend(picture, mask * strength, np.array(color, np.float32))


def blend(picture: Array, mask: Array, color: Array) -> None:
    """Lays colour over the picture in place where the mask is 1, and counts it as figure."""
    picture[..., :3] += mask[..., None] * (color - picture[..., :3])
    np.maximum(picture[..., 3], mask, out=picture[..., 3])


def polygon(points: Sequence[Point], *, flip: bool = False, smooth: bool = True) -> Array:
    """Returns the mask of a closed outline, rounded through its points if `smooth`."""
    outline = np.array(points, np.float64)
    if smooth:
        outline = spline(outline, closed=True)
    return _fill(outline, flip)


def ellipse(centre: Point, axes: Point, *, flip: bool = False) -> Array:
    """Returns the mask of an upright ellipse with half axes `axes`."""
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    outline = np.stack([np.cos(angle), np.sin(angle)], axis=1) * axes + centre
    return _fill(outline, flip)


def stroke(points: Sequence[Point], radii: Sequence[float], *, flip: bool = False) -> Array:
    """Returns the mask of a round brush drawn through the points, its radius changing along."""
    path = spline(np.column_stack([np.array(points, np.float64), radii]), closed=False)
    along = np.gradient(path[:, :2], axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    side = np.stack([-along[:, 1], along[:, 0]], axis=1) * path[:, 2:]
    mask = _fill(np.concatenate([path[:, :2] + side, (path[:, :2] - side)[::-1]]), flip)
    for x, y, radius in path[[0, -1]]:
        mask = np.maximum(mask, ellipse((x, y), (radius, radius), flip=flip))
    return mask


def band(
    centre: Point, along: Point, half_width: float, half_length: float, *, flip: bool = False
) -> Array:
    """Returns the mask of a strip round a limb that runs in the direction `along`."""
    forward = np.array(along) / np.hypot(*along)
    side = np.array([-forward[1], forward[0]])
    # Four corners and four bulging edges; the spline rounds them.
    shares = [(-1, -1), (0, -1.06), (1, -1), (1.06, 0), (1, 1), (0, 1.06), (-1, 1), (-1.06, 0)]
    corners = [centre + side * half_width * a + forward * half_length * b for a, b in shares]
    return _fill(spline(np.array(corners), closed=True), flip)


def spline(points: npt.NDArray[np.float64], *, closed: bool) -> npt.NDArray[np.float64]:
    """Returns a dense Catmull-Rom curve through the points [N, C]."""
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.linspace(0, 1, 24, endpoint=False)[:, None]
    pieces: list[npt.NDArray[Any]] = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        cubic = (3 * b - a - 3 * c + d) * t**3 + (2 * a - 5 * b + 4 * c - d) * t**2
        pieces.append(0.5 * (cubic + (c - a) * t + 2 * b))
    curve = np.concatenate(pieces)
    return curve if closed else np.concatenate([curve, points[-1:]])


def mirrored(points: Sequence[Point]) -> list[Point]:
    """Returns the outline with its mirror image, from a half that starts and ends on the axis."""
    return [*points, *((2 * AXIS - x, y) for x, y in reversed(points[1:-1]))]


def soften(mask: Array, blur: float) -> Array:
    """Returns the mask blurred by that many pixels."""
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), blur * SCALE), np.float32)


def darker(color: Color, share: float) -> Color:
    """Returns the colour multiplied by `share`."""
    red, green, blue = (int(channel * share) for channel in color)
    return red, green, blue


def _fill(outline: npt.NDArray[np.float64], flip: bool) -> Array:
    """Returns the anti-aliased mask of a closed outline in picture coordinates."""
    if flip:
        outline = outline * [-1, 1] + [2 * AXIS, 0]
    mask = np.zeros((HEIGHT * SCALE, WIDTH * SCALE), np.uint8)
    # OpenCV takes sixteenths of a pixel here, measured from the centre of the first pixel.
    fixed = np.round((outline * SCALE - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask, [fixed], 255, lineType=cv2.LINE_AA, shift=4)
    return np.asarray(mask, np.float32) / np.float32(255)


if __name__ == "__main__":
    main(sys.argv[1:])
