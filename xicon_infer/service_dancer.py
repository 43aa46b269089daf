"""A job of the SteadyDancer pipeline, from its files to a result.

Poses are drawn from a driving video or a saved motion, or given as they were drawn before: as a
video, or as the folders of pictures that the authors' own preparation leaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from pipelines.dancer_pose import DancerPoseOptions, draw_dancer_pose
from pipelines.steady_dancer import SteadyDancerPipeline, choose_num_frames, fit_reference
from pipelines.steady_dancer_options import PoseVideos, SteadyDancerOptions, SteadyDancerOutput
from pipelines.steady_dancer_plan import SIZE_MULTIPLE
from xicon_infer.job import Job, resolve_frames
from xicon_infer.media.image import load_image
from xicon_infer.media.selection import Selection
from xicon_infer.media.sheet import Row
from xicon_infer.pose.trust import PARTS
from xicon_infer.runtime import Recorder, pick_dtype, pick_seed
from xicon_infer.service_early import early_video
from xicon_infer.service_inputs import motion_selection, read_drawn_pose, read_motion
from xicon_infer.service_options import dancer_options, fitted_tiles
from xicon_infer.service_outputs import Made, driving_row, write_outputs
from xicon_infer.service_pose import Motion, find_character, find_persons
from xicon_infer.service_pose_models import KeptModels, LazyModels
from xicon_infer.service_session import Session, expected_shape
from xicon_infer.sizes import choose_size
from xicon_infer.types import Clip, Progress, Result, SilentProgress, Track, UInt8Array


def run_dancer_job(job: Job, recorder: Recorder, device: torch.device, session: Session) -> Result:
    """Returns the video of a job of the SteadyDancer pipeline."""
    assert job.image is not None
    seed = pick_seed(job.seed)
    selection = motion_selection(job)
    with recorder.stage("read inputs"):
        image = load_image(job.image, field="image")
        given, audio = read_motion(job, selection, recorder)
    picture = (image.shape[1], image.shape[0])
    size = choose_size(job.sizing, job.width, job.height, picture, SIZE_MULTIPLE)
    options = dancer_options(job, seed, size)
    reference = fit_reference(image, options)
    motion: Motion | None = None
    report: dict[str, Any] = {}
    if job.pose_video is not None:
        drawn = _given_poses(job, given, selection, reference, recorder)
    else:
        tracks = given if isinstance(given, list) else None
        shape = expected_shape(job, reference) if tracks is None else None
        if shape is not None:
            session.begin(job, device, pick_dtype(job.dtype, device), recorder, shape)
        drawn, motion, report = _drawn_poses(
            job, tracks, reference, options, recorder, session.pose_models
        )
    frames = choose_num_frames(drawn, options, SilentProgress())
    shape = (reference.shape[1], reference.shape[0], frames)
    pipeline = cast(
        "SteadyDancerPipeline",
        session.pipeline(job, device, pick_dtype(job.dtype, device), recorder, shape),
    )
    options = fitted_tiles(job, options, pipeline.components)
    parts = pipeline.components
    with early_video(job, parts, drawn.positive.fps, audio) as early:
        output = pipeline(image, drawn, options, recorder)
        made = Made(
            output.clip,
            seed,
            lambda: sheet_rows(job, output, drawn, recorder),
            audio=audio,
            pose_frames=output.pose_frames,
            motion=motion,
            pose=report,
            early=early,
        )
        return write_outputs(job, made, recorder, parts)


def sheet_rows(
    job: Job, output: SteadyDancerOutput, drawn: PoseVideos, progress: Progress
) -> list[Row]:
    """Returns the rows of the contact sheet: reference, driving frames, both poses, result."""
    height, width = output.pose_frames.shape[1:3]
    rows: list[Row] = [
        ("reference", output.reference[None]),
        *driving_row(job, output.clip, (height, width), progress),
        ("pose", output.pose_frames),
    ]
    if drawn.negative is not None:
        rows.append(("varied pose", drawn.negative.frames[: len(output.clip.frames)]))
    return [*rows, ("result", output.clip.frames)]


def pose_options(job: Job, options: SteadyDancerOptions) -> DancerPoseOptions:
    """Returns how the pose of a job is drawn."""
    return DancerPoseOptions(
        convention=job.pose_style,
        mode="official" if job.pose_align == "official" else "robust",
        align_to="ref" if job.aligns else "none",
        negative=options.needs_negative_pose,
        seed=options.seed,
        persons=job.persons,
        fit="pad" if job.pose_fit == "pad" else "crop",
        draw_face=job.draw_face,
        draw_face_points="weak" if job.draw_face else "none",
    )


def without_hands(track: Track) -> Track:
    """Returns a motion in which no hand is seen."""
    scores = track.pose.scores.copy()
    for name in ("left_hand", "right_hand"):
        scores[:, PARTS[name][0]] = 0
    return replace(track, pose=replace(track.pose, scores=scores))


def _given_poses(
    job: Job,
    given: Clip | list[Track] | None,
    selection: Selection,
    reference: UInt8Array,
    progress: Progress,
) -> PoseVideos:
    """Returns poses that were drawn before."""
    assert job.pose_video is not None
    size = (reference.shape[1], reference.shape[0])
    positive, negative = given, None
    with progress.stage("read poses"):
        if not isinstance(positive, Clip):
            positive = read_drawn_pose(job.pose_video, "pose_video", selection, size, progress)
        if job.negative_pose is not None:
            negative = read_drawn_pose(
                job.negative_pose, "negative_pose", selection, size, progress
            )
    return PoseVideos(positive, negative)


def _drawn_poses(
    job: Job,
    tracks: list[Track] | None,
    reference: UInt8Array,
    options: SteadyDancerOptions,
    recorder: Recorder,
    kept: KeptModels,
) -> tuple[PoseVideos, Motion | None, dict[str, Any]]:
    """Returns poses drawn from a motion that is given (tracks), or found in the driving video."""
    motion, character, report, driving_fps = None, None, {}, None
    networks = LazyModels(job, recorder, kept)
    if tracks is None:
        found = find_persons(job, recorder, kept)
        motion = Motion(found.tracks, found.tracks, found.report)
        tracks, report, driving_fps = found.tracks, dict(found.report), found.source_fps
        networks = found.networks
    if job.aligns:
        with recorder.stage("find the character"):
            character = find_character(job, reference, networks)
    if not job.draw_hands:
        tracks = [without_hands(track) for track in tracks]
    frames, _ = resolve_frames(len(tracks[0].pose.keypoints), options.num_frames)
    with recorder.stage("draw pose"):
        pose = draw_dancer_pose(
            tracks[: job.persons],
            character,
            pose_options(job, options),
            size=(reference.shape[1], reference.shape[0]),
            num_frames=frames,
            progress=recorder,
            driving_fps=driving_fps,
        )
    return PoseVideos(pose.positive, pose.negative), motion, {**report, "drawing": pose.report}
