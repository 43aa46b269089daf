"""Bodies drawn as lit 3-D capsules: analytic ray-capsule intersection in pure PyTorch.

The references trace rays step by step through a distance field (taichi). A ray's first hit on the
union of capsules is the smallest first hit on any one of them, so the closed form gives the same
picture without steps: the outline agrees to a pixel, and the shading is less noisy because the
normals are exact. Only pixel-capsule pairs inside each capsule's projected box are looked at;
every pixel is decided alone, so how the work is cut never changes a picture.

Shape letters: F frames, P persons, S capsules of a frame (13 P), N pixel-capsule pairs. Lengths
are millimetres in camera space (x right, y down, z forward).

Source: rookiestar28/ComfyUI-SCAIL-Pose2: render_3d/taichi_cylinder.py, NLFPoseExtract/nlf_render.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xicon_infer.errors import PoseError
from xicon_infer.pose.skeleton import LIMBS, PALETTES, SMPL_JOINTS, SMPL_OF_OPENPOSE, Palette
from xicon_infer.types import Float32Array, UInt8Array

Joints = npt.NDArray[np.floating[Any]] | Sequence[npt.NDArray[np.floating[Any]]]

RADIUS_MM = 21.5
ALPHA = 0.8
# Pixel-capsule pairs in memory at once, about 100 bytes each.
_PAIRS_PER_PASS = 2_000_000
# Limbs share the spheres at their joints; hits closer than this are one surface, and the capsule
# with the lower index is seen.
_TIE_MM = 1e-3
# Distances the reference's camera can see: never less than ten metres, never more than 25.
_FAR_MM = (10_000.0, 25_000.0)
# How far behind the deepest joint the picture fades to black, and where fading always ends.
_FADE_MM, _FADE_END_MM, _NEAR_MM = 6_000.0, 20_000.0, 0.1


class Capsules(NamedTuple):
    """start and end float32 [F, S, 3]; present bool [F, S]; color float64 [S, 4], 0 to 1."""

    start: Float32Array
    end: Float32Array
    present: npt.NDArray[np.bool_]
    color: npt.NDArray[np.float64]


class _Scene(NamedTuple):
    """The capsules on the device, ready for rays.

    centre, axis (unit) and half (length) [F S, 3 | 3 | 1]; color [S, 4]; boxes [F, S, 4] pixels
    x0 y0 x1 y1, ends excluded; lens fx fy cx cy; depths (zmin, zmax).
    """

    centre: Tensor
    axis: Tensor
    half: Tensor
    color: Tensor
    boxes: npt.NDArray[np.int64]
    lens: tuple[float, float, float, float]
    depths: tuple[float, float]


def build_capsules(joints: Joints, palettes: Sequence[Palette] = ("single",)) -> Capsules:
    """Returns the capsules of every frame, 13 per person slot in the order of `LIMBS`.

    A limb is left out if the component sum of either end is exactly zero, and all limbs of a
    person whose absolute sum is below 0.01 mm.

    Args:
        joints: [F, P, 24, 3], or one [P, 24, 3] per frame with any P (also none), millimetres.
        palettes: the palette of each person slot; repeated if there are more persons.

    Raises:
        PoseError: if an array has another shape.
    """
    padded = _pad_persons(joints)
    frames, persons = padded.shape[:2]
    slots = padded[:, :, SMPL_OF_OPENPOSE]
    # Written out because the order of a float32 sum decides whether it is exactly zero.
    sums = slots[..., 0] + slots[..., 1] + slots[..., 2]
    person = np.abs(padded).sum(axis=(2, 3)) >= 0.01
    first, last = np.array(LIMBS).T
    present = (sums[:, :, first] != 0) & (sums[:, :, last] != 0) & person[:, :, None]
    colors = [
        [*(channel / 300 + 0.15 for channel in rgb), ALPHA]
        for slot in range(persons)
        for rgb in PALETTES[palettes[slot % len(palettes)]]
    ]
    return Capsules(
        slots[:, :, first].reshape(frames, persons * len(LIMBS), 3),
        slots[:, :, last].reshape(frames, persons * len(LIMBS), 3),
        present.reshape(frames, persons * len(LIMBS)),
        np.array(colors, np.float64).reshape(-1, 4),
    )


def depth_range(joints: Joints) -> tuple[float, float] | None:
    """Returns the smallest and largest depth of any drawn limb end, mm; None if nothing is drawn.

    It sets how the picture darkens with distance, so take it over the whole video even where the
    video is drawn piece by piece.
    """
    capsules = build_capsules(joints)
    depths = np.stack([capsules.start[..., 2], capsules.end[..., 2]])[:, capsules.present]
    return (float(depths.min()), float(depths.max())) if depths.size else None


def render_bodies(
    joints: Joints,
    intrinsics: npt.NDArray[np.floating[Any]],
    *,
    height: int,
    width: int,
    palettes: Sequence[Palette] = ("single",),
    depths: tuple[float, float] | None = None,
    chunk: int = 16,
    device: torch.device | str = "cpu",
) -> UInt8Array:
    """Returns the bodies as lit capsules on black.

    Args:
        joints: [F, P, 24, 3], or one [P, 24, 3] per frame with any P (also none), SMPL order,
            millimetres; a person of zeros is missing.
        intrinsics: [3, 3], pinhole, pixels of the picture to draw.
        height: H, pixels.
        width: W, pixels.
        palettes: the palette of each person slot; repeated if there are more persons.
        depths: (zmin, zmax) of the whole video, mm; taken from `joints` if None.
        chunk: frames on the device at once; the result does not depend on it.
        device: where to compute.

    Returns:
        uint8 [F, H, W, 4], RGB and the outline (204 where a body is, 0 elsewhere).

    Raises:
        PoseError: if a joint array has another shape.

    Source: rookiestar28/ComfyUI-SCAIL-Pose2: render_3d/taichi_cylinder.py (render_whole).
    """
    capsules = build_capsules(joints, palettes)
    frames = len(capsules.start)
    picture = np.zeros((frames, height, width, 4), np.uint8)
    depths = depths or depth_range(joints)
    if depths is None:
        return picture
    lens = tuple(float(intrinsics[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
    boxes = _screen_boxes(capsules, lens, (height, width))
    for first in range(0, frames, chunk):
        part = slice(first, first + chunk)
        scene = _to_scene(capsules, boxes, part, lens, depths, device)
        picture[part] = _draw(scene, height, width).cpu().numpy()
    return picture


def _pad_persons(joints: Joints) -> Float32Array:
    """Returns float32 [F, P, 24, 3], missing persons as zeros, P the largest number in a frame."""
    people = [np.asarray(frame, np.float32) for frame in joints]
    for index, frame in enumerate(people):
        if frame.ndim != 3 or frame.shape[1:] != (SMPL_JOINTS, 3):
            raise PoseError(
                f"joints of frame {index} have the shape {list(frame.shape)}; "
                f"[persons, {SMPL_JOINTS}, 3] is needed.",
                field="joints",
                code="TRACK_INVALID",
            )
    persons = max((len(frame) for frame in people), default=0)
    padded = np.zeros((len(people), persons, SMPL_JOINTS, 3), np.float32)
    for index, frame in enumerate(people):
        # A joint that is not finite becomes zero, and a limb that ends at zero is left out.
        finite = np.isfinite(frame).all(axis=2, keepdims=True)
        padded[index, : len(frame)] = np.where(finite, frame, 0)
    return padded


def _screen_boxes(
    capsules: Capsules, lens: Sequence[float], size: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Returns int64 [F, S, 4], the pixels x0 y0 x1 y1 (ends excluded) a capsule can touch.

    A capsule in front of the camera is the hull of its two end spheres, and so is its image. One
    that reaches the camera's plane may be seen anywhere.
    """
    fx, fy, cx, cy = lens
    height, width = size
    ends = np.stack([capsules.start, capsules.end], axis=-2).astype(np.float64)
    x_low, x_high = _sphere_span(ends[..., 0], ends[..., 2])
    y_low, y_high = _sphere_span(ends[..., 1], ends[..., 2])
    # One pixel of margin covers the rounding of the float32 rays.
    edges = np.stack(
        [
            np.floor(x_low.min(-1) * fx + cx) - 1,
            np.floor(y_low.min(-1) * fy + cy) - 1,
            np.ceil(x_high.max(-1) * fx + cx) + 2,
            np.ceil(y_high.max(-1) * fy + cy) + 2,
        ],
        axis=-1,
    )
    boxes = np.clip(edges, 0, [width, height, width, height]).astype(np.int64)
    return np.where(capsules.present[..., None], boxes, 0)


def _sphere_span(
    offset: npt.NDArray[np.float64], depth: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns the lowest and highest slope at which a sphere is seen along one axis."""
    squared = depth * depth - RADIUS_MM * RADIUS_MM
    wide = (depth <= RADIUS_MM) | (squared < 1e-6)
    safe = np.where(wide, 1.0, squared)
    root = RADIUS_MM * np.sqrt(np.where(wide, 0.0, offset * offset + safe))
    low = np.where(wide, -np.inf, (offset * depth - root) / safe)
    high = np.where(wide, np.inf, (offset * depth + root) / safe)
    return low, high


def _to_scene(
    capsules: Capsules,
    boxes: npt.NDArray[np.int64],
    part: slice,
    lens: Sequence[float],
    depths: tuple[float, float],
    device: torch.device | str,
) -> _Scene:
    start = torch.from_numpy(capsules.start[part]).to(device).reshape(-1, 3)
    end = torch.from_numpy(capsules.end[part]).to(device).reshape(-1, 3)
    half = (end - start).norm(dim=1, keepdim=True) / 2
    axis = (end - start) / (2 * half).clamp_min(1e-8)
    color = torch.from_numpy(capsules.color).float().to(device)
    fx, fy, cx, cy = lens
    return _Scene((start + end) / 2, axis, half, color, boxes[part], (fx, fy, cx, cy), depths)


def _draw(scene: _Scene, height: int, width: int) -> Tensor:
    """Returns uint8 [F, H, W, 4], cutting frames and then rows until the pairs fit in memory."""
    frames = len(scene.boxes)
    out = torch.zeros(frames, height, width, 4, dtype=torch.uint8, device=scene.centre.device)
    pending = [(0, frames, 0, height)]
    while pending:
        first, last, top, bottom = pending.pop()
        boxes = scene.boxes[first:last].copy()
        boxes[..., 1::2] = boxes[..., 1::2].clip(top, bottom)
        pairs = int(((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sum())
        if pairs > _PAIRS_PER_PASS and last - first > 1:
            middle = (first + last) // 2
            pending += [(first, middle, top, bottom), (middle, last, top, bottom)]
        elif pairs > _PAIRS_PER_PASS and bottom - top > 1:
            middle = (top + bottom) // 2
            pending += [(first, last, top, middle), (first, last, middle, bottom)]
        elif pairs:
            _draw_pass(scene, boxes, first, out[first:last])
    return out


def _draw_pass(scene: _Scene, boxes: npt.NDArray[np.int64], first: int, out: Tensor) -> None:
    """Draws into `out`, the frames from `first` on, what lies inside `boxes` [frames, S, 4]."""
    height, width = out.shape[1:3]
    capsule, row, column = _pairs(boxes, first, out.device)
    ray = _rays(row, column, scene.lens)
    depth, s, o = _intersect(scene, capsule, ray)
    limbs = scene.boxes.shape[1]
    # Winner of each pixel: the nearest hit; among hits as near as that, the lowest capsule.
    pixel = ((capsule // limbs - first) * height + row) * width + column
    nearest = depth.new_full((out.numel() // 4,), torch.inf).scatter_reduce(0, pixel, depth, "amin")
    contender = depth <= nearest[pixel] + _TIE_MM
    contender &= depth.isfinite()
    pixel, capsule = pixel[contender], capsule[contender]
    lowest = capsule.new_full((out.numel() // 4,), scene.half.shape[0]).scatter_reduce(
        0, pixel, capsule, "amin"
    )
    won = lowest[pixel] == capsule
    pixel, capsule = pixel[won], capsule[won]
    kept = contender.nonzero()[:, 0][won]
    rgba = _shade(scene, capsule, ray[kept], depth[kept], o[kept] + s[kept, None] * ray[kept])
    out.view(-1, 4)[pixel] = (rgba.clamp(0, 1) * 255).to(torch.uint8)


def _pairs(
    boxes: npt.NDArray[np.int64], first: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns capsule (counted over frames), row and column of every pair, int64 [N] each."""
    flat = torch.from_numpy(boxes.reshape(-1, 4)).to(device)
    widths = flat[:, 2] - flat[:, 0]
    counts = widths * (flat[:, 3] - flat[:, 1])
    box = torch.repeat_interleave(torch.arange(len(flat), device=device), counts)
    within = torch.arange(len(box), device=device) - (counts.cumsum(0) - counts)[box]
    row = flat[box, 1] + within // widths[box]
    column = flat[box, 0] + within % widths[box]
    return box + first * boxes.shape[1], row, column


def _rays(row: Tensor, column: Tensor, lens: tuple[float, float, float, float]) -> Tensor:
    """Returns unit directions float32 [N, 3]; whole pixel coordinates, as in the reference."""
    fx, fy, cx, cy = lens
    x, y = (column.float() - cx) / fx, (row.float() - cy) / fy
    ray = torch.stack([x, y, torch.ones_like(x)], dim=1)
    return ray / ray.norm(dim=1, keepdim=True)


def _intersect(scene: _Scene, capsule: Tensor, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first hit of each ray on its capsule.

    Everything is relative to the capsule's centre: at three metres float32 resolves only 2e-4 mm,
    which the difference of large squares would lose.

    Returns:
        depth [N] along the ray from the camera (inf: no hit), s [N] along the ray from the point
        o [N, 3] nearest to the centre.
    """
    centre, axis, half = scene.centre[capsule], scene.axis[capsule], scene.half[capsule, 0]
    t0 = (ray * centre).sum(1)
    o = t0[:, None] * ray - centre
    da, oa = (ray * axis).sum(1), (o * axis).sum(1)
    dp, op = ray - da[:, None] * axis, o - oa[:, None] * axis
    a, b = (dp * dp).sum(1), (op * dp).sum(1)
    root = b * b - a * ((op * op).sum(1) - RADIUS_MM**2)
    side = (-b - root.clamp_min(0).sqrt()) / a.clamp_min(1e-12)
    side_hit = (root >= 0) & (a > 1e-12) & ((oa + side * da).abs() < half)
    s = torch.where(side_hit, side, torch.inf)
    for end in (-half, half):
        oc = o - end[:, None] * axis
        along = (oc * ray).sum(1)
        across = oc - along[:, None] * ray
        root = RADIUS_MM**2 - (across * across).sum(1)
        cap = -along - root.clamp_min(0).sqrt()
        s = torch.where(root >= 0, torch.minimum(s, cap), s)
    depth = t0 + s
    far = max(min(scene.depths[1], _FAR_MM[1]), _FAR_MM[0])
    # Differs from the reference, which compares the length of the ray: it lost the limbs of a
    # small figure at the side of the picture, whose rays are longer than its depth.
    return torch.where((depth > 0) & (depth * ray[:, 2] <= far), depth, torch.inf), s, o


def _shade(scene: _Scene, capsule: Tensor, ray: Tensor, depth: Tensor, hit: Tensor) -> Tensor:
    """Returns RGBA float32 [N, 4] of surface points `hit` [N, 3] given from the capsule centre.

    One white light at the camera, Blinn-Phong, fading with depth.
    """
    axis, half = scene.axis[capsule], scene.half[capsule]
    along = (hit * axis).sum(1, keepdim=True).clamp(min=-half, max=half)
    normal = torch.nn.functional.normalize(hit - along * axis, dim=1)
    diffuse = (-normal[:, 2]).clamp_min(0)
    middle = torch.nn.functional.normalize(-ray - ray.new_tensor([0.0, 0.0, 1.0]), dim=1)
    specular = (normal * middle).sum(1).clamp_min(0) ** 32
    near = max(scene.depths[0], _NEAR_MM)
    end = min(scene.depths[1] + _FADE_MM, _FADE_END_MM)
    fade = (1 - (depth * ray[:, 2] - near) / (end - _NEAR_MM)).clamp(0, 1)
    color = scene.color[capsule % len(scene.color)]
    lit = color[:, :3] * ((0.3 + 0.7 * diffuse) * fade)[:, None]
    lit = lit + (0.5 * specular * fade)[:, None]
    return torch.cat([lit, color[:, 3:]], dim=1)
