"""SteadyDancer's pose pictures: tracks fitted to the reference and drawn.

The authors draw at twice the size of a canvas of about 1024 x 576 pixels shaped like the
reference, and shrink the pictures to the size of the result; so do we, without the JPEG and H.264
in between. The negative pose is the same motion with other proportions in every frame.

Where the person is lost for a while, the last pose is held and told; where it is lost for long,
or in one of the two pictures that are compared, the job is refused.

Source: MCG-NJU/SteadyDancer: preprocess/pose_align_withdiffaug.py, wan/image2video_dancer.py;
specification steady_dancer 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipelines.steady_dancer_plan import AREAS, SIZE_MULTIPLE, generation_size
from xicon_infer.errors import InvalidRequest, PoseError
from xicon_infer.pose.dancer_align import (
    FITS,
    MODES,
    DancerAlignment,
    DancerFit,
    DancerMode,
    apply_alignment,
    lay_on_canvas,
    measure,
)
from xicon_infer.pose.dancer_comfy import STRENGTHS, Strength, draw_comfy, to_comfy_figure
from xicon_infer.pose.dancer_draw import CANVAS_SCALE, draw_dancer
from xicon_infer.pose.dancer_lost import hold_lost
from xicon_infer.pose.dancer_negative import negative_draws, stretch_about_neck
from xicon_infer.pose.dancer_points import person_present, rows, to_dancer_figure
from xicon_infer.pose.keypoints import Figure
from xicon_infer.pose.skeleton import KEYPOINTS
from xicon_infer.pose.track import (
    MAX_GAP_S,
    check_same_video,
    drop_unusable,
    fill_gaps,
    resample_track,
)
from xicon_infer.pose.trust import hide_loose_parts
from xicon_infer.types import Clip, PoseTrack, Progress, Track, UInt8Array

Convention = Literal["official", "comfyui"]
CONVENTIONS: tuple[Convention, ...] = ("official", "comfyui")
AlignTo = Literal["ref", "none"]
ALIGN_TO: tuple[AlignTo, ...] = ("ref", "none")
CANVAS_AREA = AREAS["1024*576"]
"""Pixels of the authors' canvas, whatever the size of the result."""

CHUNK = 32
"""Pictures handed to the threads together."""

_NECK = 1


@dataclass(frozen=True)
class DancerPoseOptions:
    """How the pose of SteadyDancer is made.

    convention: whose picture is drawn. mode: what happens to joints that are not seen, see
    `dancer_align`. align_to: "ref" gives the driver the reference's proportions and place, "none"
    lays the driving frame on the picture by `fit`. anchor_frame: the driving frame that is compared
    with the reference. negative: make the negative pose too, from `seed`. persons: how many of the
    tracks are drawn; all are fitted by the first. draw_face: convention "official", which the
    model was not trained with. draw_face_points, draw_head: convention "comfyui". max_gap_s:
    longest gap that is interpolated, seconds; the last pose is held over longer ones.

    Raises:
        InvalidRequest: if a value is not allowed.
    """

    convention: Convention = "official"
    mode: DancerMode = "robust"
    align_to: AlignTo = "ref"
    anchor_frame: int = 0
    negative: bool = False
    seed: int = 0
    persons: int = 1
    fit: DancerFit = "crop"
    draw_face: bool = False
    draw_face_points: Strength = "none"
    draw_head: Strength = "full"
    max_gap_s: float = MAX_GAP_S

    def __post_init__(self) -> None:
        """Refuses values that are not allowed."""
        if str(self.align_to) == "pose":
            raise InvalidRequest(
                "align_to is 'pose'; that moves the reference picture to the driver, which is not "
                "done here. Use 'ref', or 'none'.",
                field="align_to",
            )
        checks: dict[str, tuple[bool, Any]] = {
            "convention": (self.convention in CONVENTIONS, CONVENTIONS),
            "mode": (self.mode in MODES, MODES),
            "align_to": (self.align_to in ALIGN_TO, ALIGN_TO),
            "fit": (self.fit in FITS, FITS),
            "draw_face_points": (self.draw_face_points in STRENGTHS, STRENGTHS),
            "draw_head": (self.draw_head in STRENGTHS, STRENGTHS),
            "anchor_frame": (self.anchor_frame >= 0, "0 or more"),
            "persons": (self.persons >= 1, "1 or more"),
            "max_gap_s": (0 <= self.max_gap_s < float("inf"), "0 or more seconds"),
        }
        for name, (allowed, expected) in checks.items():
            if not allowed:
                raise InvalidRequest(
                    f"{name} is {getattr(self, name)!r}; allowed: {expected}.", field=name
                )


@dataclass(frozen=True)
class DancerPose:
    """Drawn poses. positive: the motion. negative: other proportions in every frame, or None.

    report: JSON values that say how they were made.
    """

    positive: Clip
    negative: Clip | None
    report: dict[str, Any]


def draw_dancer_pose(
    tracks: list[Track],
    reference: PoseTrack | None,
    options: DancerPoseOptions,
    *,
    size: tuple[int, int],
    num_frames: int,
    progress: Progress,
    canvas: tuple[int, int] | None = None,
    driving_fps: Fraction | None = None,
) -> DancerPose:
    """Returns the pose pictures of a result.

    A longer motion is cut, a shorter one keeps its last pose.

    Args:
        tracks: persons of one video at the rate of the result, the subject first.
        reference: the character's points, one frame, in the picture as the result shows it (its
            aspect is taken for the result's); not looked at with align_to "none".
        options: how to draw.
        size: (W, H) of the result, pixels.
        num_frames: F of the result, at least 1.
        progress: told of finished frames and warned.
        canvas: (W, H), half of what is drawn on; that of the authors for the reference if None.
        driving_fps: of the driving video before it was resampled, for the report.

    Raises:
        InvalidRequest: the tracks do not belong together or do not suffice.
        PoseError: the subject is missing from the anchor frame, the reference, or more than 30 %
            of the frames; or the two pictures have no bone in common.
    """
    check_same_video(tracks)
    _check_counts(tracks, options, num_frames)
    canvas = canvas or _authors_canvas(reference, size, options.convention)
    figures, held = _figures(tracks, num_frames, options)
    _tell_held(held, progress)
    source = tracks[0].pose.size
    alignment = None
    if options.align_to == "ref":
        anchor = rows(figures[0], [options.anchor_frame])
        alignment = _measure(reference, anchor, source, canvas, options)
        _tell_alignment(alignment, progress)
        figures = [apply_alignment(figure, alignment) for figure in figures]
    else:
        figures = [lay_on_canvas(figure, source, canvas[::-1], options.fit) for figure in figures]
    shown = np.minimum(np.arange(num_frames), len(figures[0].body) - 1)
    videos = [[rows(figure, shown) for figure in figures]]
    if options.negative:
        draws = negative_draws(num_frames, options.seed)
        videos.append([stretch_about_neck(f, draws, mode=options.mode) for f in videos[0]])
    drawn = _draw(videos, options, canvas, size, progress)
    clips = [Clip(frames, tracks[0].fps) for frames in drawn]
    report = {
        "options": asdict(options),
        "frames": num_frames,
        "fps": str(tracks[0].fps),
        "driving_fps": str(driving_fps or tracks[0].fps),
        "canvas": list(canvas),
        "size": list(size),
        "held": [list(run) for run in held],
        "alignment": {} if alignment is None else _facts(alignment),
    }
    return DancerPose(clips[0], clips[1] if options.negative else None, report)


def shrink(picture: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Returns a picture [H, W, 3] brought to (W, H), smoothed as the authors do it."""
    if picture.shape[1::-1] == size:
        return picture
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized, np.uint8)


def _check_counts(tracks: list[Track], options: DancerPoseOptions, num_frames: int) -> None:
    if num_frames < 1:
        raise InvalidRequest(f"num_frames is {num_frames}; at least 1.", field="num_frames")
    if len(tracks) < options.persons:
        raise InvalidRequest(
            f"persons is {options.persons}, but there are {len(tracks)} tracks; use "
            f"persons={len(tracks)} or give more tracks.",
            field="persons",
        )
    frames = min(num_frames, len(tracks[0].pose.keypoints))
    if options.align_to == "ref" and options.anchor_frame >= frames:
        raise InvalidRequest(
            f"anchor_frame is {options.anchor_frame}; the motion has frames 0 to {frames - 1}.",
            field="anchor_frame",
        )


def _authors_canvas(
    reference: PoseTrack | None, size: tuple[int, int], convention: Convention
) -> tuple[int, int]:
    """Returns (W, H) of the authors' canvas for the reference; the result's where nearly equal."""
    if convention != "official":
        return size
    width, height = size if reference is None else reference.size[::-1]
    found = generation_size(width, height, CANVAS_AREA)
    near = all(abs(a - b) <= SIZE_MULTIPLE for a, b in zip(found, size, strict=True))
    return size if near else found


def _figures(
    tracks: list[Track], num_frames: int, options: DancerPoseOptions
) -> tuple[list[Figure], list[tuple[int, int]]]:
    """Returns the figures to align, and the runs of frames where the subject is held."""
    frames = range(min(num_frames, len(tracks[0].pose.keypoints)))
    cut = [drop_unusable(resample_track(t, frames)) for t in tracks[: options.persons]]
    if options.mode == "official":
        return [_convert(track.pose, options) for track in cut], []
    closed = [hide_loose_parts(fill_gaps(track, options.max_gap_s)) for track in cut]
    subject, *others = (_convert(track.pose, options) for track in closed)
    anchor = options.anchor_frame if options.align_to == "ref" else None
    subject, held = hold_lost(subject, anchor_frame=anchor)
    return [subject, *others], held


def _convert(pose: PoseTrack, options: DancerPoseOptions) -> Figure:
    convert = to_comfy_figure if options.convention == "comfyui" else to_dancer_figure
    return convert(pose.keypoints, pose.scores, size=pose.size)


def _measure(
    reference: PoseTrack | None,
    anchor: Figure,
    source: tuple[int, int],
    canvas: tuple[int, int],
    options: DancerPoseOptions,
) -> DancerAlignment:
    """Returns the alignment; source is (H, W) of the driving frames, canvas (W, H)."""
    character = None if reference is None else _character(reference, options)
    if character is None or not person_present(character)[0]:
        raise PoseError(
            "nobody was found in the reference image; use one that shows the character's head and "
            "shoulders at least, or do not align (align_to 'none').",
            field="image",
        )
    alignment = measure(
        character,
        anchor,
        driving_ratio=source[1] / source[0],
        canvas_ratio=canvas[0] / canvas[1],
        mode=options.mode,
    )
    pictures = {"reference": character, "anchor frame": anchor}
    guesses = {
        f"neck of the {name}": "the shoulders are not both seen; its place is a guess"
        for name, figure in pictures.items()
        if options.mode == "robust" and not figure.body_visible[0, _NECK]
    }
    return replace(alignment, replaced={**alignment.replaced, **guesses})


def _character(reference: PoseTrack, options: DancerPoseOptions) -> Figure:
    shapes = (reference.keypoints.shape, reference.scores.shape)
    if shapes != ((1, KEYPOINTS, 2), (1, KEYPOINTS)):
        raise PoseError(
            f"reference has keypoints {list(shapes[0])} and scores {list(shapes[1])}; one frame, "
            f"[1, {KEYPOINTS}, 2] and [1, {KEYPOINTS}], is needed.",
            field="reference",
            code="TRACK_INVALID",
        )
    finite = np.isfinite(reference.keypoints).all(axis=2) & np.isfinite(reference.scores)
    usable = replace(
        reference,
        keypoints=np.where(finite[..., None], reference.keypoints, np.float32(0)),
        scores=np.where(finite, reference.scores, np.float32(0)),
    )
    return _convert(usable, options)


def _draw(
    videos: Sequence[Sequence[Figure]],
    options: DancerPoseOptions,
    canvas: tuple[int, int],
    size: tuple[int, int],
    progress: Progress,
) -> list[UInt8Array]:
    """Returns the pictures [F, H, W, 3] of every video, sizes as (W, H)."""
    frames = len(videos[0][0].body)
    drawn = [np.empty((frames, size[1], size[0], 3), np.uint8) for _ in videos]
    places = [(number, index) for number in range(len(videos)) for index in range(frames)]

    def draw(place: tuple[int, int]) -> None:
        number, index = place
        drawn[number][index] = _picture(videos[number], index, options, canvas, size)

    # Few at a time, so that a job that is stopped does not wait for all of them.
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(places), CHUNK):
            done = pool.map(draw, places[start : start + CHUNK])
            for count, _ in enumerate(done, start=start + 1):
                progress.step(count, len(places), "frame")
    return drawn


def _picture(
    figures: Sequence[Figure],
    index: int,
    options: DancerPoseOptions,
    canvas: tuple[int, int],
    size: tuple[int, int],
) -> UInt8Array:
    if options.convention == "comfyui":
        return draw_comfy(
            figures,
            index,
            size=size[::-1],
            draw_face_points=options.draw_face_points,
            draw_head=options.draw_head,
        )
    large = (CANVAS_SCALE * canvas[1], CANVAS_SCALE * canvas[0])
    return shrink(draw_dancer(figures, index, size=large, draw_face=options.draw_face), size)


def _facts(alignment: DancerAlignment) -> dict[str, Any]:
    """Returns an alignment as JSON values; None stands for infinity, which JSON has not."""
    scales = {
        name: round(scale, 4) if np.isfinite(scale) else None
        for name, scale in alignment.scales.items()
    }
    offset = [round(value, 4) for value in alignment.offset]
    return {"scales": scales, "offset": offset, "replaced": alignment.replaced}


def _tell_held(held: Sequence[tuple[int, int]], progress: Progress) -> None:
    if held:
        runs = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in held)
        lost = sum(last - first + 1 for first, last in held)
        progress.warn(
            f"the person is not seen in {lost} frames of the motion ({runs}); the pose before "
            "them is held there, at the start the one after."
        )


def _tell_alignment(alignment: DancerAlignment, progress: Progress) -> None:
    if alignment.replaced:
        reasons = "; ".join(f"{name}: {why}" for name, why in alignment.replaced.items())
        progress.warn(f"not everything could be compared with the reference: {reasons}.")
