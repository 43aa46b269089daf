"""One job from files to files: read the inputs, run the recipe, write the outputs.

The recipe knows no path; this module knows no network. Every output is written to a temporary
name and renamed, the video last: where the video is, the job is done.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipelines import build_pipeline
from pipelines.components import Components, LoadOptions
from pipelines.scail import ScailOptions, ScailOutput
from xicon_infer.errors import InvalidRequest, OutOfMemory
from xicon_infer.job import Job
from xicon_infer.media.image import Sizing, load_image
from xicon_infer.media.selection import Selection, select_frames
from xicon_infer.media.sheet import Row, save_contact_sheet
from xicon_infer.media.video import probe, read_clip, read_sound
from xicon_infer.media.write import atomic_path, write_json, write_video
from xicon_infer.models.vae_tiling import TileOptions
from xicon_infer.pose.track import load_tracks, resample_track
from xicon_infer.runtime import (
    Recorder,
    models_dirs,
    pick_device,
    pick_dtype,
    pick_seed,
    versions,
)
from xicon_infer.sampling.windows import ContextOptions
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
    """What was read: the picture, the motion at its final rate, and the sound or None."""

    image: UInt8Array
    pose: Clip | list[Track]
    audio: Audio | None


def run_job(job: Job, progress: Progress) -> Result:
    """Returns what was made; the files lie at `job.outputs()`.

    Args:
        job: from `xicon_infer.job.make_job`.
        progress: told of every stage, step and warning; may raise to stop.

    Raises:
        XiconError: of the kind that fits; nothing is left half-written.
    """
    device = pick_device(job.device)
    dtype = pick_dtype(job.dtype, device)
    recorder = Recorder(progress, device)
    for warning in job.warnings:
        recorder.warn(warning)
    try:
        seed = pick_seed(job.seed)
        options = scail_options(job, seed)
        with recorder.stage("read inputs"):
            inputs = read_inputs(job, recorder)
        with recorder.stage("load models"):
            pipeline = build_pipeline(job.pipeline, job.preset, load_options(job, device, dtype))
        for note in pipeline.components.notes:
            recorder.warn(note)
        output = pipeline(inputs.image, inputs.pose, options, recorder)
        return write_outputs(job, output, inputs, recorder, _machine(pipeline.components, seed))
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{device} has not enough memory for {job.width}x{job.height}: {error}. Use fewer "
            "frames (--max-frames), a smaller size, or --preset fp8"
        ) from error


def read_inputs(job: Job, progress: Progress) -> Inputs:
    """Returns picture, motion and sound of a job.

    The motion is resampled to the wanted rate: the number given, else that of the driving video,
    else its own. The sound is that of the driving video, else of the pose video.
    """
    image = load_image(job.image, field="image")
    driving = probe(job.video, field="video") if job.video else None
    rate = job.frame_rate or (driving.fps if driving else None)
    selection = Selection(rate, job.max_frames, job.skip_frames, job.select_every_nth)
    with_audio = job.audio == "source"
    if job.pose_video is not None:
        clip = read_clip(
            job.pose_video,
            selection=selection,
            with_audio=with_audio and driving is None,
            warn=progress.warn,
            field="pose_video",
        )
        pose: Clip | list[Track] = clip
        audio = clip.audio
    elif job.track is not None:
        pose, audio = _select_tracks(load_tracks(job.track), selection), None
    else:
        raise InvalidRequest("give 'pose_video' or 'track'", field="pose_video")
    if driving is not None and job.video is not None and with_audio:
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
    job: Job, output: ScailOutput, inputs: Inputs, recorder: Recorder, machine: dict[str, Any]
) -> Result:
    """Writes every file of a job and returns the result.

    All files are written under temporary names. Only when all are complete are they renamed, the
    video last; if anything fails before, none appears and none is replaced.
    """
    paths, clip = job.outputs(), output.clip
    seed = machine.pop("seed")
    with ExitStack() as renames:
        temporary = {name: renames.enter_context(atomic_path(p)) for name, p in paths.items()}
        with recorder.stage("write files"):
            if "pose" in paths:
                write_video(temporary["pose"], output.pose_frames, fps=clip.fps, crf=job.crf)
            if "sheet" in paths:
                rows = sheet_rows(job, output, recorder)
                save_contact_sheet(temporary["sheet"], rows, fps=clip.fps)
            video = temporary["video"]
            write_video(video, clip.frames, fps=clip.fps, audio=inputs.audio, crf=job.crf)
        result = Result(
            path=paths["video"],
            mime_type="video/mp4",
            seed=seed,
            num_frames=len(clip.frames),
            width=clip.frames.shape[2],
            height=clip.frames.shape[1],
            fps=clip.fps,
            settings=job.settings() | {"seed": seed},
            stages=recorder.stages,
            warnings=recorder.warnings,
            versions=versions(),
            outputs={name: path for name, path in paths.items() if name != "video"},
            machine=machine,
        )
        write_json(temporary["report"], report(result))
    return result


def report(result: Result) -> dict[str, Any]:
    """Returns the result as JSON has it: paths as text, fps as a fraction and a number."""
    plain = asdict(result)
    plain["path"] = str(result.path)
    plain["outputs"] = {name: str(path) for name, path in result.outputs.items()}
    plain["fps"] = float(result.fps)
    plain["fps_fraction"] = str(result.fps)
    return plain


def _select_tracks(tracks: list[Track], selection: Selection) -> list[Track]:
    """Returns the tracks at the frames the selection takes, at its rate."""
    fps = tracks[0].fps
    indices = list(
        select_frames(
            float(fps),
            len(tracks[0].body.joints),
            force_rate=float(selection.force_rate or 0),
            frame_load_cap=selection.frame_load_cap,
            skip_first_frames=selection.skip_first_frames,
            select_every_nth=selection.select_every_nth,
        )
    )
    if not indices:
        raise InvalidRequest(
            f"'skip_frames' leaves nothing of the track's {len(tracks[0].body.joints)} frames, got "
            f"{selection.skip_first_frames}",
            field="skip_frames",
        )
    return [resample_track(track, indices, fps=selection.loaded_rate(fps)) for track in tracks]


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


def _machine(components: Components, seed: int) -> dict[str, Any]:
    """Returns what the job ran on."""
    device = components.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "seed": seed,
        "device": f"{device} ({name})",
        "dtype": str(components.transformer.dtype).removeprefix("torch."),
        "attention": components.transformer.backend,
        "components": components.sources,
    }
