"""One job from files to files: read the inputs, run the recipe, write the outputs.

The recipe knows no path; this module knows no network. Every output is written to a temporary
name and renamed, the video last: where the video is, the job is done.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines import build_pipeline
from pipelines.components import Components
from pipelines.loading import LoadOptions
from pipelines.scail import ScailOptions, ScailOutput, fit_reference
from xicon_infer.errors import InvalidRequest, OutOfMemory
from xicon_infer.job import Job
from xicon_infer.media.image import Sizing, load_image
from xicon_infer.media.selection import Selection
from xicon_infer.media.sheet import Row, save_contact_sheet
from xicon_infer.media.video import probe, read_clip, read_sound
from xicon_infer.media.write import atomic_path, write_video
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.runtime import Recorder, models_dirs, pick_device, pick_dtype, pick_seed
from xicon_infer.sampling.windows import ContextOptions
from xicon_infer.service_files import finish, read_tracks
from xicon_infer.service_pose import Motion, find_motion, run_pose_job, write_motion
from xicon_infer.types import (
    SPATIAL_STRIDE,
    Audio,
    Clip,
    Progress,
    Result,
    Track,
    UInt8Array,
)


@dataclass(frozen=True)
class Inputs:
    """What was read: the picture, the motion at its final rate, and the sound or None.

    pose: None while it must still be found in the driving video. motion: how it was found, None
    where it was given.
    """

    image: UInt8Array
    pose: Clip | list[Track] | None
    audio: Audio | None
    motion: Motion | None = None


def run_job(job: Job, progress: Progress) -> Result:
    """Returns what was made; the files lie at `job.outputs()`.

    Args:
        job: from `xicon_infer.job.make_job`.
        progress: told of every stage, step and warning; may raise to stop.

    Raises:
        XiconError: of the kind that fits; nothing is left half-written.
    """
    device = pick_device(job.device)
    recorder = Recorder(progress, device)
    for warning in job.warnings:
        recorder.warn(warning)
    try:
        return (run_pose_job if job.pipeline == "pose" else run_scail_job)(job, recorder, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{device} has not enough memory for {job.width}x{job.height}: {error}. Use fewer "
            "frames (--max-frames), a smaller size, or --preset fp8"
        ) from error


def run_scail_job(job: Job, recorder: Recorder, device: torch.device) -> Result:
    """Returns the video of a job of the SCAIL pipeline."""
    dtype, seed = pick_dtype(job.dtype, device), pick_seed(job.seed)
    options = scail_options(job, seed)
    with recorder.stage("read inputs"):
        inputs = read_inputs(job, recorder)
    if inputs.pose is None:
        reference = fit_reference(inputs.image, options)
        motion = find_motion(job, reference, reference.shape[:2], recorder)
        inputs = replace(inputs, pose=motion.tracks, motion=motion)
    assert inputs.pose is not None
    with recorder.stage("load models"):
        pipeline = build_pipeline(job.pipeline, job.preset, load_options(job, device, dtype))
    for note in pipeline.components.notes:
        recorder.warn(note)
    output = pipeline(inputs.image, inputs.pose, options, recorder)
    return write_outputs(job, output, inputs, recorder, pipeline.components, seed=seed)


def read_inputs(job: Job, progress: Progress) -> Inputs:
    """Returns picture, motion and sound of a job; no motion where it must be found in the video.

    The motion is resampled to the wanted rate: the number given, else that of the driving video,
    else its own. The sound is that of the driving video, else of the pose video.
    """
    assert job.image is not None
    image = load_image(job.image, field="image")
    driving = probe(job.video, field="video") if job.video else None
    rate = job.frame_rate or (driving.fps if driving else None)
    selection = Selection(rate, job.max_frames, job.skip_frames, job.select_every_nth)
    pose, audio = _given_motion(job, selection, progress)
    if job.video is not None and job.audio == "source":
        audio = read_sound(job.video, selection=selection, warn=progress.warn, field="video")
    return Inputs(image, pose, audio)


def load_options(job: Job, device: torch.device, dtype: torch.dtype) -> LoadOptions:
    """Returns where the components of a job are, and how they are loaded."""
    return LoadOptions(
        device=device,
        dtype=dtype,
        attention=job.attention,
        loras=tuple((lora.name, lora.strength) for lora in job.loras),
        lora_mode=job.lora_mode,
        search_dirs=tuple(models_dirs(job.models_dir)),
    )


def scail_options(job: Job, seed: int) -> ScailOptions:
    """Returns the options of the recipe: the fields of the same names, and the grouped ones."""
    same = {
        name: getattr(job, name)
        for name in ScailOptions.__dataclass_fields__
        if name not in ("seed", "context", "tiles")
    }
    context = ContextOptions(
        schedule=job.context_schedule,
        frames=job.context_frames,
        stride=job.context_stride,
        overlap=job.context_overlap,
        freenoise=job.freenoise,
        fuse=job.fuse_method,
    )
    tiles = TileOptions(
        *(
            side // SPATIAL_STRIDE
            for side in (
                job.tile_height,
                job.tile_width,
                job.tile_stride_height,
                job.tile_stride_width,
            )
        )
    )
    return ScailOptions(**same, seed=seed, context=context, tiles=tiles if job.tile else None)


def write_outputs(
    job: Job,
    output: ScailOutput,
    inputs: Inputs,
    recorder: Recorder,
    components: Components,
    *,
    seed: int,
) -> Result:
    """Writes every file of a job and returns the result.

    All files are written under temporary names. Only when all are complete are they renamed, the
    video last; if anything fails before, none appears and none is replaced.
    """
    paths, clip = job.outputs(), output.clip
    with ExitStack() as renames:
        temporary = {name: renames.enter_context(atomic_path(p)) for name, p in paths.items()}
        with recorder.stage("write files"):
            if "pose" in paths:
                write_video(temporary["pose"], output.pose_frames, fps=clip.fps, crf=job.crf)
            if inputs.motion is not None:
                write_motion(job, inputs.motion, temporary, clip.frames.shape[1:3], recorder)
            if "sheet" in paths:
                rows = sheet_rows(job, output, recorder)
                save_contact_sheet(temporary["sheet"], rows, fps=clip.fps)
            video = temporary["video"]
            write_video(video, clip.frames, fps=clip.fps, audio=inputs.audio, crf=job.crf)
        frames, height, width, _ = clip.frames.shape
        return finish(
            job,
            recorder,
            temporary["report"],
            frames=(frames, height, width),
            fps=clip.fps,
            machine=_machine(components),
            pose=inputs.motion.report if inputs.motion else {},
            seed=seed,
        )


def _given_motion(
    job: Job, selection: Selection, progress: Progress
) -> tuple[Clip | list[Track] | None, Audio | None]:
    """Returns the motion of a file and its sound; None where it must be found in the video."""
    if job.pose_video is not None:
        clip = read_clip(
            job.pose_video,
            selection=selection,
            with_audio=job.audio == "source" and job.video is None,
            warn=progress.warn,
            field="pose_video",
        )
        return clip, clip.audio
    if job.track is not None:
        return read_tracks(job.track, selection), None
    if not job.finds_poses:
        raise InvalidRequest("give 'video', 'pose_video' or 'track'", field="video")
    return None, None


def sheet_rows(job: Job, output: ScailOutput, progress: Progress) -> list[Row]:
    """Returns the rows of the contact sheet: reference, driving frames, pose, result."""
    rows: list[Row] = [("reference", output.reference[None])]
    if job.video is not None:
        height, width = output.pose_frames.shape[1:3]
        selection = Selection(
            output.clip.fps * job.select_every_nth,
            job.max_frames,
            job.skip_frames,
            job.select_every_nth,
        )
        size = Sizing(width, height, "crop")
        driving = read_clip(
            job.video, selection=selection, size=size, with_audio=False, warn=progress.warn
        )
        rows.append(("driving video", driving.frames[: len(output.clip.frames)]))
    rows.append(("pose", output.pose_frames))
    rows.append(("result", output.clip.frames))
    return rows


def _machine(components: Components) -> dict[str, Any]:
    """Returns what the job ran on."""
    device = components.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": f"{device} ({name})",
        "dtype": str(components.transformer.dtype).removeprefix("torch."),
        "attention": components.transformer.backend,
        "components": components.sources,
    }
