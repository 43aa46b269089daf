"""A job of the Wan pipelines, from its files to a result."""

from __future__ import annotations

from typing import cast

import torch

from pipelines.wan_video import SIZE_MULTIPLE, WanOutput, WanVideoPipeline, fit_picture
from xicon_infer.job import Job
from xicon_infer.media.image import load_image
from xicon_infer.media.sheet import Row
from xicon_infer.runtime import Recorder, pick_dtype, pick_seed
from xicon_infer.service_early import early_video
from xicon_infer.service_options import fitted_tiles, wan_options
from xicon_infer.service_outputs import Made, write_outputs
from xicon_infer.service_session import Session
from xicon_infer.sizes import choose_size
from xicon_infer.types import Result, latent_frames, pixel_frames


def run_wan_job(job: Job, recorder: Recorder, device: torch.device, session: Session) -> Result:
    """Returns the video of a job of the Wan pipelines."""
    seed = pick_seed(job.seed)
    with recorder.stage("read inputs"):
        first, last = (
            None if path is None else load_image(path, field=field)
            for path, field in ((job.image, "image"), (job.end_image, "end_image"))
        )
    picture = None if first is None else (first.shape[1], first.shape[0])
    size = choose_size(job.sizing, job.width, job.height, picture, SIZE_MULTIPLE)
    options = wan_options(job, seed, size)
    made_frames = pixel_frames(latent_frames(options.num_frames))
    if made_frames != options.num_frames:
        recorder.warn(f"{options.num_frames} frames lowered to {made_frames}: the model makes 4n+1")
    fitted = fit_picture(first, options)
    width, height = size if fitted is None else (fitted.shape[1], fitted.shape[0])
    dtype, shape = pick_dtype(job.dtype, device), (width, height, made_frames)
    pipeline = cast("WanVideoPipeline", session.pipeline(job, device, dtype, recorder, shape))
    options = fitted_tiles(job, options, pipeline.components)
    parts = pipeline.components
    with early_video(job, parts, options.fps) as early:
        output = pipeline(options, first, last, recorder)
        made = Made(output.clip, seed, lambda: sheet_rows(output), early=early)
        return write_outputs(job, made, recorder, parts)


def sheet_rows(output: WanOutput) -> list[Row]:
    """Returns the rows of the contact sheet: the pictures it starts and ends with, the result."""
    named = (("first picture", output.first), ("last picture", output.last))
    rows: list[Row] = [(name, picture[None]) for name, picture in named if picture is not None]
    return [*rows, ("result", output.clip.frames)]
