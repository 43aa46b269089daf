"""The pose stage of a job, from the driving video's path to tracks; and the pose pipeline.

What the networks saw is kept by the content of the video, so that another subject, smoothing or
alignment runs in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.pose import (
    MotionOptions,
    align,
    find_reference,
    find_tracks,
    observe,
)
from pipelines.pose_cache import cache_key, load_observations, save_observations
from xicon_infer.errors import MediaError
from xicon_infer.job import Job
from xicon_infer.media.image import Sizing, load_image, resize_frames
from xicon_infer.media.selection import Selection
from xicon_infer.media.sheet import Row, moments, save_contact_sheet
from xicon_infer.media.source import MediaLimits
from xicon_infer.media.video import iter_frames, probe, read_sound
from xicon_infer.media.write import atomic_path, write_json, write_video
from xicon_infer.pose.observations import Bodies, Boxes, Observation
from xicon_infer.pose.openpose import to_openpose
from xicon_infer.pose.render import RenderOptions, iter_render_track
from xicon_infer.pose.track import MAX_FRAMES, save_tracks
from xicon_infer.runtime import Recorder, cache_dir
from xicon_infer.service_files import finish, read_tracks
from xicon_infer.service_pose_models import KeptModels, LazyModels
from xicon_infer.types import PoseTrack, Progress, Result, Track, UInt8Array

LONGEST_SIDE = 1280
"""Pixels; larger driving frames are made smaller before anybody is looked for. The networks see
crops of at most 384 pixels, and every number is mapped back to the result anyway."""

POSE_LIMITS = MediaLimits(
    max_video_bytes=8 * 10**9, max_duration_s=3600.0, max_frames=200_000, max_seconds=36_000.0
)
"""The pose stage keeps numbers, not frames, so a long video is no danger to it."""

SHEET_COLUMNS = 8
FIGURE_SHARE = 0.75
"""Of the drawn figure where it covers the driving frame in the overlay."""


@dataclass(frozen=True)
class Motion:
    """Who moves, and how it was decided.

    tracks: to draw. driving: the same persons before they were fitted to the reference.
    report: JSON values for the result.
    """

    tracks: list[Track]
    driving: list[Track]
    report: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Who was found in a driving video, the subject first.

    report: JSON values for the result. networks: to look at another picture with. source_fps: of
    the video, before its frames were resampled.
    """

    tracks: list[Track]
    report: dict[str, Any]
    networks: LazyModels
    source_fps: Fraction


def find_persons(job: Job, recorder: Recorder, kept: KeptModels | None = None) -> Found:
    """Returns the persons in the driving video of a job.

    Args:
        job: with `finds_poses`.
        recorder: told of stages, steps and warnings.
        kept: pose networks of jobs before.

    Raises:
        WeightsError: a network's file is missing. PoseError: there is nobody to animate.
    """
    assert job.video is not None
    lazy = LazyModels(job, recorder, kept)
    selection = motion_selection(job)
    info = probe(job.video, limits=POSE_LIMITS, field="video")
    sizing = looked_at(info.width, info.height)
    with recorder.stage("find poses"):
        observations = _observations(job, lazy, selection, sizing, recorder)
    tracks, report = find_tracks(
        observations,
        fps=selection.loaded_rate(info.fps),
        size=(sizing.height, sizing.width),
        options=motion_options(job),
    )
    for warning in report.warnings:
        recorder.warn(warning)
    return Found(tracks, report.to_json(), lazy, info.fps)


def find_motion(
    job: Job,
    image: UInt8Array | None,
    size: tuple[int, int],
    recorder: Recorder,
    kept: KeptModels | None = None,
) -> Motion:
    """Returns the motion in the driving video of a job, fitted to the reference.

    Args:
        job: with `finds_poses`.
        image: the reference at the size of the result, for alignment; None for none.
        size: (H, W) of the result.
        recorder: told of stages, steps and warnings.
        kept: pose networks of jobs before.

    Raises:
        WeightsError: a network's file is missing. PoseError: there is nobody to animate.
    """
    found = find_persons(job, recorder, kept)
    facts, fitted, options = dict(found.report), found.tracks, motion_options(job)
    if image is not None:
        with recorder.stage("fit to the reference"):
            reference = None
            if options.align != "off":
                reference = find_character(job, image, found.networks)
            fitted, alignment = align(
                found.tracks, reference, size=size, fit=_canvas_fit(job), options=options
            )
        facts["alignment"] = asdict(alignment)
        if alignment.mode == "skipped" and options.align != "off":
            recorder.warn(f"the pose was not fitted to the reference: {alignment.reason}")
    return Motion(fitted, found.tracks, facts)


def motion_options(job: Job) -> MotionOptions:
    """Returns who is animated in a job, and how the motion is treated."""
    subject = int(job.subject) if str(job.subject).isdigit() else job.subject
    return MotionOptions(subject, job.persons, job.smooth, job.align)


def motion_selection(job: Job) -> Selection:
    """Returns which driving frames are looked at: no more than the video can have."""
    caps = [cap for cap in (job.max_frames, job.num_frames) if cap]
    return Selection(job.frame_rate, min(caps, default=0), job.skip_frames, job.select_every_nth)


def looked_at(width: int, height: int) -> Sizing:
    """Returns the size at which driving frames are looked at: at most LONGEST_SIDE, even."""
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    even = [max(2, round(side * scale / 2) * 2) for side in (width, height)]
    return Sizing(even[0], even[1], "stretch", method="area")


def run_pose_job(
    job: Job, recorder: Recorder, device: torch.device, kept: KeptModels | None = None
) -> Result:
    """Returns the pose video of a job of the pose pipeline, with track, JSON and previews."""
    size = (job.height, job.width)
    image = None
    if job.image is not None:
        image = resize_frames(
            load_image(job.image, field="image"), width=job.width, height=job.height, fit="crop"
        )
    if job.finds_poses:
        motion = find_motion(job, image, size, recorder, kept)
    else:
        assert job.track is not None
        tracks = read_tracks(job.track, motion_selection(job))
        motion = Motion(tracks, tracks, {})
    return _write(job, motion, recorder, device)


def overlay_frames(
    job: Job, tracks: list[Track], size: tuple[int, int], device: torch.device
) -> Iterator[UInt8Array]:
    """Yields the figure over the driving video, uint8 [H, W, 3], frame by frame."""
    assert job.video is not None
    height, width = size
    fit = _canvas_fit(job)
    rate = tracks[0].fps * job.select_every_nth
    selection = Selection(
        rate, len(tracks[0].pose.keypoints), job.skip_frames, job.select_every_nth
    )
    driving = iter_frames(
        job.video, selection=selection, size=Sizing(width, height, fit), limits=POSE_LIMITS
    )
    for frame, figure in zip(driving, _pictures(job, tracks, size, device), strict=False):
        covered = figure.any(axis=2, keepdims=True)
        mixed = figure * FIGURE_SHARE + frame * (1 - FIGURE_SHARE)
        yield np.where(covered, mixed, frame).astype(np.uint8)


def write_motion(
    job: Job,
    motion: Motion,
    temporary: dict[str, Path],
    size: tuple[int, int],
    recorder: Recorder,
) -> None:
    """Writes the track and the overlay of a job where they were asked for.

    Args:
        job: what was asked for.
        motion: found in its driving video.
        temporary: output -> where to write it.
        size: (H, W) of the result.
        recorder: whose device draws.
    """
    if "track" in temporary:
        save_tracks(temporary["track"], motion.driving)
    if "overlay" in temporary:
        pictures = overlay_frames(job, motion.driving, size, recorder.device)
        write_video(temporary["overlay"], pictures, fps=motion.driving[0].fps, crf=job.crf)


def _observations(
    job: Job, lazy: LazyModels, selection: Selection, sizing: Sizing, progress: Progress
) -> list[Observation]:
    assert job.video is not None
    folder = cache_dir() / "pose"
    settings = {"models": asdict(lazy.options), "frames": asdict(selection), "size": asdict(sizing)}
    key = cache_key(job.video, settings, lazy.paths)
    if job.pose_cache and (kept := load_observations(folder, key)) is not None:
        progress.step(len(kept), len(kept), "frame")
        return kept
    info = probe(job.video, limits=POSE_LIMITS, field="video")
    expected = int(info.duration_s * float(selection.loaded_rate(info.fps)))
    total = min(expected, selection.frame_load_cap or expected)
    if total > MAX_FRAMES:
        raise MediaError(
            f"'video' gives about {total} frames; the pose stage takes at most {MAX_FRAMES}. Use "
            "--max-frames, --select-every-nth or a lower --fps",
            field="video",
            code="VIDEO_TOO_LONG",
        )
    frames = iter_frames(
        job.video, selection=selection, size=sizing, limits=POSE_LIMITS, warn=progress.warn
    )
    observations = observe(frames, lazy.loaded, progress, total)
    if job.pose_cache:
        save_observations(folder, key, observations)
    return observations


def find_character(job: Job, image: UInt8Array, lazy: LazyModels) -> PoseTrack | None:
    """Returns the character's points, kept like those of a video."""
    assert job.image is not None
    folder = cache_dir() / "pose"
    settings = {"models": asdict(lazy.options), "reference": [*image.shape, job.image_fit]}
    key = cache_key(job.image, settings, lazy.paths)
    kept = load_observations(folder, key) if job.pose_cache else None
    if kept is None:
        found = find_reference(image, lazy.loaded)
        kept = [_as_observation(found)]
        if job.pose_cache:
            save_observations(folder, key, kept)
    seen = kept[0]
    if not len(seen.keypoints):
        return None
    height, width = image.shape[:2]
    return PoseTrack(seen.keypoints, seen.keypoint_scores, seen.boxes.bboxes, (height, width))


def _as_observation(found: PoseTrack | None) -> Observation:
    count = 0 if found is None else 1
    empty = np.zeros((count, 24, 3), np.float32), np.zeros((count, 24), np.float32)
    if found is None:
        boxes = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), ())
        points = np.zeros((0, 133, 2), np.float32), np.zeros((0, 133), np.float32)
        return Observation(boxes, *points, Bodies(*empty))
    boxes = Boxes(found.bboxes, np.ones(1, np.float32), (-1,))
    return Observation(boxes, found.keypoints, found.scores, Bodies(*empty))


def _canvas_fit(job: Job) -> Any:
    return "pad" if job.pose_fit == "pad" else "crop"


def _pictures(
    job: Job, tracks: list[Track], size: tuple[int, int], device: torch.device
) -> Iterator[UInt8Array]:
    options = RenderOptions(
        mode="full",
        fit=_canvas_fit(job),
        draw_face=job.draw_face,
        draw_hands=job.draw_hands,
        persons=len(tracks),
    )
    height, width = size
    for chunk in iter_render_track(
        tracks, width=width, height=height, options=options, device=device
    ):
        yield from chunk


class _Sampler:
    """Passes pictures on and keeps those that a contact sheet shows."""

    def __init__(self, wanted: list[int]) -> None:
        self.wanted = set(wanted)
        self.kept: list[UInt8Array] = []

    def watch(self, pictures: Iterator[UInt8Array]) -> Iterator[UInt8Array]:
        for index, picture in enumerate(pictures):
            if index in self.wanted:
                self.kept.append(picture)
            yield picture


def _write(job: Job, motion: Motion, recorder: Recorder, device: torch.device) -> Result:
    """Writes the files of the pose pipeline, renamed together, the video last."""
    paths, size = job.outputs(), (job.height, job.width)
    fps: Fraction = motion.tracks[0].fps
    count = len(motion.tracks[0].pose.keypoints)
    samplers = {name: _Sampler(moments(count, SHEET_COLUMNS)) for name in ("pose", "overlay")}
    with ExitStack() as renames:
        temporary = {name: renames.enter_context(atomic_path(p)) for name, p in paths.items()}
        with recorder.stage("draw and write"):
            drawn = _counted(_pictures(job, motion.tracks, size, device), count, recorder)
            audio = None
            if job.video is not None and job.audio == "source":
                selection = motion_selection(job)
                audio = read_sound(job.video, selection=selection, warn=recorder.warn)
            write_video(
                temporary["video"],
                samplers["pose"].watch(drawn),
                fps=fps,
                audio=audio,
                crf=job.crf,
            )
            if "overlay" in paths:
                over = overlay_frames(job, motion.driving, size, device)
                write_video(
                    temporary["overlay"], samplers["overlay"].watch(over), fps=fps, crf=job.crf
                )
            save_tracks(temporary["track"], motion.driving)
            write_json(temporary["openpose"], to_openpose(motion.driving))
            if "sheet" in paths:
                rows: list[Row] = [
                    (f"{name}, {len(sampler.kept)} of {count}", np.stack(sampler.kept))
                    for name, sampler in samplers.items()
                    if sampler.kept
                ]
                numbers = moments(count, SHEET_COLUMNS)
                save_contact_sheet(temporary["sheet"], rows, fps=fps, numbers=numbers)
        return finish(
            job,
            recorder,
            temporary["report"],
            frames=(count, *size),
            fps=fps,
            machine={"device": str(device)},
            pose=motion.report,
        )


def _counted(
    pictures: Iterator[UInt8Array], total: int, progress: Progress
) -> Iterator[UInt8Array]:
    for index, picture in enumerate(pictures, start=1):
        yield picture
        progress.step(index, total, "frame")
