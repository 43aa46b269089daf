"""SteadyDancer's alignment: every bone of the driver gets the reference's length.

Ten ratios of lengths, reference to one anchor frame of the driver, are measured once. In every
frame each limb is then scaled about its parent joint, and the whole person is shifted so that the
anchor's neck falls on the reference's. Directions of limbs and the walk of the neck stay those of
the driver.

Lengths are measured in heights of the picture: y as a share of it, x as that share times W / H.

mode "official" does as the authors' program: hidden joints count, a zero-length bone makes its
limb vanish to the corner, hidden points move with the shift, and a face keeps its size and stays
behind when the head moves. The default, "robust", differs:
a ratio counts only where both ends of its bone are visible in both pictures; what is missing is
taken from the other side of the body, else from the mean of all measured ratios; every ratio is
kept within 0.2 to 5; hidden points stay hidden; the face follows the nose. Where everything is
visible body and hands of the two agree.

Shape letters: F frames.

Source: MCG-NJU/SteadyDancer: preprocess/pose_align.py; specification steady_dancer 4.3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.camera import fit_affine, map_points
from xicon_infer.pose.dancer_points import HIDDEN, BoolArray, hidden_points
from xicon_infer.pose.keypoints import Figure, Float64Array

DancerMode = Literal["robust", "official"]
MODES: tuple[DancerMode, ...] = ("robust", "official")

DancerFit = Literal["crop", "pad", "stretch"]
FITS: tuple[DancerFit, ...] = ("crop", "pad", "stretch")

MIN_RATIO, MAX_RATIO = 0.2, 5.0
"""Beyond these a ratio comes from a bone that points at the camera, not from proportions."""

# Below this share of the picture's height a bone has no length to compare.
_MIN_LENGTH = 1e-4
_NOSE, _NECK, _MID_HIP = 0, 1, 18

# Name of a ratio -> its sides; a side is the bones whose lengths are added. Joint 18 is the middle
# of the hips.
_SIDES: dict[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "neck": (((0, 1),),),
    "face_left": (((16, 14), (14, 0)),),
    "face_right": (((17, 15), (15, 0)),),
    "shoulder": (((2, 5),),),
    "arm_upper": (((2, 3),), ((5, 6),)),
    "arm_lower": (((3, 4),), ((6, 7),)),
    "body_len": (((1, _MID_HIP),),),
    "leg_upper": (((8, 9),), ((11, 12),)),
    "leg_lower": (((9, 10),), ((12, 13),)),
}
_OTHER_SIDE = {"face_left": "face_right", "face_right": "face_left"}
SCALE_NAMES: tuple[str, ...] = (
    "neck",
    "face_left",
    "face_right",
    "shoulder",
    "arm_upper",
    "arm_lower",
    "hand",
    "body_len",
    "leg_upper",
    "leg_lower",
)
"""The ten ratios; "hand" is the mean of both parts of the arm."""

# (joint, parent, ratio), parents first. The joint's bone starts at the parent.
_CHAIN: tuple[tuple[int, int, str], ...] = (
    (0, 1, "neck"),
    (14, 0, "face_left"),
    (16, 0, "face_left"),
    (15, 0, "face_right"),
    (17, 0, "face_right"),
    (2, 1, "shoulder"),
    (3, 2, "arm_upper"),
    (4, 3, "arm_lower"),
    (5, 1, "shoulder"),
    (6, 5, "arm_upper"),
    (7, 6, "arm_lower"),
    (8, 1, "body_len"),
    (9, 8, "leg_upper"),
    (10, 9, "leg_lower"),
    (11, 1, "body_len"),
    (12, 11, "leg_upper"),
    (13, 12, "leg_lower"),
)
# Row of the hands -> the wrist it hangs on: left, right.
_WRISTS = (7, 4)


@dataclass(frozen=True)
class DancerAlignment:
    """How a driver is fitted to a reference.

    scales: the ten ratios by `SCALE_NAMES`. offset: x, y, heights of the picture, added at the
    end. driving_ratio, canvas_ratio: W / H of the driving frames and of the picture to draw.
    replaced: ratio -> why it was not taken as measured; always empty in mode "official".
    """

    scales: dict[str, float]
    offset: tuple[float, float]
    driving_ratio: float
    canvas_ratio: float
    mode: DancerMode = "robust"
    replaced: dict[str, str] = field(default_factory=dict)


def measure(
    reference: Figure,
    anchor: Figure,
    *,
    driving_ratio: float,
    canvas_ratio: float,
    mode: DancerMode = "robust",
) -> DancerAlignment:
    """Returns how the person of the anchor frame becomes the person of the reference.

    Args:
        reference: the character; the first frame counts, normalised by its picture.
        anchor: one driving frame likewise.
        driving_ratio: W / H of the driving frames.
        canvas_ratio: W / H of the picture to draw, which shows the whole reference.
        mode: see the module.

    Raises:
        InvalidRequest: if `mode` is another word.
        PoseError: in mode "robust", if no bone is visible in both pictures.
    """
    if mode not in MODES:
        raise InvalidRequest(f"mode is {mode!r}; allowed: {', '.join(MODES)}.", field="mode")
    theirs = _in_heights(reference.body[0], canvas_ratio)
    ours = _in_heights(anchor.body[0], driving_ratio)
    x, y = (theirs[_NECK] - ours[_NECK]).tolist()
    replaced: dict[str, str] = {}
    if mode == "official":
        scales = _official_scales(theirs, ours)
    else:
        seen = reference.body_visible[0] & anchor.body_visible[0]
        seen = np.append(seen, seen[8] and seen[11])
        scales, replaced = _robust_scales(theirs, ours, seen)
    return DancerAlignment(scales, (x, y), driving_ratio, canvas_ratio, mode, replaced)


def apply_alignment(figure: Figure, alignment: DancerAlignment) -> Figure:
    """Returns every frame of a figure fitted to the reference, normalised by the canvas.

    Args:
        figure: F frames, normalised by the driving frames.
        alignment: from `measure`.
    """
    wide = np.array([alignment.driving_ratio, 1.0])
    body, hands = figure.body * wide, figure.hands * wide
    moved = body.copy()
    for joint, parent, name in _CHAIN:
        bone = body[:, joint] - body[:, parent]
        moved[:, joint] = moved[:, parent] + _usable(alignment.scales[name]) * bone
    moved_hands = hands.copy()
    for side, wrist in enumerate(_WRISTS):
        from_wrist = hands[:, side] - body[:, wrist, None]
        scaled = _usable(alignment.scales["hand"]) * from_wrist
        moved_hands[:, side] = moved[:, wrist, None] + scaled
    face = figure.face * wide
    if alignment.mode == "robust":
        grown = (alignment.scales["face_left"] + alignment.scales["face_right"]) / 2
        face = moved[:, _NOSE, None] + grown * (face - body[:, _NOSE, None])
    return replace(
        figure,
        body=_placed(moved, figure.body, alignment),
        hands=_placed(moved_hands, figure.hands, alignment),
        face=_placed(face, figure.face, alignment),
    )


def lay_on_canvas(
    figure: Figure, source: tuple[int, int], canvas: tuple[int, int], fit: DancerFit
) -> Figure:
    """Returns a figure that is not aligned, normalised by the canvas; hidden points stay hidden.

    Args:
        figure: F frames, normalised by the driving frames.
        source: (H, W) of the driving frames.
        canvas: (H, W) of the picture to draw.
        fit: how a frame lies on it: "crop" covers it, "pad" leaves bars, "stretch" distorts.
    """
    if fit == "stretch":
        return figure
    affine = fit_affine(source, canvas, fit)

    def laid(points: Float64Array) -> Float64Array:
        shares = map_points(points * np.array(source[::-1]), affine) / np.array(canvas[::-1])
        return np.where(hidden_points(points)[..., None], HIDDEN, shares)

    return replace(figure, body=laid(figure.body), hands=laid(figure.hands), face=laid(figure.face))


def _placed(moved: Float64Array, before: Float64Array, alignment: DancerAlignment) -> Float64Array:
    """Returns points in heights, shifted and as shares of the canvas; hidden ones as the mode."""
    narrow = np.array([alignment.canvas_ratio, 1.0])
    if alignment.mode == "official":
        # The authors put the sentinel back by coordinate, turn what is no number into it, and
        # shift it like everything else.
        moved = np.where((before == HIDDEN) | np.isnan(moved), HIDDEN, moved)
        return (moved + alignment.offset) / narrow
    placed = (moved + alignment.offset) / narrow
    return np.where(hidden_points(before)[..., None], HIDDEN, placed)


def _official_scales(theirs: Float64Array, ours: Float64Array) -> dict[str, float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        scales = {
            name: float(np.mean([_length(theirs, side) / _length(ours, side) for side in sides]))
            for name, sides in _SIDES.items()
        }
    scales["hand"] = (scales["arm_upper"] + scales["arm_lower"]) / 2
    # 0 / 0 becomes 1; infinity stays, because the authors' repair does not reach their table.
    return {name: 1.0 if np.isnan(scales[name]) else scales[name] for name in SCALE_NAMES}


def _robust_scales(
    theirs: Float64Array, ours: Float64Array, seen: BoolArray
) -> tuple[dict[str, float], dict[str, str]]:
    measured: dict[str, float] = {}
    replaced: dict[str, str] = {}
    for name, sides in _SIDES.items():
        ratios = [_ratio(theirs, ours, side) for side in sides if _all_seen(side, seen)]
        valid = [ratio for ratio in ratios if ratio is not None]
        if not valid:
            continue
        kept = [min(max(ratio, MIN_RATIO), MAX_RATIO) for ratio in valid]
        measured[name] = float(np.mean(kept))
        if kept != valid:
            worst = max(valid, key=lambda ratio: abs(np.log(ratio)))
            replaced[name] = f"was {worst:.3g}; kept within {MIN_RATIO:g} to {MAX_RATIO:g}"
        elif len(valid) < len(sides):
            replaced[name] = "measured on one side of the body alone"
    if not measured:
        raise PoseError(
            "the reference and the anchor frame of the driving video show no bone of the body in "
            "common; choose another anchor frame or reference picture that shows the same part of "
            "the body, or do not align.",
            field="image",
            code="NOTHING_TO_ALIGN",
        )
    mean = float(np.mean(list(measured.values())))
    scales = dict(measured)
    for name in _SIDES.keys() - measured.keys():
        other = _OTHER_SIDE.get(name, "")
        scales[name] = measured.get(other, mean)
        source = f"from {other}" if other in measured else "the mean of those measured"
        replaced[name] = f"not visible in both pictures; {source}"
    scales["hand"] = (scales["arm_upper"] + scales["arm_lower"]) / 2
    return {name: scales[name] for name in SCALE_NAMES}, dict(sorted(replaced.items()))


def _ratio(
    theirs: Float64Array, ours: Float64Array, side: tuple[tuple[int, int], ...]
) -> float | None:
    """Returns reference to driver, or None where one of them has no length."""
    lengths = _length(theirs, side), _length(ours, side)
    # Written this way round, the comparison is false for values that are no numbers.
    usable = all(_MIN_LENGTH < length < np.inf for length in lengths)
    return float(lengths[0] / lengths[1]) if usable else None


def _length(points: Float64Array, side: tuple[tuple[int, int], ...]) -> np.float64:
    return np.float64(sum(np.linalg.norm(points[a] - points[b]) for a, b in side))


def _all_seen(side: tuple[tuple[int, int], ...], seen: BoolArray) -> bool:
    return all(seen[a] and seen[b] for a, b in side)


def _in_heights(body: Float64Array, ratio: float) -> Float64Array:
    """Returns joints [19, 2] in heights of the picture; the last is the middle of the hips."""
    points = body * np.array([ratio, 1.0])
    return np.concatenate([points, (points[8:9] + points[11:12]) / 2])


def _usable(scale: float) -> float:
    """Returns the ratio, not a number for an infinite one: times zero it must not become zero."""
    return scale if np.isfinite(scale) else float("nan")
