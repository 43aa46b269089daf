"""The driving motion seen so that the person stands where the reference character stands.

Only the camera changes: one scale, one stretch and one shift for the whole video, solved from the
first frame that shows the person. Bones keep their lengths. The flat figure then follows the moved
projections of the head and the wrists.

Tracks come back in pixels of the canvas, so the affine of `render.py` becomes the identity (or one
half in mode "half") and capsules and overlay stay together. Close gaps with `fill_gaps` before,
because a keypoint moves with its joint and stays where the joint is missing.

Differs from the references unless `guard` is off: a doubtful solution is refused; the size of the
face is measured from points that are visible in both pictures. The reference's limits on m and s
are not repeated here: the bounds of the solver are tighter, or were widened on purpose.

Shape letters: F frames, K keypoints, J joints; lengths in pixels of the canvas or millimetres.

Source: zai-org/SCAIL-Pose: NLFPoseExtract/align3d.py, NLFPoseExtract/process_pose.py;
rookiestar28/ComfyUI-SCAIL-Pose2: nodes.py (RenderNLFPoses); specification 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.align_overlay import face_growth, move_track
from xicon_infer.pose.align_solver import BOUNDS, Bounds, CameraFit, solve_camera
from xicon_infer.pose.camera import (
    CanvasFit,
    Float64Array,
    fit_affine,
    map_intrinsics,
    map_points,
    project,
)
from xicon_infer.pose.keypoints import to_node_figure
from xicon_infer.pose.skeleton import (
    KEYPOINTS,
    OPENPOSE_JOINTS,
    SMPL_OF_OPENPOSE,
)
from xicon_infer.pose.track import check_same_video, drop_unusable
from xicon_infer.types import PoseTrack, Track

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]
AlignVariant = Literal["official", "node"]
Weighting = Literal["central", "down"]
VARIANTS: tuple[AlignVariant, ...] = ("official", "node")

MIN_JOINTS = 4
"""Fewer confident target joints do not fix a scale, a stretch and a shift."""

# OpenPose-18 slots. Wrists and hips are never targets: arms swing, and hips differ most between
# the two networks. The neck always is one.
_NECK = 1
_UPPER = (0, 2, 3, 5, 6)
_LOWER = (9, 10, 12, 13)
# Weight of the neck and of every other joint.
_WEIGHTS: dict[Weighting, tuple[float, float]] = {"central": (8.0, 1.0), "down": (1.0, 4.0)}

_MIN_PERSON_MM = 0.01

# Limits of a believable solution: shift as a share of the picture, distance of a point outside it
# likewise, area of the points' box in pictures, and mean error as a share of the diagonal.
_MAX_SHIFT, _MAX_OUTSIDE, _MAX_AREA, _MAX_ERROR = 0.75, 0.25, 1.5, 0.15


@dataclass(frozen=True)
class AlignOptions:
    """How a driver is fitted to a reference.

    variant: which joints are compared. "official": neck, knees and ankles if all are visible, else
        neck, head, shoulders and elbows. "node": all of these, or the lower ones alone where fewer
        than four of the upper are visible.
    guard: refuse a solution beyond belief, and measure faces only where they are visible.
    scale_hands: hands grow and shrink with the picture.
    bounds: of the solver; `WIDE_BOUNDS` helps a half-length reference with a full-length driver.
    fit, reference_fit: how the driving frames and the reference lie on the canvas.
    several: align more than one person, all by the camera solved for the first. The model authors
        do not align several persons, so False leaves them as they are.

    Raises:
        InvalidRequest: if a value is not allowed.
    """

    variant: AlignVariant = "official"
    guard: bool = True
    scale_hands: bool = True
    bounds: Bounds = BOUNDS
    fit: CanvasFit = "crop"
    reference_fit: CanvasFit = "crop"
    several: bool = False

    def __post_init__(self) -> None:
        """Refuses values that are not allowed; `fit_affine` refuses a wrong fit."""
        if self.variant not in VARIANTS:
            raise InvalidRequest(
                f"variant is {self.variant!r}; allowed: {VARIANTS}.", field="variant"
            )
        for low, high in self.bounds:
            if not 0 < low <= 1 <= high < float("inf"):
                raise InvalidRequest(
                    f"bounds is {tuple(self.bounds)}; each needs 0 < lowest <= 1 <= highest, "
                    "for example ((0.7, 1.4), (0.8, 1.15)).",
                    field="bounds",
                )


@dataclass(frozen=True)
class Alignment:
    """What was done; plain values that go into a report.

    mode: how the joints were weighted, or "skipped": the tracks were only put on the canvas.
    reason: why it was skipped, else empty.
    m, s: scale, and extra stretch in height. p, q: shift in pixels of the canvas.
    face_scale: how much the face and head grew.
    reprojection_error_px: mean distance of the joints from their targets; None if skipped.
    joints: the OpenPose-18 numbers of the joints that were compared.
    frame: the driving frame that was compared; -1 if none was.
    """

    mode: Literal["central", "down", "skipped"]
    reason: str = ""
    m: float = 1.0
    s: float = 1.0
    p: float = 0.0
    q: float = 0.0
    face_scale: float = 1.0
    reprojection_error_px: float | None = None
    joints: tuple[int, ...] = ()
    frame: int = -1


def align_tracks(
    tracks: Sequence[Track],
    reference: PoseTrack,
    *,
    size: tuple[int, int],
    options: AlignOptions | None = None,
) -> tuple[list[Track], Alignment]:
    """Returns the persons as they are to be drawn on the canvas, and what was done to them.

    Args:
        tracks: the persons that will be drawn, of one video; none of them is changed.
        reference: the character, one frame.
        size: (H, W) of the canvas, pixels.
        options: the defaults if None.

    Returns:
        One track per given track, `pose.size` equal to `size`; and the alignment.

    Raises:
        InvalidRequest: if the tracks do not belong together or an option is not allowed.
        PoseError: if the reference is not one frame of 133 points.

    Source: zai-org/SCAIL-Pose: NLFPoseExtract/process_pose.py
    """
    options = options or AlignOptions()
    check_same_video(tracks)
    placed = [to_canvas(drop_unusable(track), size, options.fit) for track in tracks]
    target = _reference_on_canvas(reference, size, options.reference_fit)
    if len(tracks) > 1 and not options.several:
        reason = f"{len(tracks)} persons; set several=True to align all by the first"
        return placed, Alignment("skipped", reason)
    fit, alignment = _solve(placed[0], target, options)
    if fit is None:
        return placed, alignment
    growth = face_growth(placed[0].pose, target, frame=alignment.frame, guard=options.guard)
    moved = [
        move_track(
            track,
            fit,
            face_scale=growth,
            scale_hands=options.scale_hands,
            guard=options.guard,
        )
        for track in placed
    ]
    return moved, replace(alignment, face_scale=growth)


def to_canvas(track: Track, size: tuple[int, int], fit: CanvasFit = "crop") -> Track:
    """Returns the track in pixels of the canvas `size` (H, W), camera included."""
    affine = fit_affine(track.pose.size, size, fit)
    pose = replace(
        track.pose,
        keypoints=map_points(track.pose.keypoints, affine).astype(np.float32),
        bboxes=map_points(track.pose.bboxes.reshape(-1, 2, 2), affine)
        .reshape(-1, 4)
        .astype(np.float32),
        size=size,
    )
    camera = map_intrinsics(track.body.intrinsics, affine).astype(np.float32)
    return replace(track, pose=pose, body=replace(track.body, intrinsics=camera))


def choose_joints(
    visible: BoolArray, present: BoolArray, variant: AlignVariant
) -> tuple[tuple[int, ...], Weighting]:
    """Returns the OpenPose-18 slots to compare, the neck always first, and their weighting.

    Args:
        visible: [18], which 2-D targets are confident.
        present: [18], which 3-D joints there are.
        variant: see `AlignOptions`.

    Source: zai-org/SCAIL-Pose: NLFPoseExtract/process_pose.py ("official");
    rookiestar28/ComfyUI-SCAIL-Pose2: nodes.py ("node").
    """
    valid: BoolArray = np.logical_and(visible, present)
    upper = [slot for slot in _UPPER if valid[slot]]
    lower = [slot for slot in _LOWER if valid[slot]]
    weighting: Weighting = "down" if len(lower) == len(_LOWER) else "central"
    if variant == "node":
        chosen = lower if len(upper) < MIN_JOINTS else lower + upper
    else:
        chosen = lower if weighting == "down" else upper
    return (_NECK, *chosen), weighting


def joint_weights(slots: Sequence[int], weighting: Weighting) -> Float64Array:
    """Returns one weight per slot: the neck's, and that of all others."""
    neck, other = _WEIGHTS[weighting]
    return np.array([neck if slot == _NECK else other for slot in slots])


def openpose_joints(joints: FloatArray) -> Float64Array:
    """Returns SMPL joints [24, 3] in their OpenPose slots, [18, 3]; eyes and ears are zeros."""
    slots = np.zeros((OPENPOSE_JOINTS, 3))
    slots[: len(SMPL_OF_OPENPOSE)] = joints[list(SMPL_OF_OPENPOSE)]
    return slots


def why_refused(fit: CameraFit, points: FloatArray, size: tuple[int, int]) -> str:
    """Returns why a solution is beyond belief, or "" if it is not.

    Args:
        fit: the solution.
        points: [N, 3], the joints it was solved for, millimetres.
        size: (H, W) of the canvas, pixels.

    Source: rookiestar28/ComfyUI-SCAIL-Pose2: nodes.py (head; alignment checks)
    """
    height, width = size
    spots = project(points, fit.intrinsics)
    if not (np.isfinite(fit.intrinsics).all() and np.isfinite(spots).all()):
        return "the solved camera is not finite"
    shift = max(abs(fit.p) / width, abs(fit.q) / height)
    if shift > _MAX_SHIFT:
        return f"the shift is {shift:.2f} of the picture; at most {_MAX_SHIFT} is believed"
    outside = (np.abs(spots / [width, height] - 0.5) - 0.5).max()
    if outside > _MAX_OUTSIDE:
        return (
            f"a joint lands {outside:.2f} of the picture outside it; "
            f"at most {_MAX_OUTSIDE} is believed"
        )
    area = np.ptp(spots, axis=0).prod() / (height * width)
    if area > _MAX_AREA:
        return f"the body fills {area:.2f} pictures; at most {_MAX_AREA} is believed"
    error = fit.error_px / np.hypot(height, width)
    if error > _MAX_ERROR:
        return (
            f"joints miss their targets by {error:.2f} of the diagonal on average; "
            f"at most {_MAX_ERROR} is believed"
        )
    return ""


def _reference_on_canvas(reference: PoseTrack, size: tuple[int, int], fit: CanvasFit) -> PoseTrack:
    """Returns the reference in pixels of the canvas; points that are no numbers get score 0."""
    shapes = (reference.keypoints.shape, reference.scores.shape)
    if shapes != ((1, KEYPOINTS, 2), (1, KEYPOINTS)):
        raise PoseError(
            f"reference has keypoints {list(shapes[0])} and scores {list(shapes[1])}; one frame, "
            f"[1, {KEYPOINTS}, 2] and [1, {KEYPOINTS}], is needed.",
            field="reference",
            code="TRACK_INVALID",
        )
    points = map_points(reference.keypoints, fit_affine(reference.size, size, fit))
    finite = np.isfinite(points).all(axis=2) & np.isfinite(reference.scores)
    return replace(
        reference,
        keypoints=np.where(finite[..., None], points, 0.0).astype(np.float32),
        scores=np.where(finite, reference.scores, np.float32(0)),
        size=size,
    )


def _solve(
    track: Track, target: PoseTrack, options: AlignOptions
) -> tuple[CameraFit | None, Alignment]:
    """Returns the camera for a track on the canvas, None if there is none to be believed."""
    frames = np.flatnonzero(np.abs(track.body.joints).sum(axis=(1, 2)) >= _MIN_PERSON_MM)
    if not frames.size:
        return None, Alignment("skipped", "no person in the driving video")
    frame = int(frames[0])
    points = openpose_joints(track.body.joints[frame])
    figure = to_node_figure(target.keypoints, target.scores)
    # Missing joints are zeros. The references ask whether the three components sum to zero.
    present = points[:, 2] > 0
    visible = figure.body_visible[0]
    slots, weighting = choose_joints(visible, present, options.variant)
    used = tuple(slot for slot in slots if present[slot])
    confident = int(visible[list(used)].sum())
    needed = MIN_JOINTS if options.guard else 1
    if confident < needed:
        reason = (
            f"the reference shows {confident} joints that the driver has too; {needed} are needed"
        )
        return None, Alignment("skipped", reason, joints=used, frame=frame)
    chosen = list(used)
    fit = solve_camera(
        points[chosen],
        figure.body[0, chosen],
        joint_weights(used, weighting),
        intrinsics=track.body.intrinsics,
        size=track.pose.size,
        bounds=options.bounds,
    )
    reason = why_refused(fit, points[chosen], track.pose.size) if options.guard else ""
    if reason:
        return None, Alignment("skipped", reason, joints=used, frame=frame)
    done = Alignment(
        weighting,
        m=fit.m,
        s=fit.s,
        p=fit.p,
        q=fit.q,
        reprojection_error_px=fit.error_px,
        joints=used,
        frame=frame,
    )
    return fit, done
