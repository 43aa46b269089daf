"""The plan of a job: steps, windows, tokens, work, memory and files, without loading a network.

Everything here is arithmetic and headers of media files: `--dry-run` answers in a second and
imports no PyTorch. Numbers are closed forms (`xicon_infer.formulas`), not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

from pipelines import plan_pose
from pipelines.memory import Allowed, MemoryPlan, choose_memory
from pipelines.memory_needs import Pipeline, Storage, Workload, needs_of
from pipelines.plan_memory import memory_for, memory_lines, workload_of
from pipelines.plan_shapes import Sizes, sizes_of
from pipelines.plan_stages import (
    batch_of,
    decoder_notes,
    device_notes,
    kept_tokens,
    sampling_stages,
)
from pipelines.plan_steps import cache_of, context_of, plan_steps
from pipelines.plan_types import FilePlan, Plan, StagePlan, StepPlan, file_plan
from pipelines.plan_windows import cache_works, idle_options
from xicon_infer.errors import InvalidRequest
from xicon_infer.job import Job, resolve_frames
from xicon_infer.media.image import load_image, resized_size
from xicon_infer.media.selection import select_frames
from xicon_infer.media.video import probe
from xicon_infer.pose.track import load_tracks
from xicon_infer.sizes import choose_size
from xicon_infer.types import latent_frames, pixel_frames
from xicon_infer.weights.manifest import FileEntry, files_for, load_manifest, optional_files

__all__ = [
    "FilePlan",
    "Plan",
    "StagePlan",
    "StepPlan",
    "driving_frames",
    "make_plan",
    "memory_of",
    "memory_on",
    "plan_steps",
]

_MULTIPLES = {"scail": 32, "steady_dancer": 16, "wan_i2v": 16, "wan_t2v": 16}


def make_plan(job: Job, *, search_dirs: Sequence[Path] = (), gpu: str | None = None) -> Plan:
    """Returns the plan of a job.

    Args:
        job: the job; its files exist.
        search_dirs: folders with weights.
        gpu: a card to plan the memory for, as "RTX 4090"; None for none.

    Raises:
        MediaError: a media file cannot be read.
        InvalidRequest: the sampler cannot make so many steps, or there is no such card.
        OutOfMemory: the job does not fit on the card.
    """
    if job.pipeline == "pose":
        return _pose_plan(job, search_dirs)
    available, fps = _source(job)
    width, height = _video_size(job)
    num_frames, warnings = _frames(job, available)
    sizes = sizes_of(job, width, height, num_frames)
    steps = plan_steps(job, sizes.dit, width, height, num_frames)
    stages = (*plan_pose.pose_stages(job, available), *sampling_stages(job, sizes, steps))
    context = context_of(job)
    warnings += idle_options(context, num_frames, cache_of(job), _anchor(job))
    looped = context.looped and context.active(num_frames)
    memory = memory_of(job, sizes, gpu) if gpu is not None else None
    return Plan(
        pipeline=job.pipeline,
        preset=job.preset,
        width=width,
        height=height,
        fps=float(fps),
        driving_frames=available,
        num_frames=num_frames,
        output_frames=num_frames + 3 if looped else num_frames,
        latent_frames=latent_frames(num_frames),
        steps=steps,
        tokens=max(step.tokens for step in steps),
        forwards=sum(step.forwards for step in steps),
        stages=stages,
        total_flops=sum(stage.flops for stage in stages),
        peak_memory_bytes=_peak(stages),
        resident_memory_bytes=max(_resident(stages), _peak(stages)),
        files=_files(job, search_dirs),
        outputs=job.outputs(),
        warnings=(*job.warnings, *warnings),
        settings=job.settings(),
        notes=(*plan_pose.pose_notes(job), *decoder_notes(job), *device_notes(job)),
        memory=tuple(memory_lines(memory, gpu)) if memory is not None and gpu else (),
        skips=cache_works(cache_of(job), context, num_frames),
    )


def memory_of(job: Job, sizes: Sizes, gpu: str) -> MemoryPlan:
    """Returns where the networks of a job would lie on a card.

    Args:
        job: its options memory, blocks_to_swap, storage and tile are limits.
        sizes: of the job.
        gpu: a name, or a size as "24GB".

    Raises:
        InvalidRequest: there is no such card, or the options contradict each other.
        OutOfMemory: nothing fits; says what would.
    """
    return memory_for(_workload(job, sizes), gpu, request=job.memory, allow=allowed(job))


def memory_on(job: Job, sizes: Sizes, *, free_bytes: int) -> MemoryPlan:
    """Returns where the networks of a job lie on a device with so much free memory.

    Arguments and errors as `memory_of`; `free_bytes` is without the CUDA context.
    """
    work = _workload(job, sizes)
    return choose_memory(
        lambda storage: needs_of(work, storage),
        free_bytes=free_bytes,
        request=job.memory,
        allow=allowed(job),
    )


def _workload(job: Job, sizes: Sizes) -> Workload:
    context = context_of(job)
    return workload_of(
        job,
        sizes,
        cast("Pipeline", job.pipeline),
        window=context.frames if context.active(sizes.num_frames) else None,
        batch=batch_of(job, sizes),
        kept_tokens=kept_tokens(job, sizes),
    )


def _anchor(job: Job) -> tuple[str, str] | None:
    """Returns what later windows start with, and the default of that; None without a picture."""
    usual = {"steady_dancer": "first", "wan_i2v": "every"}.get(job.pipeline)
    return None if usual is None else (job.window_anchor, usual)


def allowed(job: Job) -> Allowed:
    """Returns what a memory plan may choose from, by the options of the job."""
    storages: tuple[Storage, ...] = ("reference",) if job.storage == "auto" else (job.storage,)
    return Allowed(storages, job.blocks_to_swap, True if job.tile else "auto")


def _pose_plan(job: Job, search_dirs: Sequence[Path]) -> Plan:
    available, fps = driving_frames(job)
    if job.image is not None:
        load_image(job.image)  # refuses a damaged one
    persons = job.persons if job.track is None else len(load_tracks(job.track))
    return plan_pose.make_pose_plan(
        job, available, fps=fps, persons=persons, search_dirs=search_dirs
    )


def _source(job: Job) -> tuple[int, Fraction]:
    """Returns how many frames drive the video, and its rate; none where nothing drives it."""
    if job.pipeline in ("scail", "steady_dancer"):
        return driving_frames(job)
    assert job.frame_rate is not None
    return 0, job.frame_rate


def _frames(job: Job, available: int) -> tuple[int, list[str]]:
    """Returns F of the result, and a warning for every repair."""
    if available:
        return resolve_frames(available, job.num_frames)
    assert job.num_frames is not None
    made = pixel_frames(latent_frames(job.num_frames))
    if made == job.num_frames:
        return made, []
    return made, [f"{job.num_frames} frames lowered to {made}: the model makes 4n+1"]


def _video_size(job: Job) -> tuple[int, int]:
    """Returns (W, H) of the result, as the sizing and the fit make it of the reference."""
    if job.image is None:
        return job.width, job.height
    height, width = load_image(job.image).shape[:2]
    multiple = _MULTIPLES[job.pipeline]
    size = choose_size(job.sizing, job.width, job.height, (width, height), multiple)
    return resized_size(
        width,
        height,
        target_width=size[0],
        target_height=size[1],
        fit=job.image_fit,
        divisible_by=multiple,
    )


def driving_frames(job: Job) -> tuple[int, Fraction]:
    """Returns how many frames drive the video, and their rate.

    The rate is the option fps, else that of the driving video, else that of the pose itself.

    Raises:
        MediaError: a file cannot be read.
        InvalidRequest: no frame is left.
    """
    video = job.video if job.finds_poses else job.pose_video
    if video is not None and video.is_dir():
        return _folder_frames(job, video)
    if video is not None:
        info = probe(video, field="video" if job.finds_poses else "pose_video")
        source = info.fps
        # A file that ends early: as many as the readable part has.
        count = round(info.duration_s * source) if info.num_frames is None else info.num_frames
    else:
        assert job.track is not None  # `make_job` refuses a job without any motion
        track = load_tracks(job.track)[0]
        source, count = track.fps, len(track.pose.keypoints)
    rate = _wanted_rate(job)
    selected = select_frames(
        float(source),
        count,
        force_rate=float(rate or 0),
        frame_load_cap=_frame_cap(job),
        skip_first_frames=job.skip_frames,
        select_every_nth=job.select_every_nth,
    )
    found = sum(1 for _ in selected)
    if found == 0:
        raise InvalidRequest(
            f"'skip_frames' leaves nothing of {count} driving frames, got {job.skip_frames}",
            field="skip_frames",
            code="OUT_OF_RANGE",
        )
    return found, (rate or source) / job.select_every_nth


def _frame_cap(job: Job) -> int:
    """Returns the most driving frames that are read, 0 for all: no more than are drawn."""
    drawn = (job.num_frames or 0) if job.finds_poses or job.pipeline == "pose" else 0
    return min((cap for cap in (job.max_frames, drawn) if cap), default=0)


def _wanted_rate(job: Job) -> Fraction | None:
    """Returns the rate to resample to, None for the rate of the pose."""
    if job.frame_rate is not None or job.video is None:
        return job.frame_rate
    return probe(job.video, field="video").fps


def _folder_frames(job: Job, folder: Path) -> tuple[int, Fraction]:
    """Returns how many pictures of a folder drive the video, and its rate."""
    pictures = [p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    taken = len(range(job.skip_frames, len(pictures), job.select_every_nth))
    if taken == 0:
        raise InvalidRequest(
            f"'skip_frames' leaves nothing of {len(pictures)} pictures, got {job.skip_frames}",
            field="skip_frames",
            code="OUT_OF_RANGE",
        )
    return min(taken, job.max_frames or taken), job.frame_rate or Fraction(16)


def _peak(stages: Sequence[StagePlan]) -> int:
    """Returns the memory with one component on the device at a time."""
    return max(stage.weight_bytes + stage.work_bytes for stage in stages)


def _resident(stages: Sequence[StagePlan]) -> int:
    """Returns the memory with every component on the device; both VAE stages share one.

    The pose networks are let go when the poses are found.
    """
    alone = ("decode video", plan_pose.FIND_POSES)
    weights = sum(stage.weight_bytes for stage in stages if stage.name not in alone)
    return weights + max(stage.work_bytes for stage in stages)


def _files(job: Job, search_dirs: Sequence[Path]) -> tuple[FilePlan, ...]:
    found = []
    if job.preset != "tiny":
        entries = files_for(job.pipeline, job.preset)
        if job.decoder == "tiny":
            entries += optional_files("preview")
        found = [file_plan(entry, search_dirs) for entry in entries if entry.component != "lora"]
    found += plan_pose.pose_files(job, search_dirs)
    return (*found, *(_lora_file(lora.name, search_dirs) for lora in job.loras))


def _lora_file(name: str, search_dirs: Sequence[Path]) -> FilePlan:
    """Returns a LoRA by path, by a name in the manifest, or by a name in the folders."""
    if Path(name).is_file():
        return FilePlan("lora", name, Path(name), Path(name).stat().st_size)
    known = [entry for entry in load_manifest().files if name in entry.names]
    unknown = FileEntry("", "lora", (), "", name, None, None, None, "", "", (name,))
    return file_plan(known[0] if known else unknown, search_dirs)
