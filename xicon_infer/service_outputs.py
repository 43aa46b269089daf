"""The files of a sampled video, all or none.

Every file is written under a temporary name. Only when all are complete are they renamed, the
video last: where the video is, the job is done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.components import Components
from xicon_infer.job import Job
from xicon_infer.media.image import Sizing
from xicon_infer.media.selection import Selection
from xicon_infer.media.sheet import Row, save_contact_sheet
from xicon_infer.media.video import read_clip
from xicon_infer.media.write import atomic_path, write_video
from xicon_infer.ops.fused_choice import choose_kernels
from xicon_infer.runtime import Recorder
from xicon_infer.service_early import EarlyVideo
from xicon_infer.service_files import finish
from xicon_infer.service_pose import Motion, write_motion
from xicon_infer.types import Audio, Clip, Progress, Result, UInt8Array


@dataclass(frozen=True)
class Made:
    """What a recipe made, ready to be written.

    clip: the video. seed: of its noise. rows: gives the rows of the contact sheet; asked for only
    if there is one. audio: its sound. pose_frames: as the model saw them, uint8 [F, h, w, 3].
    motion: how it was found. pose: JSON values on the pose for the report. early: the video where
    it was encoded already.
    """

    clip: Clip
    seed: int
    rows: Callable[[], list[Row]]
    audio: Audio | None = None
    pose_frames: UInt8Array | None = None
    motion: Motion | None = None
    pose: dict[str, Any] = field(default_factory=dict)
    early: EarlyVideo | None = None


def write_outputs(job: Job, made: Made, recorder: Recorder, components: Components[Any]) -> Result:
    """Writes every file of a job and returns the result; if anything fails, none appears."""
    paths, clip = job.outputs(), made.clip
    with ExitStack() as renames:
        temporary = {name: renames.enter_context(atomic_path(p)) for name, p in paths.items()}
        with recorder.stage("write files"):
            if "pose" in paths and made.pose_frames is not None:
                write_video(temporary["pose"], made.pose_frames, fps=clip.fps, crf=job.crf)
            if made.motion is not None:
                write_motion(job, made.motion, temporary, clip.frames.shape[1:3], recorder)
            if "sheet" in paths:
                save_contact_sheet(temporary["sheet"], made.rows(), fps=clip.fps)
            video = temporary["video"]
            if made.early is None or not made.early.take(video):
                write_video(video, clip.frames, fps=clip.fps, audio=made.audio, crf=job.crf)
        frames, height, width, _ = clip.frames.shape
        return finish(
            job,
            recorder,
            temporary["report"],
            frames=(frames, height, width),
            fps=clip.fps,
            machine=_machine(components),
            pose=made.pose,
            seed=made.seed,
        )


def driving_row(job: Job, clip: Clip, size: tuple[int, int], progress: Progress) -> list[Row]:
    """Returns the row of the driving video in a contact sheet, at (H, W); none without one."""
    if job.video is None:
        return []
    selection = Selection(
        clip.fps * job.select_every_nth, job.max_frames, job.skip_frames, job.select_every_nth
    )
    driving = read_clip(
        job.video,
        selection=selection,
        size=Sizing(size[1], size[0], "crop"),
        with_audio=False,
        warn=progress.warn,
    )
    return [("driving video", driving.frames[: len(clip.frames)])]


def _machine(components: Components[Any]) -> dict[str, Any]:
    """Returns what the job ran on."""
    device = components.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    transformer = components.transformer
    kernels = choose_kernels(transformer.kernels_request, device, transformer.dtype)
    return {
        "device": f"{device} ({name})",
        "dtype": str(components.transformer.dtype).removeprefix("torch."),
        "attention": components.transformer.backend,
        "attention_passes": [
            choice.told() for choice in components.transformer.attention_choices.values()
        ],
        "kernels": kernels.kernels,
        "kernels_note": kernels.why,
        "components": components.sources,
        **components.facts,
    }
