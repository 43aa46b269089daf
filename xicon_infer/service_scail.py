"""A job of the SCAIL pipeline, from its files to a result."""

from __future__ import annotations

from typing import cast

import torch

from pipelines.scail import (
    ScailOptions,
    ScailOutput,
    ScailPipeline,
    choose_num_frames,
    fit_reference,
)
from xicon_infer.job import Job
from xicon_infer.media.image import load_image
from xicon_infer.media.sheet import Row
from xicon_infer.runtime import Recorder, pick_dtype, pick_seed
from xicon_infer.service_early import early_video
from xicon_infer.service_inputs import motion_selection, read_motion
from xicon_infer.service_options import fitted_tiles, scail_options
from xicon_infer.service_outputs import Made, driving_row, write_outputs
from xicon_infer.service_pose import find_motion
from xicon_infer.service_session import Session, expected_shape
from xicon_infer.types import Clip, Progress, Result, SilentProgress, Track, UInt8Array


def run_scail_job(job: Job, recorder: Recorder, device: torch.device, session: Session) -> Result:
    """Returns the video of a job of the SCAIL pipeline."""
    assert job.image is not None
    seed = pick_seed(job.seed)
    options = scail_options(job, seed)
    with recorder.stage("read inputs"):
        image = load_image(job.image, field="image")
        pose, audio = read_motion(job, motion_selection(job), recorder)
    motion = None
    if pose is None:
        reference = fit_reference(image, options)
        if shape := expected_shape(job, reference):
            session.begin(job, device, pick_dtype(job.dtype, device), recorder, shape)
        motion = find_motion(job, reference, reference.shape[:2], recorder, session.pose_models)
        pose = motion.tracks
    shape = result_shape(image, pose, options)
    dtype = pick_dtype(job.dtype, device)
    pipeline = cast("ScailPipeline", session.pipeline(job, device, dtype, recorder, shape))
    options = fitted_tiles(job, options, pipeline.components)
    parts = pipeline.components
    fps = pose.fps if isinstance(pose, Clip) else pose[0].fps
    with early_video(job, parts, fps, audio) as early:
        output = pipeline(image, pose, options, recorder)
        made = Made(
            output.clip,
            seed,
            lambda: sheet_rows(job, output, recorder),
            audio=audio,
            pose_frames=output.pose_frames,
            motion=motion,
            pose=motion.report if motion else {},
            early=early,
        )
        return write_outputs(job, made, recorder, parts)


def result_shape(
    image: UInt8Array, pose: Clip | list[Track], options: ScailOptions
) -> tuple[int, int, int]:
    """Returns (width, height, frames) of the result."""
    height, width = fit_reference(image, options).shape[:2]
    return width, height, choose_num_frames(pose, options, SilentProgress())


def sheet_rows(job: Job, output: ScailOutput, progress: Progress) -> list[Row]:
    """Returns the rows of the contact sheet: reference, driving frames, pose, result."""
    height, width = output.pose_frames.shape[1:3]
    return [
        ("reference", output.reference[None]),
        *driving_row(job, output.clip, (height, width), progress),
        ("pose", output.pose_frames),
        ("result", output.clip.frames),
    ]
